"""Where a loop's noise comes from: torch's generators, inside the kernel or before it, or seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..solvers.table import StepTable
from ..step.backends.registry import backend_for
from ..step.checks import check_device_generator
from ..step.memory import counted_layout
from ..step.noise import DeviceGenerator, draws_in_kernel, seeds_tensor

Generators: TypeAlias = "torch.Generator | DeviceGenerator | Sequence[torch.Generator]"


class NoiseSource(NamedTuple):
    """One of ``fastguide.step.noise.SOURCES``, with what it draws from."""

    kind: str
    generators: tuple[torch.Generator | DeviceGenerator, ...] = ()
    """One for all samples, or one for each."""
    seeds: Tensor | None = None

    def begin(self, state: DeviceGenerator) -> None:
        """Let a loop's own generator go on where the caller's stands."""
        (generator,) = self.generators
        if isinstance(generator, DeviceGenerator):
            state.state.copy_(generator.state)
        else:
            state.set(generator.initial_seed(), generator.get_offset())

    def advance(self, increment: int) -> None:
        """Let the caller's generator stand where torch would have left it after a step with noise."""
        (generator,) = self.generators
        if isinstance(generator, torch.Generator):
            generator.set_offset(generator.get_offset() + increment)

    def stands(self) -> object:
        """Where the caller's generator stands: if others draw from it between two steps, the loop goes on behind."""
        (generator,) = self.generators
        return (generator.initial_seed(), generator.get_offset()) if isinstance(generator, torch.Generator) else None

    def end(self, state: DeviceGenerator) -> None:
        """Give a generator on the device its state back."""
        (generator,) = self.generators
        if isinstance(generator, DeviceGenerator):
            generator.state.copy_(state.state)


def noise_source(
    table: StepTable,
    x_T: Tensor,
    generator: Generators | None,
    seeds: Sequence[int] | Tensor | None,
    backend: str | None,
) -> NoiseSource:
    """The source for the arguments of a call; refused if they do not fit the samples."""
    batch = x_T.shape[0]
    if seeds is not None:
        if generator is not None:
            raise ValueError("seeds: expected either seeds or a generator, got both")
        seeds = seeds_tensor(seeds, x_T.device)
        if seeds.shape != (batch,):
            raise ValueError(f"seeds: expected {batch}, one for each sample, got shape {tuple(seeds.shape)}")
    several = isinstance(generator, (list, tuple))
    given = tuple(generator) if isinstance(generator, (list, tuple)) else (generator,)
    generators: list[torch.Generator | DeviceGenerator] = []
    for one in given:
        if one is None and not several:
            continue
        if not isinstance(one, torch.Generator) and (several or not isinstance(one, DeviceGenerator)):
            expected = "torch.Generators, one for each sample" if several else "a torch.Generator or a DeviceGenerator"
            raise TypeError(f"generator: expected {expected}, got {type(one).__name__}")
        generators.append(one)
    if several and len(generators) not in (1, batch):
        raise ValueError(f"generator: expected 1 or {batch}, one for each sample, got {len(generators)}")
    if not table.adds_noise_anywhere:
        return NoiseSource("none")
    if seeds is not None:
        if not counted_layout(x_T):
            raise ValueError(f"x_T: seeds expect it contiguous or channels_last, got strides {x_T.stride()}")
        return NoiseSource("portable", seeds=seeds)
    generators = generators or [_default_generator(x_T.device)]
    chosen = backend_for(backend, x_T.device.type)
    first = generators[0]
    if isinstance(first, DeviceGenerator):
        check_device_generator(chosen.name, chosen.torch_stream, x_T, None)
        return NoiseSource("torch_stream", (first,))
    in_kernel = chosen.torch_stream and len(generators) == 1 and draws_in_kernel(first, x_T)
    return NoiseSource("torch_stream" if in_kernel else "given", tuple(generators))


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    if device.type != "cpu":
        raise ValueError(f"generator: expected one for {device.type}, as torch names no global one there, got None")
    return torch.default_generator
