"""diffusers' scheduler of the score SDE with the fused step: the next sample and its mean in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from torch import Tensor

from ..solvers import StepTable
from ..solvers._variance_exploding import score_rows
from ..step.guided_step import guided_step
from ..step.memory import dense, empty_like
from .fitted import SHAPES, fitted_predictions, refusal_of
from .guidance_arguments import Scale, combined, guidance_of
from .lazy_guidance import resolved
from .lazy_tensor import plain
from .noise import Generators, noise_of
from .scheduler_step import LEFT, SchedulerStep, count, count_fused
from .written_tables import state_of

__all__ = ["ScoreSdeVeScheduler"]


class _Rows(NamedTuple):
    """A scheduler's rows by device, as long as it has these very sigmas."""

    sigmas: Tensor
    version: Any
    rises: list[bool]
    """Whether there is less noise before each sigma, and none before the first."""
    by_device: dict[torch.device, StepTable]


class ScoreSdeVeScheduler(SchedulerStep, diffusers.ScoreSdeVeScheduler):  # type: ignore[metaclass]
    """``diffusers.ScoreSdeVeScheduler`` with the fused prediction; corrections are diffusers' own."""

    discrete_sigmas: Tensor
    _rows: _Rows | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the rows out of copies: they only save time."""
        return {name: value for name, value in super().__getstate__().items() if name != "_rows"}

    def _current_rows(self) -> _Rows:
        rows, sigmas = self._rows, self.discrete_sigmas
        if rows is None or rows.sigmas is not sigmas or rows.version != state_of(sigmas):
            squares = sigmas.detach().to("cpu", torch.float64).square()
            rises = squares.diff(prepend=squares.new_zeros(1)) >= 0
            rows = self._rows = _Rows(sigmas, state_of(sigmas), rises.tolist(), {})
        return rows

    def _table(self, device: torch.device) -> StepTable:
        rows, sigmas = self._current_rows(), self.discrete_sigmas
        if device not in rows.by_device:
            rows.by_device[device] = score_rows(sigmas.detach().to("cpu", torch.float64)).to(device)
        return rows.by_device[device]

    def _row(self, timestep: Any) -> int | None:
        """Return the row of a timestep; ``None``: the host does not know it, or there is none."""
        if isinstance(timestep, Tensor) and not (timestep.dim() == 0 and timestep.is_cpu):
            return None
        if self.timesteps is None or not isinstance(timestep, (int, float, Tensor)):
            return None
        place = int(torch.as_tensor(timestep, dtype=torch.float32, device="cpu") * (len(self.timesteps) - 1))
        return place if 0 <= place < len(self.discrete_sigmas) else None

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Predict a sample of less noise: diffusers' own, and guidance with it, as in ``DDIMScheduler.step``.

        The sample and its mean are made in one pass.
        """
        row = self._row(timestep)
        why_not = "a timestep that the host does not know" if row is None else None
        if row is not None and not self._current_rows().rises[row]:
            why_not = "sigmas that fall"  # where diffusers takes the root of a negative variance
        output, scale = resolved(model_output, sample, guidance_scale)
        x = plain(sample)
        guidance = guidance_of(output, x, scale, None, 1.0, "epsilon")
        refusal = why_not or refusal_of(x, output, None, None)
        fitted = None
        if refusal is None:
            x = dense(x)
            fitted = fitted_predictions(output, x, guidance, False)
        if fitted is None or row is None:
            count(self, LEFT + (refusal or SHAPES))
            output = combined(self, model_output, sample, guidance_scale, None)
            return super().step_pred(output, timestep, plain(sample), generator, return_dict)  # type: ignore[misc]
        drawn, sigmas = x.dtype, self.discrete_sigmas.dtype  # which are no numbers to torch's promotion
        dtype = torch.promote_types(torch.promote_types(drawn, output.dtype), sigmas)
        if dtype == torch.float64:
            x = x.double()
        table = self._table(x.device)
        noise, source = noise_of(generator, x, drawn, adds=table.adds_noise[row], in_step=drawn == x.dtype)
        mean, out = empty_like(x, dtype), empty_like(x, dtype)
        guided_step(table, row, x, fitted[0], guidance, noise=noise, generator=source, original=mean, out=out)
        count_fused(self, guidance, is_last=row == 0)
        return SdeVeOutput(prev_sample=out, prev_sample_mean=mean) if return_dict else (out, mean)
