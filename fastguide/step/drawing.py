"""Where a step's noise comes from: torch's own functions, or torch's stream inside of a kernel on a GPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .checks import counted_layout
from .memory import empty_like
from .noise import TorchGrid

NO_GRID = TorchGrid(0, 0)
"""Of a step that draws nothing from torch's stream."""


@functools.cache
def _device_size(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.max_threads_per_multi_processor


def torch_grid(device: torch.device, elements: int) -> TorchGrid:
    """How torch would deal out normal values over a tensor of so many elements on a device."""
    return TorchGrid.of(elements, *_device_size(device))


def draws_in_kernel(generator: torch.Generator, sample: Tensor) -> bool:
    """Whether the kernel knows what torch.randn would draw, and may move the generator on."""
    return (
        generator.device.type == "cuda"
        and sample.dtype != torch.float64  # torch deals those out in another way
        and sample.nbytes < 2**31  # and larger tensors in parts
        and counted_layout(sample)
        and not torch.cuda.is_current_stream_capturing()  # a captured torch.randn draws anew at each replay
    )


def draw_noise(generator: torch.Generator, sample: Tensor, place: Tensor | None) -> Tensor:
    """torch's own noise: in a place that may be overwritten, if its values may stand there, else in new memory."""
    if generator.device.type != sample.device.type:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "generator: expected one of a GPU inside a capture, as one of the CPU draws there and its noise is "
                "copied; got one of cpu"
            )
        noise = torch.randn(sample.shape, dtype=sample.dtype, generator=generator).to(sample.device)
    elif place is not None and place.dtype == sample.dtype and place.is_contiguous():
        return place.normal_(generator=generator)
    elif sample.is_contiguous():
        return empty_like(sample).normal_(generator=generator)
    else:
        noise = torch.randn(sample.shape, dtype=sample.dtype, device=sample.device, generator=generator)
    return noise if sample.is_contiguous() else empty_like(sample).copy_(noise)
