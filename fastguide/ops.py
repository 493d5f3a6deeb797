"""The step as a torch operator: schema, fake, checks, and ``guided_step``, the public function over it.

``torch.ops.fastguide.guided_step`` is defined here once; backends implement it and enter themselves in ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import reference
from .guidance import Guidance
from .table import StepTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of samples, predictions, gradients, variances, noise and outputs, in any combination."""

_library = torch.library.Library("fastguide", "DEF")
_library.define(
    "guided_step(Tensor(a!) out, Tensor(b!)? original, Tensor sample, Tensor[] predictions, Tensor rows, "
    "Tensor weights, SymInt index, Tensor? indices, Tensor? gradient, Tensor? variance, Tensor? noise) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("guided_step", reference.guided_step, "CompositeExplicitAutograd")


def _guided_step_fake(*_arguments: object) -> None:
    """Writes to ``out`` and ``original``, whose shapes the caller has set: nothing is left to infer."""


torch.library.register_fake("fastguide::guided_step", _guided_step_fake, lib=_library)


StepFunction = Callable[..., None]


class Backend(NamedTuple):
    """One implementation of the step.

    ``devices`` are the device types that it serves here and now, the best choice for those in ``default_for``;
    ``status`` says in a line what it is, or why it serves none.
    """

    name: str
    step: StepFunction
    devices: tuple[str, ...]
    default_for: tuple[str, ...]
    status: str


BACKENDS: dict[str, Backend] = {}
_default_steps: dict[str, StepFunction] = {}


def register_backend(backend: Backend) -> None:
    """Enter a backend; for each device type the first one that asks to be its default is."""
    BACKENDS[backend.name] = backend
    for device in backend.default_for:
        _default_steps.setdefault(device, backend.step)


def default_backend(device: torch.device | str) -> str:
    """Name of the backend that serves a device when none is named."""
    step = _default_steps.get(torch.device(device).type, reference.guided_step)
    return next(name for name, backend in BACKENDS.items() if backend.step is step)


_UNGUIDED = Guidance(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64), None)


@overload
def guided_step(
    table: StepTable,
    index: int | Tensor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None = None,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_original: Literal[False] = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def guided_step(
    table: StepTable,
    index: int | Tensor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None = None,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_original: Literal[True],
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def guided_step(
    table: StepTable,
    index: int | Tensor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None = None,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_original: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of guided sampling: combine the predictions, add the gradient, apply the solver's row, add the noise.

    One pass over memory. Arithmetic is in float32 (in float64 if the sample is), rounded once to the output's dtype.

    Args:
        table: from ``ddpm`` or ``ddim``, on the sample's device.
        index: the step, 0 to ``len(table) - 1``: an int, or an int64 tensor on the sample's device, of shape () or,
            one per sample, (batch,). A tensor's value is never read on the host.
        sample: x_t, shape (batch, ...), dense within a sample (contiguous, channels_last, ...), any batch stride.
        predictions: what the model returned, one tensor of the sample's shape for each weight of the guidance, laid
            out within a sample as the sample is; or one tensor with all of them along the batch,
            ``cat([unconditional, conditional])``.
        guidance: ``ClassifierFree``, ``Composed``, ``Classifier``, a sum of them, or ``None`` for one prediction.
        gradient: ``grad_x log p(y | x_t)``, required with a ``Classifier``; see ``Classifier.gradient``.
        variance: the model's variance output, required by tables of ``learned`` and ``learned_range``.
        noise: standard normal values. Where the row adds noise, either ``noise`` or ``generator`` is required.
        generator: draws the noise: the values of ``torch.randn(sample.shape, dtype=sample.dtype,
            generator=generator)``, and the generator is left as that leaves it. Nothing is drawn where an int index
            names a row without noise. ``torch.default_generator`` is torch's global one.
        return_original: also return the predicted (clipped) original sample x_0.
        out: where to write the next sample; it may be the sample itself. Otherwise a new tensor like the sample.
        backend: ``"native"`` or ``"reference"``; ``None``: the best for the device, see ``fastguide info``.

    Returns:
        x_{t-1}, or ``(x_{t-1}, x_0)`` with ``return_original=True``, both of ``out``'s dtype (the sample's).

    Raises:
        TypeError, ValueError, IndexError: an argument is not as described; the message names it, what was expected
            and what came. Nothing has been computed then, and no noise drawn.

    >>> from fastguide import ClassifierFree, NoiseSchedule, ddim
    >>> table, x = ddim(NoiseSchedule.linear(), 50), torch.randn(2, 3, 8, 8)
    >>> uncond, cond = torch.randn(2, 2, 3, 8, 8)
    >>> guided_step(table, 0, x, [uncond, cond], ClassifierFree(7.5)).shape
    torch.Size([2, 3, 8, 8])
    """
    guidance = _UNGUIDED if guidance is None else guidance
    inputs = [predictions] if isinstance(predictions, Tensor) else list(predictions)
    _check_kinds(table, sample, inputs, guidance, out)
    row, indices = _check_index(table, index, sample)
    adds_noise = _adds_noise(table, row, noise)
    if not adds_noise:
        noise = generator = None
    _check_roles(table, guidance, inputs, sample, gradient, variance, noise, generator, adds_noise)
    _check_layouts(sample, inputs, gradient, variance, noise, out)
    step = _step_function(backend, sample.device.type)

    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    rows = table.device_rows(guidance.form, dtype)
    weights = guidance.weights(sample.device, dtype)
    fresh = out is None
    if out is None:
        out = torch.empty_like(sample, memory_format=torch.preserve_format)
    original = torch.empty_like(out) if return_original else None
    if generator is not None:
        noise = _draw_noise(generator, sample, out, fresh, [sample, *inputs, gradient, variance])
    step(out, original, sample, inputs, rows, weights, row or 0, indices, gradient, variance, noise)
    return out if original is None else (out, original)


def _check_kinds(
    table: StepTable, sample: Tensor, predictions: list[Tensor], guidance: Guidance, out: Tensor | None
) -> None:
    if not isinstance(table, StepTable):
        raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance: expected a Guidance such as ClassifierFree(7.5), got {type(guidance).__name__}")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
    for k, prediction in enumerate(predictions):
        if not isinstance(prediction, Tensor):
            raise TypeError(f"predictions[{k}]: expected a tensor, got {type(prediction).__name__}")
    if sample.dim() == 0:
        raise ValueError("sample: expected shape (batch, ...), got a tensor without dimensions")
    if sample.device != table.device:
        raise ValueError(f"table: expected it on {sample.device}, the sample's device, got {table.device}; use .to()")
    batch, count = sample.shape[0], guidance.num_predictions
    if not table.takes_predictions:
        if predictions:
            raise ValueError(f"predictions: {table.name} takes none, got {len(predictions)}")
    elif len(predictions) != count and not (len(predictions) == 1 and predictions[0].shape[:1] == (batch * count,)):
        raise ValueError(
            f"predictions: expected {count}, one for each weight of the guidance, or one tensor of batch "
            f"{batch} * {count}; got {len(predictions)} of shape {_shape(predictions[0]) if predictions else '-'}"
        )
    if guidance.batch not in (1, batch):
        raise ValueError(f"guidance: expected scales for 1 or {batch} samples, got {guidance.batch}")
    if guidance.steps not in (1, len(table)):
        raise ValueError(
            f"guidance: expected scales for 1 or {len(table)} steps, those of the table, got {guidance.steps}"
        )


def _check_index(table: StepTable, index: int | Tensor, sample: Tensor) -> tuple[int | None, Tensor | None]:
    """The row as a host int, or the step indices as a tensor."""
    if isinstance(index, Tensor):
        if index.dtype != torch.int64:
            raise TypeError(f"index: expected an int or an int64 tensor, got {index.dtype}")
        if index.dim() > 1 or (index.dim() == 1 and index.shape[0] != sample.shape[0]):
            raise ValueError(f"index: expected shape () or ({sample.shape[0]},), got {_shape(index)}")
        if index.device != sample.device:
            raise ValueError(f"index: expected it on {sample.device}, the sample's device, got {index.device}")
        return None, index
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"index: expected an int or an int64 tensor, got {type(index).__name__}")
    if not 0 <= index < len(table):
        raise IndexError(f"index: expected 0 to {len(table) - 1} for a table of {len(table)} steps, got {index}")
    return index, None


def _adds_noise(table: StepTable, row: int | None, noise: Tensor | None) -> bool:
    """Whether the row adds noise, as far as the host knows; where it does not know, the row multiplies by zero."""
    if not table.adds_noise_anywhere:
        return False
    if row is None or (noise is not None and torch.compiler.is_compiling()):  # looking it up would compile each step
        return True
    return table.adds_noise[row]


def _check_roles(
    table: StepTable,
    guidance: Guidance,
    predictions: list[Tensor],
    sample: Tensor,
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
    adds_noise: bool,
) -> None:
    """Each optional input is there exactly where the table and the guidance have a use for it."""
    if gradient is None and guidance.form is not None:
        raise ValueError("gradient: expected a tensor, as the guidance has a Classifier, got None")
    if gradient is not None and guidance.form is None:
        raise ValueError("gradient: expected None, as the guidance has no Classifier to say its scale and form")
    if variance is None and table.learned_variance:
        raise ValueError(f"variance: expected the model's variance output, as this {table.name} learns it, got None")
    if variance is not None and not table.learned_variance:
        raise ValueError(f"variance: expected None, as this {table.name} has a fixed variance")
    if noise is not None and generator is not None:
        raise ValueError("noise: expected either noise or a generator, got both")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != sample.device.type:
            raise ValueError(f"generator: expected one of {sample.device.type}, got one of {generator.device}")
    elif noise is None and adds_noise:
        raise ValueError(
            "noise: this step adds noise; expected noise=, or generator= (torch.default_generator for the global one)"
        )


def _check_layouts(
    sample: Tensor,
    predictions: list[Tensor],
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
    out: Tensor | None,
) -> None:
    shape, strides, device = sample.shape, sample.stride(), sample.device
    grad_enabled = torch.is_grad_enabled()
    _check_tensor("sample", sample, shape, device, grad_enabled)
    if not (sample.is_contiguous() or _dense_within_sample(shape, strides)):
        raise ValueError(
            f"sample: expected it dense within a sample (contiguous, channels_last, ...), got strides {strides} "
            f"for shape {tuple(shape)}; use .contiguous()"
        )
    if len(predictions) == 1 and predictions[0].shape[:1] != shape[:1]:  # all of them along the batch
        _check_operand(
            "predictions", predictions[0], (predictions[0].shape[0], *shape[1:]), strides, device, grad_enabled
        )
    else:
        for k, prediction in enumerate(predictions):
            _check_operand(f"predictions[{k}]", prediction, shape, strides, device, grad_enabled)
    for name, tensor in (("gradient", gradient), ("variance", variance), ("noise", noise), ("out", out)):
        if tensor is not None:
            _check_operand(name, tensor, shape, strides, device, grad_enabled)
    if out is not None and out.shape[0] > 1 and out.numel() and out.stride(0) < out.numel() // out.shape[0]:
        raise ValueError(f"out: expected samples that do not overlap, got strides {out.stride()}")


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


def _step_function(backend: str | None, device: str) -> StepFunction:
    if backend is None:
        return _default_steps.get(device, reference.guided_step)
    chosen = BACKENDS.get(backend)
    if chosen is None:
        raise ValueError(f"backend: expected one of {tuple(BACKENDS)}, got {backend!r}")
    if device not in chosen.devices:
        raise ValueError(f"backend: {backend!r} does not serve a sample on {device!r} here: {chosen.status}")
    return chosen.step


def _draw_noise(
    generator: torch.Generator, sample: Tensor, out: Tensor, fresh: bool, inputs: Sequence[Tensor | None]
) -> Tensor:
    """torch's own noise: in the output's memory if that may be overwritten, so that nothing is allocated."""
    if out.dtype == sample.dtype and out.is_contiguous():
        if not fresh:
            place = out.untyped_storage().data_ptr()
            fresh = all(t is None or t.untyped_storage().data_ptr() != place for t in inputs)
        if fresh:
            return out.normal_(generator=generator)
    noise = torch.randn(sample.shape, dtype=sample.dtype, device=sample.device, generator=generator)
    return noise if sample.is_contiguous() else torch.empty_like(sample).copy_(noise)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
