"""Scale the model's inputs of a scheduler of unscaled samples by the factor that its table knows."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..solvers import StepTable
from .counted_loop import CountedLoop
from .counted_step import CountedStep, index_of
from .host_tables import host_tables
from .lazy_tensor import plain


class ScaledInputs(CountedStep):
    """Mix this into a scheduler of unscaled samples: diffusers makes the factor of its inputs anew at each call."""

    _divides: ClassVar[bool] = True
    """Whether diffusers divides by ``sqrt(sigma^2 + sigma_data^2)``, and does not multiply by the inverse."""

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return what diffusers' own returns, up to the last digit; it is asked itself where a loop is a new one."""
        loop = self._counted
        if loop is None or loop.table is None or not (loop.is_next(self._step_index) and loop.is_current(self)):
            loop = self._ended_loop_again(timestep)
        if loop is None:
            theirs: Any = super().scale_model_input  # type: ignore[misc]
            scaled: Tensor = theirs(sample, timestep)
            return scaled
        if "is_scale_input_called" in self.__dict__:
            self.is_scale_input_called = True
        if sample is loop.returned and (loop.state is None or loop.state.dtype == sample.dtype):
            staged, loop.staged = loop.staged, None  # what is handed out may be written to
            if staged is not None and sample._version == loop.version:
                return staged
            loop.stage()
        scale = loop.made.in_scales[0 if loop.is_over else loop.following - loop.begin]
        scaled = plain(sample) / scale if self._divides else plain(sample) * scale
        return scaled

    def _ended_loop_again(self, timestep: float | Tensor) -> CountedLoop | None:
        """Return the loop that has come to its end, if a first call scales its input as that one's did."""
        ended = self._ended
        is_another = self._counted is not None and self._counted is not ended
        if ended is None or is_another or self._copied_loop is not None:
            return None
        return ended if ended.scales_like(host_tables(self), index_of(self, timestep)) else None

    def _in_scales(self, table: StepTable) -> list[float]:
        assert table.levels is not None
        sigma = table.levels.sigma.float()  # in which diffusers computes them
        divisors = (sigma**2 + self._sigma_data**2) ** 0.5
        scales: list[float] = (divisors if self._divides else 1 / divisors).tolist()
        return scales

    @property
    def _sigma_data(self) -> float:
        """The standard deviation of the data, in the preconditioning of EDM."""
        return float(self._internal_dict.get("sigma_data", 1.0))
