"""Choose where a step's noise comes from: it is what diffusers draws, and generators end where diffusers' do."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..step.memory import in_layout_of
from ..step.noise import DeviceGenerator

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
    noise: Tensor = randn_tensor(tuple(sample.shape), generator=generator, device=sample.device, dtype=dtype)
    return (in_layout_of(sample, noise) if adds else None), None
