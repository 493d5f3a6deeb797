"""Say where the noise of a scheduler's step comes from, as diffusers draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solvers import StepTable
from ..step.memory import in_layout_of
from ..step.noise import DeviceGenerator
from ..step.torch_normals import pass_over
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

    def source_again(self, loop: CountedLoop, like: Like, sample: Tensor) -> Any:
        """Return what draws in a loop's next step, which is like an earlier one.

        ``None``: nothing does; ``APART``: ``draw_apart`` does, what no step uses; ``REPLANNED``: this needs a plan.
        """
        if self.noise is not None or self.path is not None:
            return REPLANNED
        call, draws = loop.following - loop.begin, self.draws
        if draws is not True and not self.draws_at(like.table, call):
            return None
        generator = self.generator
        if generator is None:
            generator = torch.default_generator
        elif type(generator) is not torch.Generator:
            return REPLANNED
        if not like.table.adds_noise[call]:
            return APART if sample.is_cpu and generator.device.type == "cpu" else REPLANNED
        rule, dtype = self.dtype, sample.dtype
        drawn = like.dtype if rule == "model" else like.dtypes.of_noise(rule)
        given = dtype if loop.state is None else loop.state.dtype
        return generator if drawn is dtype and (given is dtype or _draws_alike(dtype, given, sample)) else REPLANNED

    def draw_apart(self, dtypes: Dtypes, sample: Tensor) -> None:
        """Move the generator on, as diffusers' draw does, where a call's row adds no noise."""
        generator = torch.default_generator if self.generator is None else self.generator
        assert isinstance(generator, torch.Generator)
        pass_over(sample.shape, dtypes.of_noise(self.dtype), generator)


APART, REPLANNED = "apart", "replanned"
"""In the place of a generator: the noise of a call is drawn, and not used; it is not known without a plan."""


def _draws_alike(dtype: torch.dtype, given: torch.dtype, sample: Tensor) -> bool:
    """Tell whether noise that is drawn in one dtype is that of another, rounded, and leaves the generator alike.

    float64 has another stream. On the host, torch draws 16 values at a time, and the rest in another way, by dtype.
    """
    if dtype == given:
        return True
    return torch.float64 not in (dtype, given) and (sample.is_cuda or sample.numel() % 16 == 0)
