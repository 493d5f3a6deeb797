"""The Triton backend: an operator of its own with the same schema, launched from one kernel. NVIDIA and AMD."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..checks import counted_layout
from ..ops import SCHEMA, Backend, guided_step_fake
from ..table import ROW_COLUMNS

FLOOR = (3, 6)
"""The oldest Triton that the tests have run with; torch 2.10 brings it."""

WARPS = 4
VECTOR = 8  # elements of a thread: 16 bytes of a 16-bit dtype
BLOCK = VECTOR * WARPS * (32 if torch.version.hip is None else 64)
_SMALL_BLOCK = 256  # where noise is drawn one element at a time, of small tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton runs kernels in its interpreter, on the CPU: for debugging and tests."""

_library = torch.library.Library("fastguide", "FRAGMENT")
_library.define("guided_step_triton" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("fastguide::guided_step_triton", guided_step_fake, lib=_library)

_launched: set[tuple[Any, ...]] = set()
"""Kinds of launches that have been compiled and loaded: others cannot be captured."""


def backend() -> Backend:
    """The backend as this process has it; the kernel is imported at its first step."""
    step = torch.ops.fastguide.guided_step_triton.default
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", step, (), "not installed: pip install triton")
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
        return Backend("triton", step, (), f"triton {version} is too old: expected {FLOOR[0]}.{FLOOR[1]} or newer")
    if INTERPRETED:
        return Backend("triton", step, ("cpu",), f"triton {version}, interpreted on the CPU (TRITON_INTERPRET=1)")
    # torch's stream on AMD is another one: there torch draws it.
    return Backend("triton", step, ("cuda",), f"triton {version}, on GPUs", torch_stream=torch.version.hip is None)


def guided_step(
    out: Tensor,
    original: Tensor | None,
    staged: Tensor | None,
    sample: Tensor,
    predictions: list[Tensor],
    rows: Tensor,
    weights: Tensor,
    index: int,
    indices: Tensor | None,
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    philox: Tensor | None,
    philox_threads: int,
) -> None:
    """Launch one step; the arguments are the operator's, and ``fastguide/ops.py`` has checked them."""
    from . import triton_kernel as kernels

    batch, size = sample.shape[0], sample.numel() // max(sample.shape[0], 1)
    if batch * size == 0:
        return
    tensors = (out, original, staged, sample, *predictions, gradient, variance, noise, rows)
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        raise RuntimeError("sample: expected no float64 tensors in Triton; the native and reference backends take them")
    if rows.shape[1] != len(ROW_COLUMNS) or not rows.is_contiguous():
        raise RuntimeError(f"rows: expected shape (steps, {len(ROW_COLUMNS)}), contiguous, got {tuple(rows.shape)}")
    count = weights.shape[-1] - 1
    if len(predictions) == 1 and count > 1:
        predictions = list(predictions[0].unflatten(0, (count, batch)).unbind(0))

    kind, channels, block = kernels.NONE, 1, BLOCK
    seed = offset = (0, 0)
    increment, shared, state = 0, False, None
    if seeds is not None or philox is not None:
        kind, channels = kernels.PORTABLE, _channels(sample)
    elif noise is not None:
        kind = kernels.GIVEN
    if philox is not None:
        kind = kernels.TORCH_STREAM
        increment = ((batch * size - 1) // (philox_threads * 4) + 1) * 4
        if philox.numel() == 3:
            state = philox
        else:
            seed, offset = (_words(value) for value in philox.tolist())
        fitting = (b for b in (BLOCK, 512, 256) if size % b == 0 and philox_threads % b == 0)
        block = next(fitting, 0)
        shared = bool(block) and channels == 1 and batch * size > philox_threads
        block = block if shared else _SMALL_BLOCK
    even = size % block == 0
    if shared:
        programs = -(-batch * size // (philox_threads * 4)) * (philox_threads // block)
    else:
        programs = batch * -(-size // block)

    arguments = (
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
        _stride(out),
        _stride(original),
        _stride(staged),
        _stride(sample),
        tuple(_stride(prediction) for prediction in predictions),
        _stride(gradient),
        _stride(variance),
        _stride(noise),
        weights.stride(0) if weights.shape[0] > 1 else 0,
        weights.stride(1) if weights.shape[1] > 1 else 0,
        indices.stride(0) if indices is not None and indices.dim() else 0,
        seeds.stride(0) if seeds is not None and seeds.dim() else 0,
        index,
        rows.shape[0],
        staged.shape[0] // batch if staged is not None else 0,
        batch,
        size,
        channels,
        *seed,
        *offset,
        philox_threads,
        increment,
    )
    constants = {
        "NOISE": kind,
        "K": len(predictions),
        "EVEN": even,
        "COUNTED": channels == 1,
        "SHARED": shared,
        "BLOCK": block,
        "num_warps": block * WARPS // BLOCK,
    }
    if kind == kernels.PORTABLE:
        constants["enable_fp_fusion"] = False  # or the stream's bits would not be the CPU's
    if sample.device.type == "cuda":
        _refuse_cold_capture(sample, arguments, constants)
        with torch.cuda.device(sample.device):
            kernels.step_kernel[(programs,)](*arguments, **constants)
    else:
        kernels.step_kernel[(programs,)](*arguments, **constants)


def _refuse_cold_capture(sample: Tensor, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Compiling and loading are not allowed while a stream is captured: the step must have run before."""
    key = (sample.device, *(_specialization(a) for a in arguments), *constants.values())
    if key in _launched:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend: the Triton kernel for these arguments is not compiled yet, and cannot be during a capture; run "
            "the step once before"
        )
    _launched.add(key)


def _specialization(argument: Any) -> Any:
    """What Triton compiles a kernel of its own for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        return tuple(_specialization(a) for a in argument)
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument >= 2**31
    return argument


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
