"""Scale the model's inputs of a scheduler of unscaled samples by the factor that its table knows."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..solvers import StepTable
from .counted_step import CountedStep
from .lazy_tensor import plain


class ScaledInputs(CountedStep):
    """Mix this into a scheduler of unscaled samples: diffusers makes the factor of its inputs anew at each call."""

    _divides: ClassVar[bool] = True
    """Whether diffusers divides by ``sqrt(sigma^2 + sigma_data^2)``, and does not multiply by the inverse."""

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return what diffusers' own returns, up to the last digit; it is asked itself at a loop's first call."""
        loop = self._counted
        if loop is None or loop.table is None or not (loop.is_next(self._step_index) and loop.is_current(self)):
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
        scale = loop.made.in_scales[loop.following - loop.begin]
        scaled = plain(sample) / scale if self._divides else plain(sample) * scale
        return scaled

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
