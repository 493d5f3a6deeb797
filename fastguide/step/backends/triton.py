"""The Triton backend: an operator of its own with the same schema, of one kernel, or two. NVIDIA and AMD."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...solvers.table import ROW_COLUMNS
from ..memory import counted_layout
from ..noise import SOURCES, torch_increment
from ..operator import ELEMENTWISE, SCHEMA, StepArguments, elementwise, guided_step_fake
from .registry import Backend

FLOOR = (3, 6)
"""The oldest Triton that the tests have run with; torch 2.10 brings it."""

DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "triton-windows")
"""Names under which the package ``triton`` is installed."""

WARPS = 4
VECTOR = 8  # elements of a thread: 16 bytes of a 16-bit dtype
BLOCK = VECTOR * WARPS * (32 if torch.version.hip is None else 64)
_SMALL_BLOCK = 256  # where noise is drawn one element at a time, of small tensors

MOST_OF_GROUP = 16384
"""The most elements of a group that has weights of its own: one Triton program reads them all."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton runs kernels in its interpreter, on the CPU: for debugging and tests."""

_PTX = torch.version.hip is None and not INTERPRETED

_library = torch.library.Library("fastguide", "FRAGMENT")
_library.define("guided_step_triton" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("fastguide::guided_step_triton", guided_step_fake, lib=_library)

_NONE, _GIVEN = SOURCES.index("none"), SOURCES.index("given")
_TORCH_STREAM, _PORTABLE = SOURCES.index("torch_stream"), SOURCES.index("portable")

OPTIONS = {"enable_fp_fusion": False}
"""Options of every compilation: products and sums are joined where the kernel says so, and nowhere else, so that a
step's bits do not depend on its variant, nor the portable stream's on the device."""

_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels by what each was compiled for. Triton would find them too, but takes longer than a small step."""


def backend() -> Backend:
    """Return the backend as this process has it; the kernel is imported at its first step."""
    step = torch.ops.fastguide.guided_step_triton.default
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", step, (), "not installed: pip install triton")
    version = _version()
    if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
        return Backend("triton", step, (), f"triton {version} is too old: expected {FLOOR[0]}.{FLOOR[1]} or newer")
    if INTERPRETED:  # which takes a second for a sample's weights; the operator makes them there too
        return Backend(
            "triton",
            step,
            ("cpu",),
            f"triton {version}, interpreted on the CPU (TRITON_INTERPRET=1)",
            group_elements=MOST_OF_GROUP,
            compiles_programs=True,
            needs_thresholds=True,
            backward=_backward,
            repeats=True,
            relaunch=Relaunch,
        )
    # torch's stream on AMD is another one: there torch draws it.
    cuda = torch.version.hip is None
    status = f"triton {version}, on GPUs"
    return Backend(
        "triton",
        step,
        ("cuda",),
        status,
        torch_stream=cuda,
        makes_weights=("cuda",),
        group_elements=MOST_OF_GROUP,
        compiles_programs=True,
        needs_thresholds=True,
        backward=_backward,
        repeats=cuda,
        relaunch=Relaunch,
    )


def _backward(*arguments: Any, **gradients: Any) -> None:
    from .triton_backward import guided_step_backward

    guided_step_backward(*arguments, **gradients)


def _version() -> str:
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import triton  # slower, and always right

    return str(triton.__version__)


_SCALARS = ("index", "philox_threads")
_OF_PROGRAMS = ("program", "parameters", "made", "scratch")  # for the kernel before the step's
_TENSORS = tuple(place for place, name in enumerate(StepArguments._fields) if name not in (*_SCALARS, *_OF_PROGRAMS))
_WITH_STRIDES = tuple(
    place
    for place, name in enumerate(StepArguments._fields)
    if name in (*ELEMENTWISE, "staged", "predictions", "history")
)


def guided_step(*arguments: Any) -> None:
    """Launch one step; the arguments are the fields of ``StepArguments``, which ``guided_step`` has checked."""
    a = StepArguments(*arguments)
    if a.sample.numel() > 0:
        _check(a)
        a = _each_apart(a)
        if _has_groups(a):
            _steps_groups(a)(a.index, _tensors(a))
            return
        if a.program is not None:
            making = _makes_weights(a)
            making(a.index, a.indices, a.cursor, a.sample, a.predictions)
            a = making.step(a)
        shape = Shape.of(a)
        _launch(shape.programs, shape.arguments(a.index, _tensors(a)), a.sample.device)


def _tensors(a: StepArguments) -> tuple[Any, ...]:
    """Return what the kernel calls tensors."""
    state = a.philox if a.philox is not None and a.philox.numel() == 3 else None
    of_kernel = a._replace(philox=state)
    return tuple(of_kernel[k] for k in _TENSORS)


def _has_groups(a: StepArguments) -> bool:
    return a.made is not None and len(a.made) > len(a.sample)


def _steps_groups(a: StepArguments) -> Any:
    """Return what launches the step of a program that makes weights of each group."""
    from .triton_groups import StepsGroups

    return StepsGroups(a)


def _makes_weights(a: StepArguments) -> Any:
    """Return what launches the kernel that makes the weights of a step with a program."""
    from .triton_moments import MakesWeights

    return MakesWeights(a)


def _each_apart(a: StepArguments) -> StepArguments:
    """Return the arguments with a tuple of predictions, each by itself."""
    return a._replace(predictions=_apart(a.predictions, a.weights.shape[-1] - 1, a.sample.shape[0]))  # type: ignore[arg-type]


def _apart(predictions: Sequence[Tensor], count: int, batch: int) -> tuple[Tensor, ...]:
    if len(predictions) == 1 and count > 1:
        return tuple(predictions[0][k * batch : (k + 1) * batch] for k in range(count))
    return tuple(predictions)


class Shape(NamedTuple):
    """All that a launch is told but its tensors and the row."""

    programs: int
    specialized: tuple[Any, ...]
    before_row: tuple[int, ...]
    after_row: tuple[int, ...]
    constants: tuple[Any, ...]

    @classmethod
    def of(cls, a: StepArguments) -> Shape:
        """Return the shape of a step whose predictions are apart."""
        batch = a.sample.shape[0]
        size = a.sample.numel() // batch
        noise = _noise_of(a)
        strides = tuple(_batch_stride(a[place]) for place in _WITH_STRIDES)
        before_row = (
            _stride_unless_one(a.weights, 0),
            _stride_unless_one(a.weights, 1),
            a.indices.stride(0) if a.indices is not None and a.indices.dim() else 0,
            a.seeds.stride(0) if a.seeds is not None and a.seeds.dim() else 0,
        )
        after_row = (
            a.rows.shape[0],
            a.staged.shape[0] // batch if a.staged is not None else 0,
            a.history.shape[0] // batch if a.history is not None else 0,
            batch,
            noise.channels,
            *noise.words,
            noise.increment,
            0 if a.cursor is None else _stride_unless_one(a.cursor, 0),
            a.timestep.numel() if a.timestep is not None else 0,
        )
        constants = (
            noise.source, len(a.predictions), size % noise.block == 0, noise.channels == 1, noise.shared, _PTX,
            noise.block,
        )  # fmt: skip
        return cls(noise.programs, (*strides, size, a.philox_threads), before_row, after_row, constants)

    def arguments(self, row: int, tensors: tuple[Any, ...]) -> _Arguments:
        """Return the launch's arguments, with the tensors in the kernel's order."""
        return tensors, self.specialized, (*self.before_row, row, *self.after_row), self.constants


class Relaunch:
    """Makes a step again, with other tensors of the same layouts and alignments, as fastguide.step.repeat calls it."""

    def __init__(self, a: StepArguments) -> None:
        """Remember a step that was made."""
        a = _each_apart(a)
        self._groups = _steps_groups(a) if _has_groups(a) else None
        self._making = None if a.program is None or self._groups is not None else _makes_weights(a)
        self._shape = Shape.of(a if self._making is None else self._making.step(a))
        self._constants = a.rows, a.weights, a.cursor, a.timestep
        self._count, self._batch, self._device = a.weights.shape[-1] - 1, a.sample.shape[0], a.sample.device
        self._kernel: Any = None

    def __call__(
        self, out: Tensor, noise: Tensor | None, index: Any, sample: Tensor, predictions: Any, _guidance: Any,
        gradient: Tensor | None, variance: Tensor | None, _noise: Any, _generator: Any, seeds: Tensor | None,
        inpainting: tuple[Tensor, Tensor, Tensor] | None, history: Tensor | None, anchor: Tensor | None,
        original: Tensor | None, _out: Any, staged: Tensor | None, _backend: Any,
    ) -> None:  # fmt: skip
        """Launch it: the output, the noise, and what ``guided_step`` got."""
        rows, weights, cursor, timestep = self._constants
        each = _apart([predictions] if type(predictions) is Tensor else predictions, self._count, self._batch)
        row, indices = (index, None) if type(index) is int else (0, index if type(index) is Tensor else None)
        if self._making is not None:
            weights, each = self._making(row, indices, cursor, sample, each)
        tensors = (
            out, original, staged, sample, each, rows, weights, indices, gradient, variance, noise, seeds, None, cursor,
            timestep, *(inpainting or (None, None, None)), anchor, history, None,
        )  # fmt: skip
        if self._groups is not None:
            self._groups(row, tensors)
            return
        shape = self._shape
        arguments = shape.arguments(row, tensors)
        if self._kernel is not None and self._device.index == torch.cuda.current_device():
            self._kernel[shape.programs, 1, 1](*_flat(arguments))
            return
        _launch(shape.programs, arguments, self._device)
        if self._device.type == "cuda":
            self._kernel = _compiled[kind_of_launch(self._device, arguments)]


def _check(a: StepArguments) -> None:
    if a.program is not None:
        from .triton_moments import check_program

        check_program(a)
    if a.inverse_thresholds is not None and a.inverse_thresholds.shape != (a.sample.shape[0], 1):
        raise RuntimeError(
            "inverse_thresholds: expected those of all samples, found before the step; others find them in theirs"
        )
    floats = (*elementwise(a), a.staged, a.history, *a.predictions, a.rows)
    if torch.float64 in [tensor.dtype for tensor in floats if tensor is not None]:
        raise RuntimeError("sample: expected no float64 tensors in Triton; the native and reference backends take them")
    for name, tensor in [
        *a.named_inputs(),
        ("out", a.out),
        ("original", a.original),
        ("staged", a.staged),
        ("history", a.history),
    ]:
        if tensor is not None and tensor.untyped_storage().data_ptr() == 0:
            raise RuntimeError(f"{name}: expected a tensor with memory, got one that was freed")
    if a.rows.shape[1] != len(ROW_COLUMNS) or not a.rows.is_contiguous():
        raise RuntimeError(f"rows: expected shape (steps, {len(ROW_COLUMNS)}), contiguous, got {tuple(a.rows.shape)}")
    steps, batch, weights = a.rows.shape[0], a.sample.shape[0], a.weights
    if weights.shape[0] not in (1, steps) or weights.shape[1] not in (1, batch) or weights.stride(2) != 1:
        raise RuntimeError(
            f"weights: expected shape ({steps} or 1, {batch} or 1, columns), dense columns, got {tuple(weights.shape)} "
            f"with strides {weights.stride()}"
        )


class _Noise(NamedTuple):
    """The source of a step's noise, and how its elements are dealt out to programs."""

    source: int
    channels: int
    block: int
    programs: int
    words: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Seed and offset of torch's stream, unless they are on the device."""
    increment: int = 0
    shared: bool = False
    """Whether a program computes the four tiles whose values come of the same calls."""


def _noise_of(a: StepArguments) -> _Noise:
    total, batch, threads = a.sample.numel(), a.sample.shape[0], a.philox_threads
    size = total // batch
    if a.philox is None:
        source = _PORTABLE if a.seeds is not None else _NONE if a.noise is None else _GIVEN
        channels = _channels(a.sample) if a.seeds is not None else 1
        return _Noise(source, channels, BLOCK, batch * -(-size // BLOCK))
    channels, words = _channels(a.sample), (0, 0, 0, 0)
    if a.philox.numel() == 2:  # on the host
        seed, offset = a.philox.tolist()
        words = (*_words(seed), *_words(offset))
    block = next((b for b in (BLOCK, 512, 256) if size % b == 0 and threads % b == 0), 0)
    shared = bool(block) and channels == 1 and total > threads
    block = block if shared else _SMALL_BLOCK
    programs = -(-total // (threads * 4)) * (threads // block) if shared else batch * -(-size // block)
    return _Noise(_TORCH_STREAM, channels, block, programs, words, torch_increment(total, threads), shared)


_Arguments: TypeAlias = tuple[tuple[Any, ...], tuple[Any, ...], tuple[int, ...], tuple[Any, ...]]
"""Tensors; strides, size and threads, for whose kinds Triton compiles anew; other numbers; constants."""


def _launch(programs: int, arguments: _Arguments, device: torch.device) -> None:
    if device.type != "cuda":
        _compile_and_launch(programs, arguments)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(programs, arguments, device)
        return
    key = kind_of_launch(device, arguments)
    kernel = _compiled.get(key)
    if kernel is not None:
        kernel[programs, 1, 1](*_flat(arguments))
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend: the Triton kernel for these arguments is not compiled yet, and cannot be during a capture; run "
            "the step once before"
        )
    _compiled[key] = _compile_and_launch(programs, arguments)


def _compile_and_launch(programs: int, arguments: _Arguments) -> Any:
    from . import triton_kernel as kernels

    *_, constants = arguments
    warps = constants[-1] * WARPS // BLOCK
    return kernels.step_kernel[(programs, 1, 1)](*_flat(arguments), num_warps=warps, **OPTIONS)


def _flat(arguments: _Arguments) -> tuple[Any, ...]:
    """Return the kernel's parameters in their order."""
    tensors, (*strides, size, threads), numbers, constants = arguments
    return tensors, tuple(strides), size, threads, *numbers, *constants


def kind_of_launch(device: torch.device, arguments: _Arguments) -> tuple[Any, ...]:
    """Return all that Triton compiles the step's kernel anew for."""
    nested, specialized, others, constants = arguments
    tensors = (*nested[:4], *nested[4], *nested[5:])
    return kind_of(device, tensors, (*specialized[:4], *specialized[4], *specialized[5:]), others, constants)


def kind_of(
    device: torch.device,
    tensors: Sequence[Tensor | None],
    specialized: Sequence[int],
    others: Sequence[int],
    constants: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Return all that Triton compiles a kernel of its own for; of ``others``, it is told not to tell them apart."""
    key: list[Any] = [device, constants]
    key += [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
    if torch.version.hip is not None:  # there, also for tensors whose offsets fit 32 bits
        key += [tensor is not None and tensor.untyped_storage().nbytes() < 2**31 for tensor in tensors]
    key += [(n == 1) + 2 * (n % 16 == 0) + 4 * (n >= 2**31) for n in specialized]
    key += [-(2**31) <= n < 2**31 for n in others]
    return tuple(key)


def _batch_stride(tensor: Any) -> Any:
    if tensor is None:
        return 0
    return tensor.stride(0) if isinstance(tensor, Tensor) else tuple(part.stride(0) for part in tensor)


def _stride_unless_one(tensor: Tensor, dimension: int) -> int:
    return tensor.stride(dimension) if tensor.shape[dimension] > 1 else 0


def _channels(sample: Tensor) -> int:
    """Return how streams of noise count elements: see StepArguments::channels in csrc/kernels/arguments.h."""
    if not counted_layout(sample):
        raise RuntimeError(f"sample: expected contiguous or channels_last, got strides {sample.stride()}")
    inner = sample[0]
    return 1 if inner.is_contiguous() else inner.shape[0]


def _words(value: int) -> tuple[int, int]:
    """Return the lower and upper word of 64 bits, each as int32."""

    def signed(word: int) -> int:
        return (word + 2**31) % 2**32 - 2**31

    return signed(value % 2**32), signed((value >> 32) % 2**32)


for _key in ("CPU", "CUDA"):
    _library.impl("guided_step_triton", guided_step, _key)
