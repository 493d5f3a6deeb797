"""What ``guided_step`` refuses: every message names the argument, what was expected and what came.

Nothing here reads a device value on the host; index values and memory are looked at where they are on the host already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..guidance import Guidance
from ..guidance.moment_weights import MomentWeights
from ..guidance.momentum import check_without_momentum
from ..solvers.table import StepTable
from .backends.registry import Backend
from .cursor import CURSOR_COLUMNS, Cursor
from .history import History, check_history, entries_of
from .inpainting import Inpainting
from .memory import DTYPES, counted_layout, dense_within_sample, empty_like, same_layout
from .noise import DeviceGenerator
from .operator import ELEMENTWISE, NAMES, StepArguments, elementwise
from .overlaps import check_memory
from .thresholds import makes_weights_in_step, thresholds_for, with_thresholds
from .weigh import scratch_of, weighed

Generator: TypeAlias = "torch.Generator | DeviceGenerator"


_NOT_INPAINTING = (None, None, None)


def validate(
    backend: Backend,
    table: StepTable,
    index: int | Tensor | Cursor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance,
    optional_inputs: tuple[Tensor | None, ...],
    noise: Tensor | None,
    generator: Generator | None,
    seeds: Tensor | None,
    inpainting: Inpainting | None,
    history: History | None,
    anchor: Tensor | None,
    original: Tensor | None,
    out: Tensor | None,
    staged: Tensor | None,
    before_weights: Callable[[StepArguments], None] | None = None,
) -> tuple[StepArguments, Generator | None]:
    """Refuse what is not as ``guided_step`` describes it; return the operator's arguments.

    ``optional_inputs``: the fields of ``StepArguments`` from ``gradient`` up to ``noise``. ``before_weights``: called
    with the arguments when nothing is refused any more, before anything is made of the predictions.

    Returns:
        The arguments, without noise that is still to be drawn; and the generator to draw it from, if there is one.
    """
    inputs = as_list(predictions)
    check_without_momentum(guidance)
    stacked = _check_predictions(table, sample, inputs, guidance)
    check_number(backend, sample.device, guidance)
    row, indices, cursor = _check_position(table, index, sample, out)
    adds_noise = _adds_noise(table, row, noise)
    gradient, variance, *_ = optional_inputs
    _check_roles(table, guidance, gradient, variance)
    if adds_noise or noise is not None or generator is not None or seeds is not None:
        _check_noise(sample, noise, generator, seeds, adds_noise)
    if inpainting is not None:
        _check_inpainting(inpainting)
    if history is not None or table.history_slots:
        check_history(history, table, index, sample)
    if not adds_noise:
        if noise is not None:
            check_operand("noise", noise, sample, torch.is_grad_enabled())
        noise = generator = seeds = None

    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    state, timestep = (None, None) if cursor is None else (cursor.state, cursor.timestep)
    mask, known, known_noise = _NOT_INPAINTING if inpainting is None else inpainting
    arguments = StepArguments._make((  # half the time of a call by position
        empty_like(sample) if out is None else out, original, staged, sample, inputs,
        table.device_rows(guidance.form, dtype, anchor is not None), guidance.weights(sample.device, dtype), row or 0,
        indices, *optional_inputs, noise, seeds, None, 0, state, timestep, mask, known, known_noise,
        anchor, entries_of(history), None, None, None, None, None,
    ))  # fmt: skip
    _check_layouts(arguments, stacked, out)
    if generator is not None:
        _check_that_it_can_draw(generator, backend, sample, cursor)
    writes = out is not None or original is not None or staged is not None or history is not None
    explained = staged is not None or history is not None or generator is not None or not backend.checks_overlap
    explained = explained or before_weights is not None  # which a kernel's refusal would come too late for
    if writes and explained and not torch.compiler.is_compiling():
        check_memory(arguments)
    if before_weights is not None:
        before_weights(arguments)
    if guidance.weights_from is not None:
        arguments = _with_weights_from(backend, arguments, guidance, table.thresholds)
    if table.thresholds:
        arguments = with_thresholds(backend, arguments._replace(inverse_thresholds=thresholds_for(sample, dtype)))
    return arguments, generator


def device_of(name: str, tensor: Tensor) -> torch.device:
    """Return the tensor's device; refuse anything that is not a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    return tensor.device


# ---- Predictions and guidance ----


def as_list(predictions: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return predictions as a list; refuse what is neither a tensor nor a sequence."""
    if type(predictions) is list:
        return predictions
    if isinstance(predictions, Tensor):
        return [predictions]
    if not isinstance(predictions, Sequence):
        raise TypeError(f"predictions: expected a tensor or a sequence of them, got {type(predictions).__name__}")
    return list(predictions)


def _check_predictions(table: StepTable, sample: Tensor, predictions: list[Tensor], guidance: Guidance) -> bool:
    """Tell whether one tensor holds all predictions along its batch; refuse them if they fit in neither way."""
    if not isinstance(table, StepTable):
        raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance: expected a Guidance such as ClassifierFree(7.5), got {type(guidance).__name__}")
    if sample.dim() == 0:
        raise ValueError("sample: expected shape (batch, ...), got a tensor without dimensions")
    if sample.device != table.device:
        raise ValueError(f"table: expected it on {sample.device}, the sample's device, got {table.device}; use .to()")
    batch, count = sample.shape[0], guidance.num_predictions
    check_guidance(table, guidance, batch)
    if not table.takes_predictions:
        if guidance.weights_from is not None:
            raise ValueError(f"guidance: {table.name} takes no predictions to make weights from")
        if predictions:
            raise ValueError(f"predictions: {table.name} takes none, got {len(predictions)}")
        return False
    if len(predictions) == count:
        return False
    first = predictions[0] if len(predictions) == 1 else None
    if isinstance(first, Tensor) and first.dim() > 0 and first.size(0) == batch * count:
        return True
    for k, prediction in enumerate(predictions):
        device_of(f"predictions[{k}]", prediction)
    raise ValueError(
        f"predictions: expected {count}, one for each weight of the guidance, or one tensor of batch "
        f"{batch} * {count}; got {len(predictions)} of shape {_shape(predictions[0]) if predictions else '-'}"
        + ("; several need guidance=, such as ClassifierFree(7.5)" if count == 1 and len(predictions) > 1 else "")
    )


def check_guidance(table: StepTable, guidance: Guidance, batch: int) -> None:
    """Refuse scales that fit neither the batch nor the table."""
    if guidance.batch not in (1, batch):
        raise ValueError(f"guidance: expected scales for 1 or {batch} samples, got {guidance.batch}")
    if guidance.steps not in (1, len(table)):
        raise ValueError(
            f"guidance: expected scales for 1 or {len(table)} steps, those of the table, got {guidance.steps}"
        )


def check_number(backend: Backend, device: torch.device, guidance: Guidance) -> None:
    """Refuse more predictions than a backend's kernel takes on a GPU."""
    most, count = backend.most_predictions, guidance.num_predictions
    if device.type == "cuda" and most is not None and count > most:
        raise ValueError(f"guidance: expected at most {most} predictions on a GPU ({backend.name}), got {count}")


def _with_weights_from(
    backend: Backend, arguments: StepArguments, guidance: Guidance, thresholds: bool
) -> StepArguments:
    """Add the weights that are made of the predictions, or what a backend makes them with in its step."""
    made_by, sample, dtype = guidance.weights_from, arguments.sample, arguments.rows.dtype
    if isinstance(made_by, MomentWeights):
        program, parameters = made_by.on(sample.device)
        if not makes_weights_in_step(backend, made_by, sample, thresholds):
            return weighed(arguments, made_by, parameters)
        made, scratch = made_by.place_for(sample, dtype), scratch_of(backend, made_by, sample)
        return arguments._replace(program=program, parameters=parameters, made=made, scratch=scratch)
    return arguments._replace(weights=guidance.weights_for(arguments.predictions, sample.device, dtype))


def _check_roles(table: StepTable, guidance: Guidance, gradient: Tensor | None, variance: Tensor | None) -> None:
    """Refuse a gradient or variance that is not used, or the lack of one that is needed."""
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


def _check_inpainting(inpainting: Inpainting) -> None:
    if not isinstance(inpainting, Inpainting):
        raise TypeError(f"inpainting: expected an Inpainting, got {type(inpainting).__name__}")
    for name, tensor in inpainting._asdict().items():
        device_of(f"inpainting.{name}", tensor)


# ---- Where in the table ----


def _check_position(
    table: StepTable, index: int | Tensor | Cursor, sample: Tensor, out: Tensor | None
) -> tuple[int | None, Tensor | None, Cursor | None]:
    """Return the row as a number, as a tensor or as a cursor; the others are None."""
    if isinstance(index, int) and not isinstance(index, bool):
        check_row(table, index)
        return index, None, None
    if isinstance(index, Tensor):
        _check_indices(table, index, sample)
        return None, index, None
    if isinstance(index, Cursor):
        _check_cursor(table, index, sample, out)
        return None, None, index
    raise TypeError(f"index: expected an int, an int64 tensor or a Cursor, got {type(index).__name__}")


def _check_indices(table: StepTable, index: Tensor, sample: Tensor) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"index: expected an int or an int64 tensor, got {index.dtype}")
    if index.dim() > 1 or (index.dim() == 1 and index.shape[0] != sample.shape[0]):
        raise ValueError(f"index: expected shape () or ({sample.shape[0]},), got {_shape(index)}")
    if index.device != sample.device:
        raise ValueError(f"index: expected it on {sample.device}, the sample's device, got {index.device}")
    if index.device.type == "cpu" and not torch.compiler.is_compiling():  # on the host: nothing waits
        for value in index.reshape(-1).tolist():
            check_row(table, value)


def _check_cursor(table: StepTable, cursor: Cursor, sample: Tensor, out: Tensor | None) -> None:
    if out is not sample:
        got = "None" if out is None else "another tensor"
        raise ValueError(f"out: expected the sample itself with a Cursor, which leaves finished samples, got {got}")
    if cursor.batch not in (None, sample.shape[0]):
        raise ValueError(f"index: expected a Cursor for {sample.shape[0]} samples or one for all, got {cursor.batch}")
    if table.timesteps.is_floating_point() and not cursor.timestep.is_floating_point():
        raise ValueError("index: expected a Cursor with timestep_dtype=torch.float32 for a table of real timesteps")
    if cursor.device != sample.device:
        raise ValueError(f"index: expected a Cursor on {sample.device}, the sample's device, got {cursor.device}")
    if cursor.device.type == "cpu" and not torch.compiler.is_compiling():
        for index, end in cursor.state[:, : CURSOR_COLUMNS.index("first")].tolist():
            if index < end:
                check_row(table, index)


def check_row(table: StepTable, index: int) -> None:
    """Refuse a row that the table does not have, or at which its solver is not defined."""
    if not 0 <= index < len(table):
        raise IndexError(f"index: expected 0 to {len(table) - 1} for a table of {len(table)} steps, got {index}")
    if table.undefined_rows and index in table.undefined_rows:
        raise ValueError(f"index: expected a step at which {table.name} is defined, got {index}: {table.undefined}")


# ---- Noise ----


def _adds_noise(table: StepTable, row: int | None, noise: Tensor | None) -> bool:
    """Tell whether the row adds noise; True where the host does not know, and the row's factor may be 0."""
    if not table.adds_noise_anywhere:
        return False
    if row is None or (noise is not None and torch.compiler.is_compiling()):  # looking it up would compile each step
        return True
    return table.adds_noise[row]


def _check_noise(
    sample: Tensor, noise: Tensor | None, generator: Generator | None, seeds: Tensor | None, adds_noise: bool
) -> None:
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


def _check_generator(generator: Generator, sample: Tensor) -> None:
    if not isinstance(generator, (torch.Generator, DeviceGenerator)):
        raise TypeError(f"generator: expected a torch.Generator or a DeviceGenerator, got {type(generator).__name__}")
    device, expected = generator.device, sample.device
    current = device.type == expected.type and device.index is None  # torch takes it for the current device
    drawn_and_copied = isinstance(generator, torch.Generator) and device.type == "cpu" and expected.type == "cuda"
    if not (device == expected or current or drawn_and_copied):
        raise ValueError(f"generator: expected one of {expected}, the sample's device, got one of {device}")


def _check_that_it_can_draw(generator: Generator, backend: Backend, sample: Tensor, cursor: Cursor | None) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("generator: torch.compile takes none; expected noise= or seeds=")
    if isinstance(generator, DeviceGenerator):
        check_device_generator(backend.name, backend.torch_stream, sample, cursor)


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
    """Refuse what a DeviceGenerator cannot serve: only a kernel on a GPU can draw from it."""
    if cursor is not None and cursor.batch is not None:
        raise ValueError("generator: expected seeds with a Cursor for several samples, as a generator's stream is one")
    if not torch_stream or sample.device.type != "cuda":
        raise ValueError(f"generator: the backend {backend!r} takes no DeviceGenerator for a sample on {sample.device}")
    if sample.dtype == torch.float64 or sample.nbytes >= 2**31 or not counted_layout(sample):
        raise ValueError(
            "generator: a DeviceGenerator expects a sample of float32, bfloat16 or float16, contiguous or "
            f"channels_last, below 2 GiB; got {sample.dtype}, strides {sample.stride()}, {sample.nbytes} bytes"
        )


# ---- Shapes, dtypes, devices, layouts, autograd ----


def _check_layouts(arguments: StepArguments, stacked: bool, out: Tensor | None) -> None:
    """Refuse tensors without one element for each of the sample's, in its order; ``out``: None if it is new."""
    sample, grad_enabled = arguments.sample, torch.is_grad_enabled()
    check_sample("sample", sample, grad_enabled)
    shape, strides, device = sample.shape, sample.stride(), sample.device
    new = arguments.out if out is None else None
    fit = True  # nearly always; the slower check words what is wrong
    for tensor in elementwise(arguments):
        if not (tensor is None or tensor is sample or tensor is new):
            fit = fit and _fits(tensor, shape, strides, device, grad_enabled)
    expected = (arguments.predictions[0].shape[0], *shape[1:]) if stacked else shape
    for tensor in arguments.predictions:
        fit = fit and _fits(tensor, expected, strides, device, grad_enabled)
    if not fit:
        _check_operands(arguments, stacked)
    if shape[0] > 1 and (out is not None or arguments.original is not None):
        _check_separate_samples("out", arguments.out)
        if arguments.original is not None:
            _check_separate_samples("original", arguments.original)
    if arguments.staged is not None:
        _check_staged(arguments.staged, sample, grad_enabled)


def _fits(
    tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device, grad_enabled: bool
) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.stride() == strides
        and tensor.dtype in DTYPES
        and tensor.device == device
        and not (grad_enabled and tensor.requires_grad)
    )


def _check_operands(arguments: StepArguments, stacked: bool) -> None:
    grad_enabled = torch.is_grad_enabled()
    if stacked:
        (prediction,) = arguments.predictions
        whole = (prediction.shape[0], *arguments.sample.shape[1:])
        check_operand("predictions", prediction, arguments.sample, grad_enabled, whole)
    else:
        for k, prediction in enumerate(arguments.predictions):
            check_operand(f"predictions[{k}]", prediction, arguments.sample, grad_enabled)
    for name in ELEMENTWISE:
        tensor = getattr(arguments, name)
        if tensor is not None:
            check_operand(NAMES.get(name, name), tensor, arguments.sample, grad_enabled)


def _check_staged(staged: Tensor, sample: Tensor, grad_enabled: bool) -> None:
    batch = sample.shape[0]
    if not isinstance(staged, Tensor):
        raise TypeError(f"staged: expected a tensor, got {type(staged).__name__}")
    copies = staged.shape[0] // batch if batch and staged.dim() else 1
    if copies == 0 or staged.dim() == 0 or staged.shape[0] != copies * batch:
        raise ValueError(f"staged: expected shape (a multiple of {batch}, ...), got {_shape(staged)}")
    check_operand("staged", staged, sample, grad_enabled, (copies * batch, *sample.shape[1:]))
    _check_separate_samples("staged", staged)


def _check_separate_samples(name: str, out: Tensor) -> None:
    if out.shape[0] > 1 and out.numel() and out.stride(0) < out.numel() // out.shape[0]:
        raise ValueError(f"{name}: expected samples that do not overlap, got strides {out.stride()}")


def check_sample(name: str, sample: Tensor, grad_enabled: bool) -> None:
    """Refuse a sample of another dtype or layout, or one that autograd follows."""
    if sample.dtype not in DTYPES or (grad_enabled and sample.requires_grad):
        _check_tensor(name, sample, sample.shape, sample.device, grad_enabled)
    if not (sample.is_contiguous() or dense_within_sample(sample.shape, sample.stride())):
        raise ValueError(
            f"{name}: expected it dense within a sample (contiguous, channels_last, ...), got strides "
            f"{sample.stride()} for shape {_shape(sample)}; use .contiguous()"
        )


def check_operand(
    name: str, tensor: Tensor, sample: Tensor, grad_enabled: bool, shape: Sequence[int] | None = None
) -> None:
    """Refuse a tensor without one element for each of the sample's, in its order, or of another device or dtype."""
    _check_tensor(name, tensor, sample.shape if shape is None else shape, sample.device, grad_enabled)
    if not same_layout(tensor, sample):
        raise ValueError(
            f"{name}: expected the sample's layout within a sample, strides {sample.stride()[1:]}, got "
            f"{tensor.stride()[1:]}; use .contiguous() or .to(memory_format=...)"
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
            f"{name}: expected a tensor that requires no grad, as nothing is recorded, got one that does; detach it"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
