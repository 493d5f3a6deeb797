"""The step as a torch operator: schema, fake, and ``guided_step``, the public function over it.

``torch.ops.fastguide.guided_step`` is defined here once; backends implement it and enter themselves in ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks, reference
from .guidance import Guidance
from .table import StepTable

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

    ``devices`` are the device types that it serves here and now, ``None`` all; ``status`` says in a line what it is,
    or why it serves none.
    """

    name: str
    step: StepFunction
    devices: tuple[str, ...] | None
    status: str

    def serves(self, device: str) -> bool:
        """Whether it serves a type of device here and now."""
        return self.devices is None or device in self.devices


BACKENDS: dict[str, Backend] = {}
_default_steps: dict[str, StepFunction] = {}


def register_backend(backend: Backend) -> None:
    """Enter a backend: the default of those devices that none before it serves."""
    BACKENDS[backend.name] = backend
    for device in backend.devices or ():
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
            one per sample, (batch,). The host never waits for a device to read it; on the CPU it is checked.
        sample: x_t, shape (batch, ...), dense within a sample (contiguous, channels_last, ...), any batch stride.
        predictions: what the model returned (without autograd, as under ``torch.no_grad()``: the step is not
            differentiable), one tensor of the sample's shape for each weight of the guidance, laid
            out within a sample as the sample is; or one tensor with all of them along the batch,
            ``cat([unconditional, conditional])``.
        guidance: ``ClassifierFree``, ``Composed``, ``Classifier``, a sum of them, or ``None`` for one prediction.
        gradient: ``grad_x log p(y | x_t)``, required with a ``Classifier``; see ``Classifier.gradient``.
        variance: the model's variance output, required by tables of ``learned`` and ``learned_range``; with several
            conditions usually that of the conditional prediction.
        noise: standard normal values. Where the row adds noise, either ``noise`` or ``generator`` is required; where
            it adds none, neither is read.
        generator: draws the noise: the values of ``torch.randn(sample.shape, dtype=sample.dtype,
            generator=generator)``, and the generator is left as that leaves it. Nothing is drawn where an int index
            names a row without noise. ``torch.default_generator`` is torch's global one. Not under torch.compile,
            which takes no generators: pass ``noise``.
        return_original: also return the predicted (clipped) original sample x_0.
        out: where to write the next sample; it may be one of the inputs, whole. Otherwise a new tensor like the sample.
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
    inputs = checks.listed(predictions)
    together = checks.check_kinds(table, sample, inputs, guidance)
    row, indices = checks.check_index(table, index, sample)
    adds_noise = _adds_noise(table, row, noise)
    checks.check_roles(table, guidance, sample, gradient, variance, noise, generator, adds_noise)
    checks.check_layouts(sample, inputs, together, gradient, variance, noise, out)
    step = _step_function(backend, sample.device.type)
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    rows = table.device_rows(guidance.form, dtype)
    weights = guidance.weights(sample.device, dtype)
    if not adds_noise:
        noise = generator = None

    compiling = torch.compiler.is_compiling()
    if compiling and generator is not None:
        raise ValueError("generator: torch.compile takes none; expected noise=, such as torch.randn_like(sample)")
    apart = out is None  # whether the output shares no memory with an input: then noise may be drawn into it
    if out is None:
        out = _empty_like(sample)
    elif not compiling:
        if generator is not None or step is reference.guided_step:
            apart = not checks.check_overlap(out, sample, inputs, gradient, variance, noise)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # autograd shall notice if it has saved this tensor
    original = _empty_like(out) if return_original else None
    if generator is not None:
        noise = _draw_noise(generator, sample, out if apart else None)
    try:
        step(out, original, sample, inputs, rows, weights, row or 0, indices, gradient, variance, noise)
    except RuntimeError:
        if not compiling:  # the kernel refuses overlaps before it writes; here are the words for it
            checks.check_overlap(out, sample, inputs, gradient, variance, noise)
        raise
    return out if original is None else (out, original)


def check_run(table: StepTable, name: str, sample: Tensor, guidance: Guidance | None, backend: str | None) -> None:
    """Refuse, before a model is called, what ``guided_step`` would refuse after it; ``name`` is the sample's."""
    guidance = _UNGUIDED if guidance is None else guidance
    if sample.device != table.device:
        raise ValueError(f"table: expected it on {sample.device}, the device of {name}, got {table.device}; use .to()")
    checks.check_guidance(table, guidance, sample.shape[0])
    checks.check_sample(name, sample, torch.is_grad_enabled())
    _step_function(backend, sample.device.type)
    table.device_rows(guidance.form, torch.float32)


def _adds_noise(table: StepTable, row: int | None, noise: Tensor | None) -> bool:
    """Whether the row adds noise, as far as the host knows; where it does not know, the row multiplies by zero."""
    if not table.adds_noise_anywhere:
        return False
    if row is None or (noise is not None and torch.compiler.is_compiling()):  # looking it up would compile each step
        return True
    return table.adds_noise[row]


def _step_function(backend: str | None, device: str) -> StepFunction:
    if backend is None:
        return _default_steps.get(device, reference.guided_step)
    chosen = BACKENDS.get(backend)
    if chosen is None:
        raise ValueError(f"backend: expected one of {tuple(BACKENDS)}, got {backend!r}")
    if not chosen.serves(device):
        raise ValueError(f"backend: {backend!r} does not serve a sample on {device!r} here: {chosen.status}")
    return chosen.step


def _empty_like(sample: Tensor) -> Tensor:
    """A new tensor in the sample's layout within a sample, samples one after the other."""
    if sample.is_contiguous():
        return torch.empty_like(sample)
    strides = (sample.numel() // max(sample.shape[0], 1), *sample.stride()[1:])
    return torch.empty_strided(sample.shape, strides, dtype=sample.dtype, device=sample.device)


def _draw_noise(generator: torch.Generator, sample: Tensor, place: Tensor | None) -> Tensor:
    """torch's own noise: in a place that may be overwritten, if its values may stand there, else in new memory."""
    if place is not None and place.dtype == sample.dtype and place.is_contiguous():
        return place.normal_(generator=generator)
    noise = torch.randn(sample.shape, dtype=sample.dtype, device=sample.device, generator=generator)
    return noise if sample.is_contiguous() else _empty_like(sample).copy_(noise)
