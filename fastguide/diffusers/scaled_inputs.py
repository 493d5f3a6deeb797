"""Scale the model's inputs of a scheduler of unscaled samples by the factor that its table knows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .counted_step import CountedStep
from .lazy_tensor import plain


class ScaledInputs(CountedStep):
    """Mix this into a scheduler whose model gets ``in_scale * x``: diffusers makes the factor anew at each call."""

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return what diffusers' own returns, up to the last digit; it is asked itself at a loop's first call."""
        loop = self._counted
        if loop is None or loop.table is None or self._step_index != loop.following or not loop.is_current(self):
            theirs: Any = super().scale_model_input  # type: ignore[misc]
            scaled: Tensor = theirs(sample, timestep)
            return scaled
        if "is_scale_input_called" in self.__dict__:
            self.is_scale_input_called = True
        if sample is loop.returned and loop.state is None:
            if loop.staged is not None and sample._version == loop.version:
                return loop.staged
            loop.made.stage()
        scaled = plain(sample) * loop.made.in_scales[loop.following - loop.begin]
        return scaled
