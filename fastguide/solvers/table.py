"""The step table: one row of coefficients per step, computed in float64, kept on the device in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from ..schedules.predictions import GradientForm

ROW_COLUMNS = (
    "x0_scale",  # x0 = clip(x0_scale * (x0_sample * x + x0_pred * m + x0_grad * s * g))
    "x0_sample",
    "x0_pred",
    "x0_grad",
    "clip",  # x0 is clipped to [-clip, clip]; infinity: not at all
    "out_x0",  # x' = out_x0 * x0 + out_sample * x + out_pred * m + (out_grad + out_var_grad * sigma^2) * s * g
    "out_sample",  #  + out_noise * sigma * z
    "out_pred",
    "out_grad",
    "out_var_grad",
    "out_noise",
    "logvar_base",  # sigma^2 = exp(logvar_base + logvar_span * v) with a learned variance v, else sigma = 1
    "logvar_span",
    "in_scale",  # in_scale * x' is the input of the next model call,
    "in_timestep",  # and this its timestep
    "known_sample",  # known_sample * x_0 + known_noise * z is a known image at the level of x'
    "known_noise",
)
"""Names of a row's coefficients, in the order in which every kernel reads them (``csrc/step.h`` repeats it)."""

_GRADIENT_COLUMNS = ("x0_grad", "out_grad", "out_var_grad")
_CLIP, _IN_SCALE, _IN_TIMESTEP = (ROW_COLUMNS.index(name) for name in ("clip", "in_scale", "in_timestep"))


class StepTable:
    """All steps of a solver: their timesteps and their rows. Made by ``ddpm`` and ``ddim``; never changed in place.

    ``len(table)`` is the number of steps, ``table.timesteps`` an int64 tensor of shape ``(steps,)`` on the table's
    device, ``table.rows`` a float64 CPU tensor of shape ``(steps, len(ROW_COLUMNS))`` without any gradient.
    A slice of consecutive steps is a table: ``table[k:]`` starts image-to-image at step k.

    Args:
        timesteps: int64 of shape ``(steps,)``.
        columns: names of ``ROW_COLUMNS`` to float64 tensors of shape ``(steps,)``; absent: 0, no clip, in_scale 1,
            in_timestep the timestep of the next row.
        gradients: each ``GradientForm`` to its gradient columns, or to the reason why it has none.
        learned_variance: whether a step takes the model's variance output.
        undefined: why some rows may be infinite; ``None``: all must be finite. A step at such a row is refused as far
            as the host knows the index.
        alphas_cumprod: float64 of shape ``(steps,)``, abar at each timestep, for image-to-image; ``None``: not known.
        name: for messages.
    """

    def __init__(
        self,
        timesteps: Tensor,
        columns: Mapping[str, Tensor],
        *,
        gradients: Mapping[str, Mapping[str, Tensor] | str] | None = None,
        learned_variance: bool = False,
        undefined: str | None = None,
        alphas_cumprod: Tensor | None = None,
        name: str = "step table",
    ) -> None:
        if timesteps.dim() != 1 or len(timesteps) == 0 or timesteps.dtype != torch.int64:
            raise ValueError(
                f"timesteps: expected int64 of shape (steps,), got {timesteps.dtype} of {tuple(timesteps.shape)}"
            )
        rows = torch.zeros(len(timesteps), len(ROW_COLUMNS), dtype=torch.float64, device="cpu")
        rows[:, _CLIP] = torch.inf
        rows[:, _IN_SCALE] = 1.0
        rows[:-1, _IN_TIMESTEP] = timesteps[1:].to(rows.dtype)
        _set_columns(rows, columns, ROW_COLUMNS)
        if not bool((rows[:, _CLIP] > 0).all()):
            raise ValueError("columns: expected positive values in 'clip'")
        forms: dict[str, Tensor | str] = {}
        for form, gradient in (gradients or {}).items():
            if form not in get_args(GradientForm):
                raise ValueError(f"gradients: expected the forms {get_args(GradientForm)}, got {form!r}")
            if isinstance(gradient, str):
                forms[form] = gradient
                continue
            guided = forms[form] = rows.clone()
            _set_columns(guided, gradient, _GRADIENT_COLUMNS)
        bad = [~_finite_rows(values) for values in (rows, *forms.values()) if isinstance(values, Tensor)]
        bad_rows = torch.stack(bad).any(0)
        if undefined is None and bool(bad_rows.any()):
            raise ValueError(f"columns: expected finite rows, got others at timestep {int(timesteps[bad_rows][0])}")
        self._assign(timesteps, rows, forms, learned_variance, undefined, alphas_cumprod, name, torch.device("cpu"))

    def _assign(
        self,
        timesteps: Tensor,
        rows: Tensor,
        forms: Mapping[str, Tensor | str],
        learned_variance: bool,
        undefined: str | None,
        alphas_cumprod: Tensor | None,
        name: str,
        device: torch.device,
    ) -> StepTable:
        self.name = name
        self.undefined = undefined
        self.alphas_cumprod = alphas_cumprod
        self.device = device
        self.rows = rows
        self.timesteps = timesteps.to(device)
        self.learned_variance = learned_variance
        self._forms = forms
        # Host knowledge, so that no step has to ask the device.
        self.host_timesteps: tuple[int, ...] = tuple(timesteps.tolist())
        self.adds_noise: tuple[bool, ...] = tuple((rows[:, ROW_COLUMNS.index("out_noise")] != 0).tolist())
        self.undefined_rows = frozenset((~_finite_rows(rows)).nonzero().flatten().tolist())
        self.adds_noise_anywhere = any(self.adds_noise)
        self.scales_inputs = bool((rows[:, _IN_SCALE] != 1).any())
        self.takes_predictions = bool(
            (rows[:, [ROW_COLUMNS.index("x0_pred"), ROW_COLUMNS.index("out_pred")]] != 0).any()
        )
        self._device_rows = {
            (form, dtype): values.to(device, dtype)
            for form, values in [(None, rows), *forms.items()]
            if isinstance(values, Tensor)
            for dtype in ((torch.float32, torch.float64) if device.type == "cpu" else (torch.float32,))
        }
        return self

    def __len__(self) -> int:
        return len(self.host_timesteps)

    def __repr__(self) -> str:
        ends = f"{self.host_timesteps[0]} .. {self.host_timesteps[-1]}"
        return f"StepTable({self.name}, {len(self)} steps, timesteps {ends}, device={self.device})"

    def __getitem__(self, steps: slice) -> StepTable:
        if not isinstance(steps, slice):  # also ends the iteration that __getitem__ would otherwise invite
            raise TypeError(f"table: expected a slice such as table[k:], got {steps!r}")
        start, stop, stride = steps.indices(len(self))
        if stride != 1:
            raise ValueError(f"table: a row leads to the next timestep, so slices have step 1; got {steps!r}")
        if start >= stop:
            raise ValueError(f"table: the slice {start}:{stop} of {len(self)} steps is empty")
        kept = slice(start, stop)
        forms = {form: v if isinstance(v, str) else v[kept] for form, v in self._forms.items()}
        return StepTable.__new__(StepTable)._assign(
            torch.tensor(self.host_timesteps[kept], device="cpu"),  # not from the device: nothing waits
            self.rows[kept],
            forms,
            self.learned_variance,
            self.undefined,
            self.alphas_cumprod[kept] if self.alphas_cumprod is not None else None,
            self.name,
            self.device,
        )

    def to(self, device: torch.device | str) -> StepTable:
        """The same table with its timesteps and rows on ``device`` (itself, if it is there already)."""
        target = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if target == self.device:
            return self
        return StepTable.__new__(StepTable)._assign(
            torch.tensor(self.host_timesteps, device="cpu"),
            self.rows,
            self._forms,
            self.learned_variance,
            self.undefined,
            self.alphas_cumprod,
            self.name,
            target,
        )

    def index(self, timestep: int) -> int:
        """The step at which the model is called with ``timestep``."""
        try:
            return self.host_timesteps.index(int(timestep))
        except ValueError:
            raise ValueError(
                f"timestep: expected one of the {len(self)} timesteps of {self!r}, got {timestep}"
            ) from None

    def coefficients(self, form: GradientForm | None = None) -> dict[str, Tensor]:
        """The rows by name, float64 on the host: each a tensor of shape ``(steps,)``."""
        rows = self.rows if form is None else self._form(form)
        return dict(zip(ROW_COLUMNS, rows.unbind(1), strict=True))

    @property
    def unused_forms(self) -> dict[str, str]:
        """Forms in which a gradient has no use here, with the reason."""
        return {form: reason for form, reason in self._forms.items() if isinstance(reason, str)}

    def device_rows(self, form: GradientForm | None, dtype: torch.dtype) -> Tensor:
        """The rows that a kernel reads: shape ``(steps, len(ROW_COLUMNS))``, on the table's device.

        ``form`` says how a gradient enters (``None``: there is no gradient); ``dtype`` is float32 or float64, the
        precision of the arithmetic.
        """
        rows = self._device_rows.get((form, dtype))
        return rows if rows is not None else self._form(form).to(self.device, dtype)

    def _form(self, form: str | None) -> Tensor:
        values = self._forms.get(form) if form is not None else self.rows
        if isinstance(values, Tensor):
            return values
        if form not in get_args(GradientForm):
            raise ValueError(f"form: expected one of {get_args(GradientForm)}, got {form!r}")
        raise ValueError(f"gradient: the form {form!r} has no use in {self.name}: {values or 'it takes no gradient'}")


def _set_columns(rows: Tensor, columns: Mapping[str, Tensor], allowed: tuple[str, ...]) -> None:
    for column, values in columns.items():
        if column not in allowed:
            raise ValueError(f"columns: expected some of {allowed}, got {column!r}")
        rows[:, ROW_COLUMNS.index(column)] = values


def _finite_rows(rows: Tensor) -> Tensor:
    """Which rows are finite; an infinite clip is none."""
    others = [i for i in range(len(ROW_COLUMNS)) if i != _CLIP]
    finite: Tensor = rows[:, others].isfinite().all(1) & ~rows[:, _CLIP].isnan()
    return finite
