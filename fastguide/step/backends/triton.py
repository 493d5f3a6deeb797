"""The Triton backend: an operator of its own with the same schema, launched from one kernel. NVIDIA and AMD."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ...solvers.table import ROW_COLUMNS
from ..memory import counted_layout
from ..noise import SOURCES, torch_increment
from ..operator import SCHEMA, StepArguments, guided_step_fake
from .registry import Backend

FLOOR = (3, 6)
"""The oldest Triton that the tests have run with; torch 2.10 brings it."""

DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "triton-windows")
"""Names under which the package ``triton`` is installed."""

WARPS = 4
VECTOR = 8  # elements of a thread: 16 bytes of a 16-bit dtype
BLOCK = VECTOR * WARPS * (32 if torch.version.hip is None else 64)
_SMALL_BLOCK = 256  # where noise is drawn one element at a time, of small tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton runs kernels in its interpreter, on the CPU: for debugging and tests."""

_PTX = torch.version.hip is None and not INTERPRETED

_library = torch.library.Library("fastguide", "FRAGMENT")
_library.define("guided_step_triton" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("fastguide::guided_step_triton", guided_step_fake, lib=_library)

_NONE, _GIVEN = SOURCES.index("none"), SOURCES.index("given")
_TORCH_STREAM, _PORTABLE = SOURCES.index("torch_stream"), SOURCES.index("portable")

OPTIONS = {"enable_fp_fusion": False}
"""Of every compilation: products and sums are not joined, so that a step's bits do not depend on its variant, nor the
portable stream's on the device."""

_compiled: dict[tuple[Any, ...], Any] = {}
"""Triton's kernels by what each was compiled for. Triton finds them too, but takes longer than a small step."""


def backend() -> Backend:
    """The backend as this process has it; the kernel is imported at its first step."""
    step = torch.ops.fastguide.guided_step_triton.default
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", step, (), "not installed: pip install triton")
    version = _version()
    if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
        return Backend("triton", step, (), f"triton {version} is too old: expected {FLOOR[0]}.{FLOOR[1]} or newer")
    if INTERPRETED:
        return Backend("triton", step, ("cpu",), f"triton {version}, interpreted on the CPU (TRITON_INTERPRET=1)")
    # torch's stream on AMD is another one: there torch draws it.
    return Backend("triton", step, ("cuda",), f"triton {version}, on GPUs", torch_stream=torch.version.hip is None)


def _version() -> str:
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import triton  # slower, and always right

    return str(triton.__version__)


def guided_step(*arguments: Any) -> None:
    """Launch one step; the arguments are the fields of ``StepArguments``, which ``guided_step`` has checked."""
    (
        out, original, staged, sample, predictions, rows, weights, index, indices, gradient, variance, noise, seeds,
        philox, philox_threads, cursor, timestep, mask, known, known_noise,
    ) = StepArguments(*arguments)  # fmt: skip
    total, batch = sample.numel(), sample.shape[0]
    if total == 0:
        return
    size = total // batch
    floats = (out, original, staged, sample, *predictions, gradient, variance, noise, rows, mask, known, known_noise)
    if torch.float64 in [tensor.dtype for tensor in floats if tensor is not None]:
        raise RuntimeError("sample: expected no float64 tensors in Triton; the native and reference backends take them")
    if rows.shape[1] != len(ROW_COLUMNS) or not rows.is_contiguous():
        raise RuntimeError(f"rows: expected shape (steps, {len(ROW_COLUMNS)}), contiguous, got {tuple(rows.shape)}")
    count = weights.shape[-1] - 1
    if len(predictions) == 1 and count > 1:
        predictions = list(predictions[0].unflatten(0, (count, batch)).unbind(0))

    kind, channels, block = _NONE, 1, BLOCK
    seed = offset = (0, 0)
    increment, shared, state = 0, False, None
    if seeds is not None or philox is not None:
        kind, channels = _PORTABLE, _channels(sample)
    elif noise is not None:
        kind = _GIVEN
    if philox is not None:
        kind = _TORCH_STREAM
        increment = torch_increment(total, philox_threads)
        if philox.numel() == 3:
            state = philox
        else:
            seed, offset = (_words(value) for value in philox.tolist())
        fitting = (b for b in (BLOCK, 512, 256) if size % b == 0 and philox_threads % b == 0)
        block = next(fitting, 0)
        shared = bool(block) and channels == 1 and total > philox_threads
        block = block if shared else _SMALL_BLOCK
    even = size % block == 0
    programs = batch * -(-size // block)
    if shared:
        programs = -(-total // (philox_threads * 4)) * (philox_threads // block)

    tensors = (
        out,
        original,
        staged,
        sample,
        tuple(predictions),
        rows,
        weights,
        indices,
        gradient,
        variance,
        noise,
        seeds,
        state,
        cursor,
        timestep,
        mask,
        known,
        known_noise,
    )
    specialized = (
        _stride(out),
        _stride(original),
        _stride(staged),
        _stride(sample),
        tuple(_stride(prediction) for prediction in predictions),
        _stride(gradient),
        _stride(variance),
        _stride(noise),
        _stride(mask),
        _stride(known),
        _stride(known_noise),
        size,
        philox_threads,
    )
    others = (
        weights.stride(0) if weights.shape[0] > 1 else 0,
        weights.stride(1) if weights.shape[1] > 1 else 0,
        indices.stride(0) if indices is not None and indices.dim() else 0,
        seeds.stride(0) if seeds is not None and seeds.dim() else 0,
        index,
        rows.shape[0],
        staged.shape[0] // batch if staged is not None else 0,
        batch,
        channels,
        *seed,
        *offset,
        increment,
        cursor.stride(0) if cursor is not None and len(cursor) > 1 else 0,
        timestep.numel() if timestep is not None else 0,
    )
    constants = (kind, len(predictions), even, channels == 1, shared, _PTX, block)
    _launch(programs, tensors, specialized, others, constants, sample.device)


def _launch(
    programs: int,
    tensors: tuple[Any, ...],
    specialized: tuple[Any, ...],
    others: tuple[int, ...],
    constants: tuple[Any, ...],
    device: torch.device,
) -> None:
    """The kernel's parameters in their order: Triton compiles anew for other kinds of all but ``others``."""
    arguments = (*tensors, *specialized, *others, *constants)
    if device.type != "cuda":
        _compile_and_launch(programs, arguments)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(programs, tensors, specialized, others, constants, device)
        return
    key = kind_of_launch(device, tensors, specialized, others, constants)
    kernel = _compiled.get(key)
    if kernel is not None:
        kernel[programs, 1, 1](*arguments)
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend: the Triton kernel for these arguments is not compiled yet, and cannot be during a capture; run "
            "the step once before"
        )
    _compiled[key] = _compile_and_launch(programs, arguments)


def _compile_and_launch(programs: int, arguments: tuple[Any, ...]) -> Any:
    from . import triton_kernel as kernels

    warps = arguments[-1] * WARPS // BLOCK
    return kernels.step_kernel[(programs, 1, 1)](*arguments, num_warps=warps, **OPTIONS)


def kind_of_launch(
    device: torch.device,
    tensors: tuple[Any, ...],
    specialized: tuple[Any, ...],
    others: tuple[int, ...],
    constants: tuple[Any, ...],
) -> tuple[Any, ...]:
    """All that Triton compiles a kernel of its own for."""
    flat = [*tensors[:4], *tensors[4], *tensors[5:]]
    key: list[Any] = [device, constants]
    key += [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in flat]
    if torch.version.hip is not None:  # there, also for tensors whose offsets fit 32 bits
        key += [tensor is not None and tensor.untyped_storage().nbytes() < 2**31 for tensor in flat]
    numbers = (*specialized[:4], *specialized[4], *specialized[5:])
    key += [(n == 1) + 2 * (n % 16 == 0) + 4 * (n >= 2**31) for n in numbers]
    key += [-(2**31) <= n < 2**31 for n in others]
    return tuple(key)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _channels(sample: Tensor) -> int:
    """How streams of noise count elements: see StepArguments::channels in csrc/arguments.h."""
    if not counted_layout(sample):
        raise RuntimeError(f"sample: expected contiguous or channels_last, got strides {sample.stride()}")
    inner = sample[0]
    return 1 if inner.is_contiguous() else inner.shape[0]


def _words(value: int) -> tuple[int, int]:
    """The lower and upper word of 64 bits, each as int32."""

    def signed(word: int) -> int:
        return (word + 2**31) % 2**32 - 2**31

    return signed(value % 2**32), signed((value >> 32) % 2**32)


for _key in ("CPU", "CUDA"):
    _library.impl("guided_step_triton", guided_step, _key)
