"""Choose where a step's noise comes from: it is what diffusers draws, and generators end where diffusers' do."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..step.memory import in_layout_of
from ..step.noise import DeviceGenerator
from ..step.torch_normals import normal_, pass_over

Generators = torch.Generator | list[torch.Generator] | DeviceGenerator | None


def noise_of(
    generator: Generators, sample: Tensor, dtype: torch.dtype, *, adds: bool, in_step: bool = True
) -> tuple[Tensor | None, torch.Generator | DeviceGenerator | None]:
    """Return a step's noise, or the generator that draws it in the step; at most one is not ``None``.

    Args:
        generator: as in diffusers, or a ``DeviceGenerator``.
        sample: x_t.
        dtype: of the model's output, in which diffusers draws.
        adds: whether the step's row adds noise. If not, diffusers draws all the same, and so does this.
        in_step: whether noise of the sample's dtype may be drawn in the step: float64 is no rounded float32.
    """
    if isinstance(generator, DeviceGenerator):
        return None, generator
    if isinstance(generator, list) and len(generator) == 1:
        generator = generator[0]
    if adds and in_step and dtype == sample.dtype and not torch.compiler.is_compiling():
        device = sample.device
        if generator is None and device.type == "cpu":
            return None, torch.default_generator
        if generator is None and device.type == "cuda":
            return None, torch.cuda.default_generators[device.index]
        if isinstance(generator, torch.Generator) and generator.device.type == device.type:
            return None, generator
    noise = _drawn(generator, sample, dtype, adds)
    return (None if noise is None else in_layout_of(sample, noise)), None


def _drawn(generator: Any, sample: Tensor, dtype: torch.dtype, adds: bool) -> Tensor | None:
    """Return what diffusers draws; ``None``: it is not used."""
    shape, several = sample.shape, isinstance(generator, list)
    generators = [torch.default_generator if each is None else each for each in (generator if several else [generator])]
    here = sample.is_cpu and not torch.compiler.is_compiling() and len(generators) == (shape[0] if several else 1)
    if not (here and all(type(each) is torch.Generator and each.device.type == "cpu" for each in generators)):
        noise: Tensor = randn_tensor(tuple(shape), generator=generator, device=sample.device, dtype=dtype)
        return noise if adds else None
    if not adds:
        for each in generators:
            pass_over((1, *shape[1:]) if several else shape, dtype, each)
        return None
    noise = torch.empty(shape, dtype=dtype, device="cpu")
    for part, each in zip(noise.split(1) if several else [noise], generators, strict=True):
        normal_(part, each)
    return noise
