"""The step table: one row of coefficients a model call, computed in float64, held on the device in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from .._token import Token
from ..schedules.levels import Levels
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
    "out_anchor",  # x' += out_anchor * xa + out_hist_0 * H_0 + ..., of the history's slots; xa is x, or what x was
    "out_hist_0",  # before the caller changed it
    "out_hist_1",
    "out_hist_2",
    "hist_slot",  # H[hist_slot] = hist_x0 * x0 + hist_sample * x, after the step has read it; -1: nothing is written
    "hist_x0",
    "hist_sample",
    "x0_noise",  # x0_noise * z is added to the x0 that is returned, and not to the one that the step goes on with
    "quantile",  # unless 0: x0 is divided by this quantile of |x0| in a sample, limited to [1, clip]; then clip is 1
)
"""The names of a row's coefficients, in the order in which every kernel reads them (csrc/maths/step.h repeats it)."""

_GRADIENT_COLUMNS = ("x0_grad", "out_grad", "out_var_grad")
_QUANTILE = ROW_COLUMNS.index("quantile")
_CLIP, _IN_SCALE, _IN_TIMESTEP = (ROW_COLUMNS.index(name) for name in ("clip", "in_scale", "in_timestep"))
_SLOT, _ANCHOR = ROW_COLUMNS.index("hist_slot"), ROW_COLUMNS.index("out_anchor")
_OUT_HISTORY = tuple(ROW_COLUMNS.index(f"out_hist_{slot}") for slot in range(3))
_FROM_X0 = tuple(ROW_COLUMNS.index(name) for name in ("out_x0", "hist_x0"))
MAX_SLOTS = len(_OUT_HISTORY)
"""The most slots of a history."""


@dataclass(eq=False, repr=False)
class StepTable:
    """All model calls of a solver: their timesteps and their rows. Solvers make one; it is never changed in place.

    ``len(table)`` is the number of model calls and rows, ``table.steps`` the solver's number of steps, which is smaller
    where a step takes two calls. A slice of consecutive calls is a table: ``table[k:]`` starts image-to-image at call
    k. Make one with a solver such as ``ddim``, or of columns with ``StepTable.from_columns``.
    """

    name: str
    """For messages."""
    timesteps: Tensor
    """The timestep of each model call, shape (calls,), on the table's device: int64, or floating-point."""
    rows: Tensor
    """The rows without any gradient: float64 on the host, of shape (calls, len(ROW_COLUMNS))."""
    forms: Mapping[str, Tensor | str]
    """The rows with a gradient in each form, or the reason why it has no use."""
    learned_variance: bool = False
    """Whether a step takes the model's variance output."""
    undefined: str | None = None
    """Why some rows are infinite or NaN; steps at those are refused as far as the host knows the index."""
    levels: Levels | None = None
    """The level of each model call's sample, for image-to-image; ``None``: not known."""
    first_in_scale: float = 1.0
    """What the first sample is multiplied by to be the model's input; a row's ``in_scale`` is for the call after it."""
    init_noise_sigma: float = 1.0
    """The standard deviation of the first sample where it is noise alone: ``Sampler`` multiplies ``x_T`` by it. 1 in a
    slice that begins later: that takes a sample at the level of its first call."""
    completes_step: tuple[bool, ...] = ()
    """For each model call, whether it completes a step of the solver; by default, each does."""
    maker: Callable[[int], StepTable] | None = None
    """Makes the table of the steps from a later one on, where that is no slice; ``None``: nobody knows how."""
    begin: int = 0
    """How many of its solver's steps were left out before it."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    # What the host knows of the rows, so that no step has to ask the device.
    host_timesteps: tuple[float, ...] = field(init=False)
    adds_noise: tuple[bool, ...] = field(init=False)
    """For each model call, whether its step adds noise; the last one of a stochastic solver mostly adds none."""
    adds_noise_anywhere: bool = field(init=False)
    undefined_rows: frozenset[int] = field(init=False)
    takes_predictions: bool = field(init=False)
    thresholds: bool = field(init=False)
    """Whether any step divides x_0 by a threshold."""
    clips: bool = field(init=False)
    """Whether any row clips x_0."""
    history_slots: int = field(init=False)
    """How many tensors of the sample's shape earlier calls leave for later ones: 0 to 3."""
    in_scales: tuple[float, ...] = field(init=False)
    """What the sample is multiplied by to be the input of each model call, and of one more after the last."""
    _token: object = field(init=False)
    """Stands for this table where steps are remembered."""
    scales_inputs: bool = field(init=False)
    """Whether any call's model input is the sample times a factor other than 1."""

    def __post_init__(self) -> None:
        self._token = Token()
        on_host = self.timesteps.to("cpu")
        self.host_timesteps = tuple(on_host.tolist())
        self.timesteps = on_host.to(self.device)
        self.completes_step = self.completes_step or (True,) * len(self.host_timesteps)
        self.adds_noise = tuple((self.rows[:, ROW_COLUMNS.index("out_noise")] != 0).tolist())
        self.adds_noise_anywhere = any(self.adds_noise)
        self.clips = bool(self.rows[:, _CLIP].isfinite().any())
        self.undefined_rows = frozenset((~_finite_rows(self.rows)).nonzero().flatten().tolist())
        self.thresholds = bool((self.rows[:, _QUANTILE] > 0).any())
        self.history_slots = _slots(self.rows)
        self.in_scales = (self.first_in_scale, *self.rows[:, _IN_SCALE].tolist())
        self.scales_inputs = any(scale != 1 for scale in self.in_scales)
        of_prediction = [ROW_COLUMNS.index(name) for name in ("x0_pred", "out_pred")]
        self.takes_predictions = bool((self.rows[:, of_prediction] != 0).any())
        dtypes = (torch.float32, torch.float64) if self.device.type == "cpu" else (torch.float32,)
        with torch.inference_mode(False):  # or autograd could not keep what inference mode has copied to a device
            self._device_rows = {
                (form, dtype, anchored): (values if anchored else _without_anchor(values)).to(self.device, dtype)
                for form, values in [(None, self.rows), *self.forms.items()]
                if isinstance(values, Tensor)
                for dtype in dtypes
                for anchored in ((False, True) if bool((values[:, _ANCHOR] != 0).any()) else (False,))
            }

    @classmethod
    def from_columns(
        cls,
        timesteps: Tensor,
        columns: Mapping[str, Tensor],
        *,
        gradients: Mapping[str, Mapping[str, Tensor] | str] | None = None,
        learned_variance: bool = False,
        undefined: str | None = None,
        levels: Levels | None = None,
        first_in_scale: float = 1.0,
        init_noise_sigma: float = 1.0,
        completes_step: Sequence[bool] | None = None,
        name: str = "step table",
    ) -> StepTable:
        """Return a table of the columns that are not their defaults.

        Args:
            timesteps: int64 or floating-point, of shape ``(calls,)``.
            columns: names of ``ROW_COLUMNS`` to float64 tensors of shape ``(calls,)``; absent: 0, no clip, in_scale 1,
                in_timestep the timestep of the next row, hist_slot -1.
            gradients: each ``GradientForm`` to its gradient columns, or to the reason why it has none.
            learned_variance: whether a step takes the model's variance output.
            undefined: why some rows may be infinite; ``None``: all must be finite.
            levels: the level of each call's sample, two tensors of shape ``(calls,)``; ``None``: not known.
            first_in_scale: what the first sample is multiplied by to be the model's input.
            init_noise_sigma: the standard deviation of the first sample where it is noise alone, positive.
            completes_step: for each call, whether it completes a step of the solver; ``None``: each does.
            name: for messages.

        Raises:
            ValueError: a name or the timesteps are not as described, a clip is not positive, or a row is not finite.

        >>> double = torch.full((3,), 2.0, dtype=torch.float64)
        >>> StepTable.from_columns(torch.tensor([2, 1, 0]), {"out_sample": double}, name="doubling")
        StepTable(doubling, 3 steps, timesteps 2 .. 0, device=cpu)
        """
        _check_timesteps(timesteps)
        completes_step = (True,) * len(timesteps) if completes_step is None else tuple(completes_step)
        if len(completes_step) != len(timesteps):
            raise ValueError(f"completes_step: expected {len(timesteps)}, one a call, got {len(completes_step)}")
        if not 0 < init_noise_sigma < math.inf:
            raise ValueError(f"init_noise_sigma: expected a positive number, got {init_noise_sigma!r}")
        if levels is not None and {level.shape for level in levels} != {timesteps.shape}:
            shapes = [tuple(level.shape) for level in levels]
            raise ValueError(f"levels: expected two of shape ({len(timesteps)},), one a call, got {shapes}")
        rows = torch.zeros(len(timesteps), len(ROW_COLUMNS), dtype=torch.float64, device="cpu")
        rows[:, _CLIP] = torch.inf
        rows[:, _IN_SCALE] = 1.0
        timesteps = timesteps.detach().clone()  # a table is never changed
        rows[:-1, _IN_TIMESTEP] = timesteps[1:].to(rows.dtype)
        rows[:, _SLOT] = -1.0
        _set_columns(rows, columns, ROW_COLUMNS)
        if not bool((rows[:, _CLIP] > 0).all()):
            raise ValueError("columns: expected positive values in 'clip'")
        if not bool(((rows[:, _QUANTILE] >= 0) & (rows[:, _QUANTILE] <= 1)).all()):
            raise ValueError("columns: expected values from 0 to 1 in 'quantile'")
        if bool(((rows[:, _QUANTILE] > 0) & (rows[:, _CLIP] < 1)).any()):
            raise ValueError(
                "columns: expected a 'clip' of at least 1, the largest threshold, where there is a 'quantile'"
            )
        if not set(rows[:, _SLOT].tolist()) <= {-1.0, *map(float, range(MAX_SLOTS))}:
            raise ValueError(f"columns: expected -1 or a slot from 0 to {MAX_SLOTS - 1} in 'hist_slot'")
        forms = {form: _with_gradient(rows, form, gradient) for form, gradient in (gradients or {}).items()}
        if undefined is None:
            finite = [_finite_rows(values) for values in (rows, *forms.values()) if isinstance(values, Tensor)]
            bad = timesteps[~torch.stack(finite).all(0)]
            if len(bad):
                raise ValueError(f"columns: expected finite rows, got others at timestep {bad[0].item()}")
        return cls(
            name,
            timesteps,
            rows,
            forms,
            learned_variance,
            undefined,
            levels,
            float(first_in_scale),
            float(init_noise_sigma),
            completes_step,
        )

    @property
    def steps(self) -> int:
        """The solver's number of steps."""
        return sum(self.completes_step)

    def __len__(self) -> int:
        return len(self.host_timesteps)

    def __repr__(self) -> str:
        calls = "" if self.steps == len(self) else f" in {len(self)} calls"
        ends = f"{self.host_timesteps[0]} .. {self.host_timesteps[-1]}"
        return f"StepTable({self.name}, {self.steps} steps{calls}, timesteps {ends}, device={self.device})"

    def __getitem__(self, calls: slice) -> StepTable:
        if not isinstance(calls, slice):  # also ends the iteration that __getitem__ would otherwise invite
            raise TypeError(f"table: expected a slice such as table[k:], got {calls!r}")
        start, stop, stride = calls.indices(len(self))
        if stride != 1:
            raise ValueError(f"table: a row leads to the next timestep, so slices have step 1; got {calls!r}")
        if start >= stop:
            raise ValueError(f"table: the slice {start}:{stop} of {len(self)} steps is empty")
        if start > 0 and self.history_slots:
            raise ValueError(
                f"table: {self.name} goes on from earlier calls, which a slice from {start} on would lack; expected "
                f"{self._said_to_begin(start)}"
            )
        part = slice(start, stop)
        return replace(
            self,
            timesteps=self.timesteps_on_host(part),
            rows=self.rows[part],
            forms={form: values if isinstance(values, str) else values[part] for form, values in self.forms.items()},
            levels=None if self.levels is None else self.levels.at(part),
            first_in_scale=self.in_scales[start],
            init_noise_sigma=self.init_noise_sigma if start == 0 else 1.0,
            completes_step=self.completes_step[part],
            maker=self.maker if stop - start == len(self) else None,
            begin=self.begin + sum(self.completes_step[:start]),
        )

    def _said_to_begin(self, call: int) -> str:
        step = self.begin + sum(self.completes_step[:call])
        if self.completes_step[call - 1]:
            return f"a table that its solver makes with begin={step}"
        return f"the begin= of a step, such as {step}, as call {call} is in the middle of one"

    def to(self, device: torch.device | str) -> StepTable:
        """Return the same table with its timesteps and rows on ``device`` (itself, if they are on it already)."""
        target = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        return self if target == self.device else replace(self, timesteps=self.timesteps_on_host(), device=target)

    def with_dynamic_thresholding(self, ratio: float = 0.995, sample_max_value: float = 1.0) -> StepTable:
        """Return a table whose steps divide x_0 by a threshold, and limit it to [-1, 1], instead of any clip.

        Large guidance scales drive x_0 beyond the range of images; clipping it there saturates them. A threshold is
        the quantile of its magnitudes over a sample, limited to ``[1, sample_max_value]`` (Saharia et al. 2022, section
        2.3, which has no upper limit). It is for models of pixels in [-1, 1].

        Args:
            ratio: which quantile, above 0 and at most 1.
            sample_max_value: the largest threshold, at least 1; at 1, as diffusers has it by default, no quantile has
                to be found: this is then the clip to [-1, 1].

        Raises:
            ValueError: a number is not as described, or no step of the table goes through x_0.

        >>> from fastguide import NoiseSchedule, ddim
        >>> ddim(NoiseSchedule.linear(), 20).with_dynamic_thresholding(0.995, sample_max_value=1.5).thresholds
        True
        """
        for name, value, low, high in (("ratio", ratio, 0, 1), ("sample_max_value", sample_max_value, 1, math.inf)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or not value:
                raise ValueError(f"{name}: expected a number from {low} to {high}, and not 0, got {value!r}")
        if not bool((self.rows[:, _FROM_X0] != 0).any()):
            raise ValueError(f"table: {self.name} does not go through x_0, so that a threshold of it has no use")

        def limited(rows: Tensor) -> Tensor:
            rows = rows.clone()
            rows[:, _CLIP], rows[:, _QUANTILE] = sample_max_value, ratio if sample_max_value > 1 else 0.0
            return rows

        forms = {form: rows if isinstance(rows, str) else limited(rows) for form, rows in self.forms.items()}
        maker = self.maker
        return replace(
            self,
            timesteps=self.timesteps_on_host(),
            rows=limited(self.rows),
            forms=forms,
            maker=maker and (lambda begin: maker(begin).with_dynamic_thresholding(ratio, sample_max_value)),
        )

    def timesteps_on_host(self, part: slice = slice(None)) -> Tensor:
        """Return the timesteps of some calls as a tensor on the host, without waiting for the device."""
        return torch.tensor(self.host_timesteps[part], dtype=self.timesteps.dtype, device="cpu")

    def index(self, timestep: float) -> int:
        """Return the model call at which the model sees this timestep."""
        try:
            return self.host_timesteps.index(float(timestep))
        except ValueError:
            raise ValueError(
                f"timestep: expected one of the {len(self)} timesteps of {self!r}, got {timestep}"
            ) from None

    def coefficients(self, form: GradientForm | None = None) -> dict[str, Tensor]:
        """Return the rows by column name, float64 on the host: each a tensor of shape ``(calls,)``."""
        rows = self.rows if form is None else self._form(form)
        return dict(zip(ROW_COLUMNS, rows.unbind(1), strict=True))

    @property
    def unused_forms(self) -> dict[str, str]:
        """Forms in which a gradient has no use, each with the reason."""
        return {form: reason for form, reason in self.forms.items() if isinstance(reason, str)}

    def device_rows(self, form: GradientForm | None, dtype: torch.dtype, anchored: bool = False) -> Tensor:
        """Return the rows that a kernel reads: shape ``(calls, len(ROW_COLUMNS))``, on the table's device.

        Args:
            form: how a gradient enters; ``None``: there is no gradient.
            dtype: float32 or float64, the precision of the arithmetic.
            anchored: whether the step has an anchor of its own; else the sample takes the anchor's part.
        """
        rows = self._device_rows.get((form, dtype, anchored))
        if rows is None:
            values = self._form(form)
            rows = (values if anchored else _without_anchor(values)).to(self.device, dtype)
        return rows

    def _form(self, form: str | None) -> Tensor:
        values = self.forms.get(form) if form is not None else self.rows
        if isinstance(values, Tensor):
            return values
        if form not in get_args(GradientForm):
            raise ValueError(f"form: expected one of {get_args(GradientForm)}, got {form!r}")
        raise ValueError(f"gradient: the form {form!r} has no use in {self.name}: {values or 'it takes no gradient'}")


def _check_timesteps(timesteps: Tensor) -> None:
    real = timesteps.is_floating_point()
    if timesteps.dim() != 1 or len(timesteps) == 0 or not (real or timesteps.dtype == torch.int64):
        raise ValueError(
            "timesteps: expected int64 or floating-point of shape (calls,), got "
            f"{timesteps.dtype} of {tuple(timesteps.shape)}"
        )
    if real and not bool(timesteps.isfinite().all()):
        raise ValueError(f"timesteps: expected finite values, got {timesteps.tolist()}")


def _with_gradient(rows: Tensor, form: str, gradient: Mapping[str, Tensor] | str) -> Tensor | str:
    if form not in get_args(GradientForm):
        raise ValueError(f"gradients: expected the forms {get_args(GradientForm)}, got {form!r}")
    if isinstance(gradient, str):
        return gradient
    rows = rows.clone()
    _set_columns(rows, gradient, _GRADIENT_COLUMNS)
    return rows


def _set_columns(rows: Tensor, columns: Mapping[str, Tensor], allowed: tuple[str, ...]) -> None:
    for column, values in columns.items():
        if column not in allowed:
            raise ValueError(f"columns: expected some of {allowed}, got {column!r}")
        if not isinstance(values, Tensor) or values.shape != rows.shape[:1]:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"columns: expected a tensor of shape ({len(rows)},) in {column!r}, got {got}")
        rows[:, ROW_COLUMNS.index(column)] = values


def _without_anchor(rows: Tensor) -> Tensor:
    """Return the rows of steps whose anchor is the sample."""
    rows = rows.clone()
    rows[:, ROW_COLUMNS.index("out_sample")] += rows[:, _ANCHOR]
    rows[:, _ANCHOR] = 0
    return rows


def _slots(rows: Tensor) -> int:
    """Return how many slots the rows read or write."""
    read = [slot + 1 for slot, column in enumerate(_OUT_HISTORY) if bool((rows[:, column] != 0).any())]
    return max(0, *read, int(rows[:, _SLOT].max()) + 1)


def _finite_rows(rows: Tensor) -> Tensor:
    """Tell which rows are finite; an infinite clip is no clip."""
    others = [i for i in range(len(ROW_COLUMNS)) if i != _CLIP]
    finite: Tensor = rows[:, others].isfinite().all(1) & ~rows[:, _CLIP].isnan()
    return finite
