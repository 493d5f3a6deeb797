"""Where the steps' noise comes from: from nowhere, torch's generators, torch's stream in the kernel, or seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..solvers.table import StepTable
from ..step.backends.registry import Backend
from ..step.checks import check_device_generator
from ..step.draw import draw_noise
from ..step.memory import counted_layout, empty_like
from ..step.noise import NO_GRID, DeviceGenerator, draws_in_kernel, seeds_tensor, torch_grid

Generators: TypeAlias = "torch.Generator | DeviceGenerator | Sequence[torch.Generator]"


class NoiseBuffers:
    """Hold what a step reads its noise from: values, seeds, or the state of torch's stream; at most one of them."""

    def __init__(self, source: str, sample: Tensor) -> None:
        """Make the buffers for a source, one of ``fastguide.step.noise.SOURCES``."""
        device, batch = sample.device, sample.shape[0]
        self.values = empty_like(sample).zero_() if source == "given" else None
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=device) if source == "portable" else None
        self.generator = DeviceGenerator(0, device=device) if source == "torch_stream" else None
        self.grid = NO_GRID if self.generator is None else torch_grid(device, sample.numel())
        self._sample = sample

    def draw(self, samples: slice, generator: torch.Generator) -> None:
        """Fill the values of some samples with what ``torch.randn`` draws for them."""
        assert self.values is not None
        values = self.values[samples]
        drawn = draw_noise(generator, self._sample[samples], values)
        if drawn is not values:
            values.copy_(drawn)


class NoNoise:
    """The noise source of a table that adds no noise, and the base of the others."""

    source = "none"
    """One of ``fastguide.step.noise.SOURCES``."""
    between_steps = False
    """Whether the host has to act between two steps, so that they cannot be one graph."""
    per_sample = True
    """Whether each sample's noise depends on nothing but its own source."""

    def of_samples(self, samples: slice) -> NoNoise:
        """Return the source of some samples alone."""
        return self

    def origin(self) -> object:
        """Return what all noise to come follows from; waits for the device if it is there."""
        return None

    def load(self, buffers: NoiseBuffers, samples: slice) -> None:
        """Prepare the buffers for the first step of some samples."""

    def before_step(self, buffers: NoiseBuffers) -> None:
        """Prepare the buffers for the next step, one that adds noise."""

    def after_step(self, buffers: NoiseBuffers) -> None:
        """Leave the caller's generator as torch would after this step."""

    def end(self, buffers: NoiseBuffers) -> None:
        """Give the caller back what the steps used, even after an exception."""


class TorchNoise(NoNoise):
    """Draw each step's noise with torch, before the step: from one generator, or from one for each sample."""

    source = "given"
    between_steps = True

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self.per_sample = len(generators) > 1

    def of_samples(self, samples: slice) -> TorchNoise:
        """Return the source of some samples alone: their own generators, or the one that all have."""
        return TorchNoise(self._generators[samples]) if self.per_sample else self

    def origin(self) -> object:
        """Return the states of the generators."""
        return [generator.get_state().tolist() for generator in self._generators]

    def before_step(self, buffers: NoiseBuffers) -> None:
        """Draw the step's noise."""
        if len(self._generators) == 1:
            buffers.draw(slice(None), self._generators[0])
            return
        for sample, generator in enumerate(self._generators):
            buffers.draw(slice(sample, sample + 1), generator)


class TorchStreamNoise(NoNoise):
    """Let the kernel draw from torch's CUDA stream, as one generator's ``torch.randn`` would.

    If someone else draws from that generator between two steps, the next step continues after that.
    """

    source = "torch_stream"
    per_sample = False

    def __init__(self, generator: torch.Generator | DeviceGenerator) -> None:
        self._generator = generator
        self._position: tuple[int, int] | None = None  # of the caller's generator, after our last step

    def origin(self) -> object:
        """Return seed and offset."""
        generator = self._generator
        return generator.state.tolist() if isinstance(generator, DeviceGenerator) else _position(generator)

    def load(self, buffers: NoiseBuffers, samples: slice) -> None:
        """Copy the generator's position to the buffer."""
        assert buffers.generator is not None
        if isinstance(self._generator, DeviceGenerator):
            buffers.generator.state.copy_(self._generator.state)
        else:
            self._position = _position(self._generator)
            buffers.generator.set(*self._position)

    def before_step(self, buffers: NoiseBuffers) -> None:
        """Follow the generator, if someone else has drawn from it or seeded it."""
        if isinstance(self._generator, torch.Generator) and _position(self._generator) != self._position:
            self.load(buffers, slice(None))

    def after_step(self, buffers: NoiseBuffers) -> None:
        """Move the generator on, as torch would; one on the device is moved on by the kernel."""
        if isinstance(self._generator, torch.Generator):
            self._generator.set_offset(self._generator.get_offset() + buffers.grid.increment)
            self._position = _position(self._generator)

    def end(self, buffers: NoiseBuffers) -> None:
        """Give a generator on the device its new state."""
        if isinstance(self._generator, DeviceGenerator) and buffers.generator is not None:
            self._generator.state.copy_(buffers.generator.state)


class PortableNoise(NoNoise):
    """Let the kernel draw from the portable stream, by each sample's seed."""

    source = "portable"

    def __init__(self, seeds: Tensor) -> None:
        self._seeds = seeds

    def of_samples(self, samples: slice) -> PortableNoise:
        """Return the source of some samples alone: their seeds."""
        return PortableNoise(self._seeds[samples])

    def origin(self) -> object:
        """Return the seeds."""
        return self._seeds.tolist()

    def load(self, buffers: NoiseBuffers, samples: slice) -> None:
        """Copy the seeds."""
        assert buffers.seeds is not None
        buffers.seeds[samples].copy_(self._seeds)


def noise_source(
    table: StepTable,
    x_T: Tensor,
    generator: Generators | None,
    seeds: Sequence[int] | Tensor | None,
    backend: Backend,
) -> NoNoise:
    """Return the source for a call's arguments; refuse them if they do not fit the samples. Nothing is drawn."""
    batch = x_T.shape[0]
    if seeds is not None:
        if generator is not None:
            raise ValueError("seeds: expected either seeds or a generator, got both")
        seeds = seeds_tensor(seeds, x_T.device)
        if seeds.shape != (batch,):
            raise ValueError(f"seeds: expected {batch}, one for each sample, got shape {tuple(seeds.shape)}")
    generators = _as_list(generator, batch)
    if not table.adds_noise_anywhere:
        return NoNoise()
    if seeds is not None:
        if not counted_layout(x_T):
            raise ValueError(f"x_T: seeds expect it contiguous or channels_last, got strides {x_T.stride()}")
        return PortableNoise(seeds)
    if isinstance(generator, DeviceGenerator):
        check_device_generator(backend.name, backend.torch_stream, x_T, None)
        return TorchStreamNoise(generator)
    generators = generators or [_default_generator(x_T.device)]
    if backend.torch_stream and len(generators) == 1 and draws_in_kernel(generators[0], x_T):
        return TorchStreamNoise(generators[0])
    return TorchNoise(generators)


def _as_list(generator: Generators | None, batch: int) -> list[torch.Generator]:
    """Return torch's generators, one for all samples or one for each; refuse anything else."""
    if generator is None or isinstance(generator, DeviceGenerator):
        return []
    if not isinstance(generator, (list, tuple)):
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: expected a torch.Generator or a DeviceGenerator, got {type(generator).__name__}"
            )
        return [generator]
    for one in generator:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator: expected torch.Generators, one for each sample, got {type(one).__name__}")
    if len(generator) not in (1, batch):
        raise ValueError(f"generator: expected 1 or {batch}, one for each sample, got {len(generator)}")
    return list(generator)


def _position(generator: torch.Generator) -> tuple[int, int]:
    return generator.initial_seed(), generator.get_offset()


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    if device.type != "cpu":
        raise ValueError(
            f"generator: expected one for {device.type}, as torch has no global one for that device, got None"
        )
    return torch.default_generator
