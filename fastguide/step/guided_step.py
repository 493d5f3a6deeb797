"""``guided_step``: the public function over the operator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..guidance import Guidance
from ..guidance.weights import UNGUIDED
from ..solvers.table import StepTable
from . import checks
from .autograd import asks_for_gradients, recorded_step, to_be_recorded
from .backends.registry import backend_for
from .call import Call
from .cursor import Cursor
from .draw import draw
from .history import History, entries_of, history_follows
from .inpainting import Inpainting
from .log_probability import Reduction, step_with_log_prob
from .momentum import Momentum, momentum_terms
from .noise import DeviceGenerator
from .overlaps import check_memory
from .repeat import kinds_of, remember, repeat, token_of


@overload
def guided_step(
    table: StepTable,
    index: int | Tensor | Cursor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None = None,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | DeviceGenerator | None = None,
    seeds: Tensor | None = None,
    inpainting: Inpainting | None = None,
    history: History | None = None,
    momentum: Momentum | None = None,
    anchor: Tensor | None = None,
    original: Tensor | None = None,
    out: Tensor | None = None,
    staged: Tensor | None = None,
    backend: str | None = None,
    return_log_prob: Literal[False] = False,
) -> Tensor: ...


@overload
def guided_step(
    *arguments: Any, return_log_prob: Literal[True, "mean", "sum"], **options: Any
) -> tuple[Tensor, Tensor]: ...


def guided_step(  # type: ignore[misc]
    table: StepTable,
    index: int | Tensor | Cursor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None = None,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | DeviceGenerator | None = None,
    seeds: Tensor | None = None,
    inpainting: Inpainting | None = None,
    history: History | None = None,
    momentum: Momentum | None = None,
    anchor: Tensor | None = None,
    original: Tensor | None = None,
    out: Tensor | None = None,
    staged: Tensor | None = None,
    backend: str | None = None,
    return_log_prob: bool | Reduction = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Make one step of guided sampling: combine the predictions, apply the solver's row, add the noise.

    One pass over memory. Arithmetic is in float32 (in float64 if the sample is), rounded once to the output's dtype.
    Where gradients are enabled and an input requires one, autograd records the step: see the page on fine-tuning.

    Args:
        table: from a solver such as ``ddim``, on the sample's device.
        index: the step, 0 to ``len(table) - 1``: an int, or an int64 tensor on the sample's device, of shape () or,
            one per sample, (batch,). The host never waits for a device to read it; on the CPU it is checked. Or a
            ``Cursor``, which the step advances; ``out`` then has to be the sample itself.
        sample: x_t, shape (batch, ...), dense within a sample (contiguous, channels_last, ...), any batch stride.
        predictions: what the model returned, one tensor of the sample's shape for each weight of the guidance, laid
            out within a sample as the sample is; or one tensor with all of them along the batch,
            ``cat([unconditional, conditional])``.
        guidance: ``ClassifierFree``, ``Composed``, ``Classifier``, a sum of them, or ``None`` for one prediction.
        gradient: ``grad_x log p(y | x_t)``, required with a ``Classifier``; see ``Classifier.gradient``.
        variance: the model's variance output, required by tables of ``learned`` and ``learned_range``; with several
            conditions usually that of the conditional prediction.
        noise: standard normal values. Where the row adds noise, one of ``noise``, ``generator`` and ``seeds`` is
            required; where it adds none, nothing is read or drawn (with a tensor index, drawn for every step).
        generator: draws the noise: the values of ``torch.randn(sample.shape, dtype=sample.dtype,
            generator=generator)``, and the generator is left as that leaves it. On a GPU they are made inside the
            kernel (but by ``torch.randn`` for tensors beyond 2 GiB, and within captures); a CPU generator draws on the
            CPU, and the noise is copied. ``torch.default_generator`` is torch's global one. Not under torch.compile,
            which takes no generators. A ``DeviceGenerator`` keeps its state on the GPU, for captured graphs.
        seeds: draws the noise from the portable stream: int64 on the sample's device, of shape () or, one per sample,
            (batch,). The values of ``portable_noise(seeds, sample.shape, step=index)``, the same to the bit on every
            device and in every batch. The sample is contiguous or channels_last.
        inpainting: a known image: its part of the next sample is replaced by it, noised to that level.
        history: what earlier steps of the loop left for later ones, for tables with ``history_slots``: a ``History`` of
            the loop's own, which the step reads and writes. With an index on the host, its steps are checked to follow
            each other.
        momentum: what the loop's steps add up, for guidance with momentum: a ``Momentum`` of the loop's own, which the
            step moves on.
        anchor: what the last step wrote, where the caller has changed the sample since: solvers that go back to the
            sample of an earlier call then go back to that. ``None``: the sample itself.
        original: where to write the predicted (clipped) original sample x_0 as well: a tensor of the sample's shape
            and layout within a sample, of any of its dtypes; ``None``: it is not written.
        out: where to write the next sample; it may be one of the inputs, whole, but not ``anchor``. Otherwise a new
            tensor like the sample.
        staged: where to write the next model input as well: the next sample times the row's ``in_scale`` (1 in DDPM
            and DDIM), rounded once to this tensor's dtype, as often as its batch is a multiple of the sample's. Laid
            out within a sample as the sample is; it shares no memory with any other argument, nor with the gaps between
            another's samples.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; ``None``: the best for the device, see ``fastguide
            info``.
        return_log_prob: whether to return the log-probability of the next sample as well, float64 of shape (batch,):
            ``"sum"`` over a sample's elements, or their ``"mean"`` (also ``True``), as the code of DDPO and Flow-GRPO.
            Where gradients are recorded, the next sample is held fixed in it. ``out`` is then apart from the inputs.

    Returns:
        The next sample: ``out``, or a new tensor of the sample's dtype; with ``return_log_prob``, that and its
        log-probability: see ``log_prob_of``.

    Raises:
        TypeError, ValueError, IndexError: an argument is not as described; the message names it, what was expected
            and what came. Nothing has been computed then, and no noise drawn. Only an index on a GPU is looked at by
            the kernel: out of range, it makes the sample NaN.

    >>> from fastguide import ClassifierFree, NoiseSchedule, ddim
    >>> table, x = ddim(NoiseSchedule.linear(), 50), torch.randn(2, 3, 8, 8)
    >>> uncond, cond = torch.randn(2, 2, 3, 8, 8)
    >>> guided_step(table, 0, x, [uncond, cond], ClassifierFree(7.5)).shape
    torch.Size([2, 3, 8, 8])
    """
    add = None
    if momentum is not None:
        given = predictions
        guidance, predictions = momentum_terms(momentum, table, index, sample, given, guidance)
        inputs = gradient, variance, noise, anchor, entries_of(history), *_known_part(inpainting)
        if asks_for_gradients(guidance, predictions, sample, *inputs):
            options: dict[str, Any] = {
                "gradient": gradient, "variance": variance, "noise": noise, "generator": generator, "seeds": seeds,
                "inpainting": inpainting, "history": history, "anchor": anchor, "original": original, "out": out,
                "staged": staged, "backend": backend, "return_log_prob": return_log_prob,
            }  # fmt: skip
            terms = predictions

            def make(sums: Tensor) -> Any:
                return guided_step(table, index, sample, [sums, *terms[1:]], guidance, **options)

            recorded: Tensor | tuple[Tensor, Tensor] = momentum.add_recorded(guided_step, index, given, backend, make)
            return recorded
        predictions = momentum.to_be_written(predictions)
        add = functools.partial(momentum.add, guided_step, index, given, backend)
    call = (
        index, sample, predictions, token_of(guidance), gradient, variance, noise, generator, seeds, inpainting,
        entries_of(history), anchor, original, out, staged, backend,
    )  # fmt: skip
    if return_log_prob is not False:
        return step_with_log_prob(guided_step, table, Call(*call), guidance, history, return_log_prob, add)
    kinds = None
    may_repeat = type(table) is StepTable and add is None and not is_dynamo_compiling()
    if may_repeat and (history is None or history_follows(history, index)):
        kinds = kinds_of.get(table._token)
    if kinds is not None:
        done = repeat(kinds, *call)
        if done is not None:
            if out is not None or original is not None or staged is not None:
                _note_the_write(out, original, staged)
            if history is not None:
                _note_the_step(history, index)
            return done
    chosen = backend_for(backend, checks.device_of("sample", sample).type)
    inputs = gradient, variance, noise, anchor, call[10], *_known_part(inpainting)
    records = asks_for_gradients(guidance, predictions, sample, *inputs)
    used = UNGUIDED if guidance is None else guidance
    if records and isinstance(used, Guidance):
        used = to_be_recorded(used, chosen, sample)
    arguments, generator = (_validate_without_gradients if records else checks.validate)(
        chosen,
        table,
        index,
        sample,
        predictions,
        used,
        (gradient, variance),
        noise,
        generator,
        seeds,
        inpainting,
        history,
        anchor,
        original,
        out,
        staged,
        add,
    )
    if records or (arguments.weights.requires_grad and torch.is_grad_enabled()):
        return recorded_step(chosen, table, guidance, arguments, generator, index, history, out)
    increment = 0
    if generator is not None:
        arguments, increment = draw(arguments, generator, chosen.torch_stream, out_is_new=out is None)
    if torch.compiler.is_compiling():
        chosen.step(*arguments)
        if history is not None:
            history.note(index)
        return arguments.out
    if out is not None or original is not None or staged is not None:
        _note_the_write(out, original, staged)
    try:
        chosen.step(*arguments)
    except RuntimeError:
        check_memory(arguments)  # the kernel has refused an overlap, before it wrote: this says which
        raise
    if increment and isinstance(generator, torch.Generator):
        generator.set_offset(generator.get_offset() + increment)
    if history is not None:
        _note_the_step(history, index)
    if add is None:
        remember(table, guidance, Call(*call), chosen, arguments)
    return arguments.out


_validate_without_gradients = torch.no_grad()(checks.validate)
"""Tensors that require a gradient are refused while gradients are enabled, unless they are to be recorded."""


def _known_part(inpainting: Any) -> tuple[Tensor, ...]:
    return inpainting if isinstance(inpainting, Inpainting) else ()


def _note_the_step(history: History, index: int | Tensor | Cursor) -> None:
    if history.entries.requires_grad:  # of an earlier step, which autograd follows
        _note_the_write(history.entries)
    history.note(index)


def _note_the_write(*tensors: Tensor | None) -> None:
    """Count a write to each tensor, so that autograd notices it if it has saved one of them."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
