"""What ``guided_step`` refuses: every message names the argument, what was expected and what came.

Nothing here reads a device value on the host; index values and memory are looked at where they are on the host already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..guidance.weights import Guidance
from ..solvers.table import StepTable
from .cursor import CURSOR_COLUMNS, Cursor
from .inpainting import Known
from .noise import DeviceGenerator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of samples, predictions, gradients, variances, noise and outputs, in any combination."""


def listed(predictions: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The predictions as a list of tensors."""
    if isinstance(predictions, Tensor):
        return [predictions]
    if not isinstance(predictions, Sequence):
        raise TypeError(f"predictions: expected a tensor or a sequence of them, got {type(predictions).__name__}")
    for k, prediction in enumerate(predictions):
        if not isinstance(prediction, Tensor):
            raise TypeError(f"predictions[{k}]: expected a tensor, got {type(prediction).__name__}")
    return list(predictions)


def check_kinds(table: StepTable, sample: Tensor, predictions: list[Tensor], guidance: Guidance) -> bool:
    """Whether one tensor holds all predictions along its batch; refused if they fit in neither way."""
    if not isinstance(table, StepTable):
        raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance: expected a Guidance such as ClassifierFree(7.5), got {type(guidance).__name__}")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
    if sample.dim() == 0:
        raise ValueError("sample: expected shape (batch, ...), got a tensor without dimensions")
    if sample.device != table.device:
        raise ValueError(f"table: expected it on {sample.device}, the sample's device, got {table.device}; use .to()")
    batch, count = sample.shape[0], guidance.num_predictions
    check_guidance(table, guidance, batch)
    if not table.takes_predictions:
        if predictions:
            raise ValueError(f"predictions: {table.name} takes none, got {len(predictions)}")
        return False
    if len(predictions) == count:
        return False
    if len(predictions) == 1 and predictions[0].shape[:1] == (batch * count,):
        return True
    raise ValueError(
        f"predictions: expected {count}, one for each weight of the guidance, or one tensor of batch "
        f"{batch} * {count}; got {len(predictions)} of shape {_shape(predictions[0]) if predictions else '-'}"
        + ("; several need guidance=, such as ClassifierFree(7.5)" if count == 1 and len(predictions) > 1 else "")
    )


def check_guidance(table: StepTable, guidance: Guidance, batch: int) -> None:
    """Scales fit the batch and the table."""
    if guidance.batch not in (1, batch):
        raise ValueError(f"guidance: expected scales for 1 or {batch} samples, got {guidance.batch}")
    if guidance.steps not in (1, len(table)):
        raise ValueError(
            f"guidance: expected scales for 1 or {len(table)} steps, those of the table, got {guidance.steps}"
        )


def check_index(table: StepTable, index: int | Tensor, sample: Tensor) -> tuple[int | None, Tensor | None]:
    """The row as a host int, or the step indices as a tensor."""
    if isinstance(index, Tensor):
        if index.dtype != torch.int64:
            raise TypeError(f"index: expected an int or an int64 tensor, got {index.dtype}")
        if index.dim() > 1 or (index.dim() == 1 and index.shape[0] != sample.shape[0]):
            raise ValueError(f"index: expected shape () or ({sample.shape[0]},), got {_shape(index)}")
        if index.device != sample.device:
            raise ValueError(f"index: expected it on {sample.device}, the sample's device, got {index.device}")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():  # on the host: nothing waits
            for value in index.reshape(-1).tolist():
                _check_row(table, value)
        return None, index
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"index: expected an int, an int64 tensor or a Cursor, got {type(index).__name__}")
    _check_row(table, index)
    return index, None


def check_cursor(table: StepTable, cursor: Cursor, sample: Tensor, out: Tensor | None) -> None:
    """A cursor fits the batch, and stands in the table as far as the host sees it."""
    if out is not sample:
        got = "None" if out is None else "another tensor"
        raise ValueError(f"out: expected the sample itself with a Cursor, which leaves finished samples, got {got}")
    if cursor.batch not in (None, sample.shape[0]):
        raise ValueError(f"index: expected a Cursor for {sample.shape[0]} samples or one for all, got {cursor.batch}")
    if cursor.device != sample.device:
        raise ValueError(f"index: expected a Cursor on {sample.device}, the sample's device, got {cursor.device}")
    if cursor.device.type == "cpu" and not torch.compiler.is_compiling():
        for index, end in cursor.state[:, : CURSOR_COLUMNS.index("first")].tolist():
            if index < end:
                _check_row(table, index)


def _check_row(table: StepTable, index: int) -> None:
    if not 0 <= index < len(table):
        raise IndexError(f"index: expected 0 to {len(table) - 1} for a table of {len(table)} steps, got {index}")
    if table.undefined_rows and index in table.undefined_rows:
        raise ValueError(f"index: expected a step at which {table.name} is defined, got {index}: {table.undefined}")


def check_roles(
    table: StepTable,
    guidance: Guidance,
    sample: Tensor,
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | DeviceGenerator | None,
    seeds: Tensor | None,
    adds_noise: bool,
) -> None:
    """Each optional input is there exactly where the table and the guidance have a use for it."""
    if gradient is None and guidance.form is not None:
        raise ValueError("gradient: expected a tensor, as the guidance has a Classifier, got None")
    if gradient is not None and guidance.form is None:
        raise ValueError(
            "gradient: expected None, as no Classifier in the guidance says its scale and form, got a tensor"
        )
    if variance is None and table.learned_variance:
        raise ValueError(f"variance: expected the model's variance output, as this {table.name} learns it, got None")
    if variance is not None and not table.learned_variance:
        raise ValueError(f"variance: expected None, as this {table.name} has a fixed variance, got a tensor")
    if (noise is not None) + (generator is not None) + (seeds is not None) > 1:
        given = [k for k, v in (("noise", noise), ("generator", generator), ("seeds", seeds)) if v is not None]
        raise ValueError(f"noise: expected one of noise, generator and seeds, got {' and '.join(given)}")
    if generator is not None:
        _check_generator(generator, sample)
    elif seeds is not None:
        _check_seeds(seeds, sample)
    elif noise is None and adds_noise:
        raise ValueError(
            "noise: this step adds noise; expected noise=, generator= (torch.default_generator is global) or seeds=, "
            "got none"
        )


def _check_generator(generator: torch.Generator | DeviceGenerator, sample: Tensor) -> None:
    if not isinstance(generator, (torch.Generator, DeviceGenerator)):
        raise TypeError(f"generator: expected a torch.Generator or a DeviceGenerator, got {type(generator).__name__}")
    device, expected = generator.device, sample.device
    current = device.type == expected.type and device.index is None  # torch takes it for the current device
    drawn_and_copied = isinstance(generator, torch.Generator) and device.type == "cpu" and expected.type == "cuda"
    if not (device == expected or current or drawn_and_copied):
        raise ValueError(f"generator: expected one of {expected}, the sample's device, got one of {device}")


def _check_seeds(seeds: Tensor, sample: Tensor) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"seeds: expected an int64 tensor, got {got}")
    if seeds.dim() > 1 or (seeds.dim() == 1 and seeds.shape[0] != sample.shape[0]):
        raise ValueError(f"seeds: expected shape () or ({sample.shape[0]},), got {_shape(seeds)}")
    if seeds.device != sample.device:
        raise ValueError(f"seeds: expected it on {sample.device}, the sample's device, got {seeds.device}")
    if not counted_layout(sample):
        raise ValueError(f"sample: seeds expect it contiguous or channels_last, got strides {sample.stride()}")


def check_device_generator(backend: str, torch_stream: bool, sample: Tensor, cursor: Cursor | None) -> None:
    """What a DeviceGenerator cannot serve: nothing but a kernel on a GPU can draw from it."""
    if cursor is not None and cursor.batch is not None:
        raise ValueError("generator: expected seeds with a Cursor for several samples, as a generator's stream is one")
    if not torch_stream or sample.device.type != "cuda":
        raise ValueError(f"generator: the backend {backend!r} takes no DeviceGenerator for a sample on {sample.device}")
    if sample.dtype == torch.float64 or sample.nbytes >= 2**31 or not counted_layout(sample):
        raise ValueError(
            "generator: a DeviceGenerator expects a sample of float32, bfloat16 or float16, contiguous or "
            f"channels_last, below 2 GiB; got {sample.dtype}, strides {sample.stride()}, {sample.nbytes} bytes"
        )


def counted_layout(sample: Tensor) -> bool:
    """Whether streams of noise can count its elements: each sample is contiguous or channels_last."""
    if sample.is_contiguous():
        return True
    shape, strides = sample.shape[1:], sample.stride()[1:]
    if _dense_in_order(shape, strides):
        return True
    return len(shape) > 1 and _dense_in_order((*shape[1:], shape[0]), (*strides[1:], strides[0]))


def _dense_in_order(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def check_layouts(
    sample: Tensor,
    predictions: list[Tensor],
    together: bool,
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    out: Tensor | None,
    staged: Tensor | None,
    known: Known | None,
) -> None:
    """Shapes, dtypes, devices, layouts and autograd of all tensors."""
    shape, strides, device = sample.shape, sample.stride(), sample.device
    grad_enabled = torch.is_grad_enabled()
    check_sample("sample", sample, grad_enabled)
    if together:
        whole = (predictions[0].shape[0], *shape[1:])
        _check_operand("predictions", predictions[0], whole, strides, device, grad_enabled)
    else:
        for k, prediction in enumerate(predictions):
            _check_operand(f"predictions[{k}]", prediction, shape, strides, device, grad_enabled)
    for name, tensor in (("gradient", gradient), ("variance", variance), ("noise", noise), ("out", out)):
        if tensor is not None:
            _check_operand(name, tensor, shape, strides, device, grad_enabled)
    if known is not None:
        if not isinstance(known, Known):
            raise TypeError(f"known: expected a Known, got {type(known).__name__}")
        for name, tensor in known._asdict().items():
            _check_operand(f"known.{name}", tensor, shape, strides, device, grad_enabled)
    if out is not None and out.shape[0] > 1 and out.numel() and out.stride(0) < out.numel() // out.shape[0]:
        raise ValueError(f"out: expected samples that do not overlap, got strides {out.stride()}")
    if staged is not None:
        batch = shape[0]
        if not isinstance(staged, Tensor):
            raise TypeError(f"staged: expected a tensor, got {type(staged).__name__}")
        copies = staged.shape[0] // batch if batch and staged.dim() else 1
        if copies == 0 or staged.dim() == 0 or staged.shape[0] != copies * batch:
            raise ValueError(f"staged: expected shape (a multiple of {batch}, ...), got {_shape(staged)}")
        _check_operand("staged", staged, (copies * batch, *shape[1:]), strides, device, grad_enabled)
        if staged.shape[0] > 1 and staged.numel() and staged.stride(0) < staged.numel() // staged.shape[0]:
            raise ValueError(f"staged: expected samples that do not overlap, got strides {staged.stride()}")


def check_sample(name: str, sample: Tensor, grad_enabled: bool) -> None:
    """The sample's own dtype, layout and autograd."""
    if sample.dtype not in DTYPES or (grad_enabled and sample.requires_grad):
        _check_tensor(name, sample, sample.shape, sample.device, grad_enabled)
    if not (sample.is_contiguous() or _dense_within_sample(sample.shape, sample.stride())):
        raise ValueError(
            f"{name}: expected it dense within a sample (contiguous, channels_last, ...), got strides "
            f"{sample.stride()} for shape {_shape(sample)}; use .contiguous()"
        )


def _check_operand(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    strides: tuple[int, ...],
    device: torch.device,
    grad_enabled: bool,
) -> None:
    if (  # nearly always; what follows finds the words for the rest
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.stride() == strides
        and tensor.dtype in DTYPES
        and tensor.device == device
        and not (grad_enabled and tensor.requires_grad)
    ):
        return
    _check_tensor(name, tensor, shape, device, grad_enabled)
    inner = tensor.stride()[1:]
    if tensor.numel() and any(
        size > 1 and ours != theirs for size, ours, theirs in zip(shape[1:], inner, strides[1:], strict=True)
    ):
        raise ValueError(
            f"{name}: expected the sample's layout within a sample, strides {strides[1:]}, got {inner}; "
            "use .contiguous() or .to(memory_format=...)"
        )


def _check_tensor(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device, grad_enabled: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {_shape(tensor)}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device}, the sample's device, got {tensor.device}")
    if grad_enabled and tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that requires no grad, as the step is not differentiable, got one that does; "
            "sample under torch.no_grad() or detach it"
        )


def _dense_within_sample(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements of one sample fill one block of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(strides[1:], shape[1:], strict=True)):
        if size == 0:
            return True
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_overlap(
    out: Tensor,
    sample: Tensor,
    predictions: list[Tensor],
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    known: Known | None,
) -> bool:
    """Whether the output meets an input at all; refused unless it is that input, element for element.

    Anything else would let the step read what it has already written. What is known is read last, and is apart.
    """
    inputs = [("sample", sample), ("gradient", gradient), ("variance", variance), ("noise", noise)]
    inputs += [(f"predictions[{k}]", prediction) for k, prediction in enumerate(predictions)]
    begin = out.data_ptr()
    end = begin + _extent(out)
    meets = False
    for name, tensor in inputs:
        if tensor is None:
            continue
        place = tensor.data_ptr()
        if place >= end or place + _extent(tensor) <= begin:
            continue
        if not _overlap_is_fine(out, tensor):
            raise ValueError(
                f"out: expected memory apart from {name}, or the same element for element; got a part of it"
            )
        meets = True
    for name, tensor in ({} if known is None else known._asdict()).items():
        if begin and tensor.data_ptr() < end and begin < tensor.data_ptr() + _extent(tensor):
            raise ValueError(f"out: expected memory apart from known.{name}, got an overlap")
    return meets


def check_apart(
    staged: Tensor,
    out: Tensor,
    sample: Tensor,
    predictions: list[Tensor],
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    indices: Tensor | None,
    seeds: Tensor | None,
    known: Known | None,
) -> None:
    """The staged input meets no other tensor: it is written while others are still to be read."""
    begin, end = staged.data_ptr(), staged.data_ptr() + _extent(staged)
    if begin == 0:  # without memory: meta tensors
        return
    names = ["out", "sample", *(f"predictions[{k}]" for k in range(len(predictions)))]
    names += ["gradient", "variance", "noise", "index", "seeds", "known.mask", "known.original", "known.noise"]
    tensors = (out, sample, *predictions, gradient, variance, noise, indices, seeds, *(known or (None, None, None)))
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.data_ptr() < end and begin < tensor.data_ptr() + _extent(tensor):
            raise ValueError(f"staged: expected memory apart from {name}, got an overlap")


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.itemsize if tensor.numel() else 0


def _overlap_is_fine(out: Tensor, tensor: Tensor) -> bool:
    if out.data_ptr() == 0:  # without memory: meta tensors
        return True
    batch = out.shape[0]
    run, other_run = (out.numel() // batch * t.itemsize for t in (out, tensor))
    stride, other_stride = (t.stride(0) * t.itemsize if batch > 1 else 0 for t in (out, tensor))
    distance = tensor.data_ptr() - out.data_ptr()
    if stride != other_stride or tensor.shape != out.shape:
        return False
    if distance == 0:
        return out.itemsize == tensor.itemsize
    # else interleaved, as two channel groups of one tensor are
    return stride > 0 and distance % stride >= run and stride - distance % stride >= other_run


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
