"""Draw a step's noise from torch's stream: by the kernel, or here, by torch or as torch does."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import empty_like, overlaps
from .noise import DeviceGenerator, draws_in_kernel, signed_word, torch_grid
from .operator import StepArguments, inputs
from .torch_normals import normal_


def draw_noise(generator: torch.Generator, sample: Tensor, into: Tensor | None) -> Tensor:
    """Draw torch's own noise of the sample's shape, into the given memory if it can take the values as they are."""
    if generator.device.type != sample.device.type:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "generator: expected one of a GPU inside a capture, as one of the CPU draws there and its noise is "
                "copied; got one of cpu"
            )
        noise = torch.randn(sample.shape, dtype=sample.dtype, generator=generator).to(sample.device)
    elif into is not None and into.dtype == sample.dtype and into.is_contiguous():
        return normal_(into, generator)
    elif sample.is_contiguous():
        return normal_(empty_like(sample), generator)
    else:
        noise = torch.randn(sample.shape, dtype=sample.dtype, device=sample.device, generator=generator)
    return noise if sample.is_contiguous() else empty_like(sample).copy_(noise)


def draw(
    arguments: StepArguments,
    generator: torch.Generator | DeviceGenerator,
    torch_stream: bool,
    out_is_new: bool,
    keeps_noise: bool = False,
) -> tuple[StepArguments, int]:
    """Give a step its noise: drawn here by torch, or by the kernel.

    Args:
        arguments: of the step, without noise.
        generator: what draws.
        torch_stream: whether the backend's kernel can draw what torch would.
        out_is_new: whether ``out`` is the step's own, so that noise can be drawn into it.
        keeps_noise: whether the noise is read again after the step, so that it is drawn into memory of its own.

    Returns:
        The arguments with ``noise`` or ``philox``; and how far to move the generator's offset after the step.
    """
    sample = arguments.sample
    if isinstance(generator, DeviceGenerator):
        grid = torch_grid(sample.device, sample.numel())
        return arguments._replace(philox=generator.state, philox_threads=grid.threads), 0
    if torch_stream and draws_in_kernel(generator, sample):
        grid = torch_grid(sample.device, sample.numel())
        philox = torch.tensor((signed_word(generator.initial_seed()), generator.get_offset()), device="cpu")
        return arguments._replace(philox=philox, philox_threads=grid.threads), grid.increment
    out = arguments.out
    free = not keeps_noise and (out_is_new or not any(overlaps(out, tensor) for tensor in inputs(arguments)))
    return arguments._replace(noise=draw_noise(generator, sample, out if free else None)), 0
