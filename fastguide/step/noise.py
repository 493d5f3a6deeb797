"""Streams of noise: the portable one, the same to the bit everywhere, and torch's own in kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .memory import counted_layout

STARTING_NOISE = -1
"""The step number under which ``portable_noise`` draws x_T: no step of a table has it."""

SOURCES = ("none", "given", "torch_stream", "portable")
"""Sources of a step's noise: ``enum class Noise`` in csrc/kernels/arguments.h."""

_WORD = 0xFFFFFFFF


def portable_noise(
    seeds: int | Sequence[int] | Tensor,
    shape: Sequence[int],
    *,
    step: int | Tensor = STARTING_NOISE,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return standard normal values that depend on a sample's seed, the step and the element, and on nothing else.

    The same bits on every device and in every batch: Philox4x32-10 (Salmon et al. 2011) keyed by the seed and counted
    by (element / 4, step), four values a call by Box & Muller (1958). This is plain torch and the specification of what
    ``guided_step(..., seeds=)`` draws inside its kernels; it is meant for starting noise and for checks.

    Args:
        seeds: one for all samples, or one for each: int64, of shape () or (batch,); any 64 bits are a seed.
        shape: (batch, ...); with one seed for all, all samples are equal.
        step: the step index, an int or an int64 tensor of shape () or (batch,). The default is for x_T.
        dtype: what the float32 values are rounded to.
        device: where; by default that of ``seeds``, if it is a tensor.

    >>> noise = portable_noise([3, 4], (2, 8))
    >>> torch.equal(noise[1:], portable_noise([4], (1, 8)))
    True
    """
    shape = torch.Size(shape)
    if not shape:
        raise ValueError("shape: expected (batch, ...), got ()")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    seed = seeds_tensor(seeds, device)
    steps = _int64("step", step, seed.device)
    for name, tensor in (("seeds", seed), ("step", steps)):
        if tensor.dim() > 1 or (tensor.dim() == 1 and len(tensor) != shape[0]):
            raise ValueError(f"{name}: expected shape () or ({shape[0]},), got {tuple(tensor.shape)}")
    elements = math.prod(shape[1:])
    block = torch.arange((elements + 3) // 4, device=seed.device)
    zero = torch.zeros_like(block)
    column = (-1, 1) if seed.dim() or steps.dim() else (1, 1)
    words = _philox(
        (block & _WORD, block >> 32, steps.reshape(column) & _WORD, zero),
        (seed.reshape(column) & _WORD, (seed.reshape(column) >> 32) & _WORD),
    )
    normals = torch.stack((*_normals(words[0], words[1]), *_normals(words[2], words[3])), -1)
    values = normals.flatten(1)[:, :elements].expand(shape[0], elements)
    return values.to(dtype).contiguous().view(shape)


def seeds_tensor(seeds: int | Sequence[int] | Tensor, device: torch.device | str | None) -> Tensor:
    """Return seeds as int64 on a device; numbers may be any 64 bits."""
    return _int64("seeds", seeds, device)


def _int64(name: str, values: int | Sequence[int] | Tensor, device: torch.device | str | None) -> Tensor:
    if isinstance(values, Tensor):
        if values.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {values.dtype}")
        return values if device is None else values.to(device)
    numbers = [values] if isinstance(values, int) else values
    if not isinstance(numbers, (list, tuple, range)) or not all(isinstance(number, int) for number in numbers):
        raise TypeError(f"{name}: expected an int, a sequence of them or an int64 tensor, got {values!r}")
    bad = [number for number in numbers if not -(2**63) <= number < 2**64]
    if bad:
        raise ValueError(f"{name}: expected 64 bits, from -2^63 to 2^64 - 1, got {bad[0]}")
    words = torch.tensor([signed_word(number) for number in numbers], dtype=torch.int64, device="cpu")
    if device is not None:
        words = words.to(device, non_blocking=True)  # made there at once, it would wait for a GPU
    return words[0] if isinstance(values, int) else words


def signed_word(seed: int) -> int:
    """Return 64 bits as torch's int64 holds them: seeds from 2^63 on are negative there."""
    return (int(seed) + 2**63) % 2**64 - 2**63


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Compute Philox4x32-10, Salmon et al. 2011, section 3.3, on 32-bit words in int64 tensors."""
    x, y, z, w = counter
    low, high = key
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, x)
        high1, low1 = _product(0xCD9E8D57, z)
        x, y, z, w = high1 ^ y ^ low, low1, high0 ^ w ^ high, low0
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return x, y, z, w


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and lower word of a 64-bit product, computed in halves that fit int64 with its sign."""
    lower, upper = (constant & 0xFFFF) * word, (constant >> 16) * word
    middle = (lower >> 16) + upper
    return middle >> 16, (lower & 0xFFFF) | ((middle & 0xFFFF) << 16)


def _normals(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Make two normal values of two words: csrc/maths/philox.h. Each line rounds once, and none may be contracted."""
    u = a.to(torch.float32) * 2.0**-32 + 2.0**-33
    shifted = u.view(torch.int32) - 0x3F3504F3
    exponent = (shifted >> 23).to(torch.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    p = torch.full_like(f, 0.20164758)
    for c in (-0.32361004, 0.34486449, -0.39813766, 0.49942458, -0.66669428, 1.0000064):
        p = p * f + c
    square = exponent * -1.3862944 + (f * -2.0 + f * f * p)
    radius = square.to(torch.float64).sqrt().to(torch.float32)  # torch's own of float32 is not always the nearest

    quarter = ((b + 0x20000000) & _WORD) >> 30
    angle = (b - (quarter << 30)) & _WORD  # of a turn of 2^32, from the nearest quarter
    y = (angle - ((angle >> 31) << 32)).to(torch.float32) * 2.0**-29
    y2 = y * y
    sine = torch.full_like(y, -3.5950452e-05)
    for c in (0.0024900010, -0.080745436, 0.78539819):
        sine = sine * y2 + c
    sine = sine * y
    cosine = torch.full_like(y, -0.00031902004)
    for c in (0.015850201, -0.30842441, 1.0):
        cosine = cosine * y2 + c
    odd = (quarter & 1) != 0
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where(((quarter + 1) & 2) != 0, -first, first)
    second = torch.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second


class TorchGrid(NamedTuple):
    """The grid of torch's CUDA kernel for normal values, which decides who draws which element.

    ATen/native/cuda/DistributionTemplates.h, ``calc_execution_policy``: blocks of 256 threads, as many as fit the
    device at once, four values a thread from one call of Philox.
    """

    threads: int
    increment: int

    @classmethod
    def of(cls, elements: int, multiprocessors: int, threads_per_multiprocessor: int) -> TorchGrid:
        """Return the grid for a tensor of that number of elements on a device with these properties."""
        blocks = min(multiprocessors * (threads_per_multiprocessor // 256), (elements + 255) // 256)
        threads = 256 * max(blocks, 1)
        return cls(threads, torch_increment(elements, threads))


def torch_increment(elements: int, threads: int) -> int:
    """Return how far torch's kernel moves the generator's offset: ``torch_increment`` in csrc/maths/philox.h."""
    return ((elements - 1) // (threads * 4) + 1) * 4 if elements else 0


class DeviceGenerator:
    """A generator of torch's CUDA noise whose state is on the device, so that each replay of a graph draws anew.

    Give it to ``guided_step`` as ``generator=``: the kernel reads seed and offset on the device, draws what
    ``torch.randn`` would, and moves the offset on as torch does. A torch generator cannot do that inside a capture
    before torch 2.14. Like any generator, it serves one stream of work at a time.

    Args:
        seed: any 64 bits, as ``torch.Generator.manual_seed`` takes.
        offset: where in the stream, as ``torch.Generator.get_offset`` says; a multiple of 4.
        device: a CUDA device.
    """

    def __init__(self, seed: int, offset: int = 0, *, device: torch.device | str = "cuda") -> None:
        self.state = torch.zeros(3, dtype=torch.int64, device=device)
        """int64 on the device: seed, offset, and how many blocks of the running kernel have read them."""
        self.set(seed, offset)

    @classmethod
    def from_generator(cls, generator: torch.Generator) -> DeviceGenerator:
        """Begin at a CUDA generator's seed and offset; that generator is left as it is."""
        if not isinstance(generator, torch.Generator) or generator.device.type != "cuda":
            got = getattr(generator, "device", type(generator).__name__)
            raise ValueError(f"generator: expected a torch.Generator of a CUDA device, got {got}")
        return cls(generator.initial_seed(), generator.get_offset(), device=generator.device)

    def set(self, seed: int, offset: int = 0) -> DeviceGenerator:
        """Rewrite the state without waiting for the device; later steps and replays of captured ones continue from it.

        Call it on the stream of the steps; on another stream, wait for them first.
        """
        if offset < 0 or offset % 4:
            raise ValueError(f"offset: expected a multiple of 4 from 0 on, as torch's are, got {offset}")
        for value, place in zip((signed_word(seed), offset, 0), self.state, strict=True):
            place.fill_(value)
        return self

    @property
    def device(self) -> torch.device:
        """The state's device."""
        return self.state.device

    def get_state(self) -> tuple[int, int]:
        """Return seed and offset; this waits for the device."""
        seed, offset, _ = self.state.tolist()
        return seed % 2**64, offset

    def __repr__(self) -> str:
        return f"DeviceGenerator(device={self.device})"


# ---- Where kernels draw it ----

NO_GRID = TorchGrid(0, 0)
"""The grid of a step that draws nothing from torch's stream."""


@functools.cache
def _device_size(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.max_threads_per_multi_processor


def torch_grid(device: torch.device, elements: int) -> TorchGrid:
    """Return the grid that torch would launch on a device for a tensor of that number of elements."""
    return TorchGrid.of(elements, *_device_size(device))


def draws_in_kernel(generator: torch.Generator, sample: Tensor) -> bool:
    """Tell whether the kernel knows what torch.randn would draw, and may advance the generator."""
    return (
        generator.device.type == "cuda"
        and sample.dtype != torch.float64  # torch assigns those to threads in another way
        and sample.nbytes < 2**31  # and larger tensors in parts
        and counted_layout(sample)
        and not torch.cuda.is_current_stream_capturing()  # a captured torch.randn draws anew at each replay
    )
