"""Say where the noise of a scheduler's step comes from, as diffusers draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solvers import StepTable
from ..step.memory import in_layout_of
from ..step.noise import DeviceGenerator
from .counted_loop import CountedLoop, Like
from .dtypes import Dtypes, NoiseRule
from .lazy_tensor import plain
from .noise import Generators, noise_of


class Drawing(NamedTuple):
    """Where a step's noise comes from; a step without one is deterministic."""

    generator: Generators
    draws: Callable[[StepTable, int], bool] | bool = True
    """Whether diffusers draws noise at a call of the loop's table, also where it does not use it."""
    dtype: NoiseRule = "model"
    """In which it draws."""
    noise: Tensor | None = None
    """Standard normal values in the place of a generator's."""
    path: Callable[[Tensor, torch.dtype], Tensor | None] | None = None
    """Makes such values of the sample and the model's dtype, where the step is made: for a path of Brownian motion."""

    def draws_at(self, table: StepTable, call: int) -> bool:
        """Tell whether diffusers draws at a call."""
        return self.draws if isinstance(self.draws, bool) else self.draws(table, call)

    def drawn(
        self, table: StepTable, call: int, sample: Tensor, given: torch.dtype, dtypes: Dtypes
    ) -> tuple[Tensor | None, torch.Generator | DeviceGenerator | None]:
        """Return a call's noise, or the generator that draws it in the step, for a sample that is ``given``'s dtype."""
        noise = self.noise if self.path is None else self.path(sample, dtypes.model)
        if noise is not None:
            return in_layout_of(sample, plain(noise)), None
        if self.path is not None or not self.draws_at(table, call):
            return None, None
        dtype, adds = dtypes.of_noise(self.dtype), table.adds_noise[call]
        in_step = _draws_alike(dtype, given, sample)
        return noise_of(self.generator, sample, dtype, adds=adds, in_step=in_step)

    def source_again(self, loop: CountedLoop, like: Like, index: int | None, sample: Tensor) -> Any:
        """Return what draws in a step like an earlier one.

        ``None``: nothing does; ``APART``: ``draw_apart`` does, what no step uses; ``False``: this needs a plan.
        """
        if index is None or index != loop.following or self.noise is not None or self.path is not None:
            return False
        call = index - loop.begin
        if not self.draws_at(like.table, call):
            return None
        dtype = like.dtypes.of_noise(self.dtype)
        given = sample.dtype if loop.state is None else loop.state.dtype
        generator = torch.default_generator if self.generator is None else self.generator
        if type(generator) is not torch.Generator:
            return False
        if not like.table.adds_noise[call]:
            return APART if sample.is_cpu and generator.device.type == "cpu" else False
        return generator if dtype == sample.dtype and _draws_alike(dtype, given, sample) else False

    def draw_apart(self, dtypes: Dtypes, sample: Tensor) -> None:
        """Draw, as diffusers does, where a call's row adds no noise."""
        noise_of(self.generator, sample, dtypes.of_noise(self.dtype), adds=False)


APART = True
"""In the place of a generator: the noise of a call is drawn, and not used."""


def _draws_alike(dtype: torch.dtype, given: torch.dtype, sample: Tensor) -> bool:
    """Tell whether noise that is drawn in one dtype is that of another, rounded, and leaves the generator alike.

    float64 has another stream. On the host, torch draws 16 values at a time, and the rest in another way, by dtype.
    """
    if dtype == given:
        return True
    return torch.float64 not in (dtype, given) and (sample.is_cuda or sample.numel() % 16 == 0)
