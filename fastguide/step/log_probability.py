"""The log-probability of a step that adds noise: log N(x' | mean, sigma^2), for policy gradients.

The mean is the step without its noise, and sigma the row's ``out_noise``, times exp(log variance / 2) where the
variance is learned. A step's own log-probability and that of the same step looked at later are made of the same sums in
the same order, of x' as it was rounded: their ratio is 1 to the bit. On the CPU, a sum is of 512 elements at a time in
float32 (float64 if the sample is), and of those in float64, in order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..guidance import Guidance
from ..guidance.weights import UNGUIDED
from ..solvers.table import ROW_COLUMNS, StepTable
from . import checks
from .autograd import asks_for_gradients, recorded_step, to_be_recorded, with_own_weights
from .backends.registry import Backend, StepFunction, backend_for
from .backward import unknown_fields
from .batched_gradients import for_each_gradient
from .call import Call
from .cursor import Cursor
from .draw import draw
from .first_derivatives import refusing_second
from .history import History, entries_of
from .memory import empty_like, overlaps
from .momentum import Momentum, momentum_terms
from .operator import StepArguments, inputs, library
from .weigh import combined_in_blocks, position_of, split, with_sample_as_prediction

Reduction: TypeAlias = Literal["mean", "sum"]
"""Over a sample's elements: ``"mean"`` as the code of DDPO and Flow-GRPO, ``"sum"`` for the log-density itself."""

_STOCHASTIC = {
    "ddim": "ddim(..., eta=1.0)",
    "cogvideox_ddim": "cogvideox_dpm",
    "euler": "euler_ancestral",
    "heun": "euler_ancestral",
    "dpm2": "dpm2(..., ancestral=True)",
    "flow_match_euler": "flow_match_sde",
    "flow_match_heun": "flow_match_sde",
    "dpm_solver": 'dpm_solver(..., algorithm_type="sde-dpmsolver++")',
    "dpm_solver_singlestep": 'dpm_solver_singlestep(..., algorithm_type="sde-dpmsolver++")',
    "edm_dpm_solver": 'edm_dpm_solver(..., algorithm_type="sde-dpmsolver++")',
}
"""The stochastic forms of deterministic solvers."""


def log_prob_of(
    table: StepTable,
    index: int | Tensor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None,
    next_sample: Tensor,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    history: History | None = None,
    momentum: Momentum | None = None,
    anchor: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """Return the log-probability of a step from ``sample`` to ``next_sample``, by other predictions than made it.

    ``log N(next_sample | mean, sigma^2)`` per sample, differentiable in all tensors. The ratio of two policies'
    probabilities is ``exp(log_prob_of(...) - log_prob)``, with what ``guided_step(..., return_log_prob=True)``
    returned; it is 1 exactly where the predictions are the same.

    Args:
        table, index, sample, predictions, guidance, gradient, variance, anchor, backend: as in ``guided_step``.
        next_sample: what that step returned, of the sample's shape.
        history, momentum: as in ``guided_step``; they are moved on, as the step would.
        reduction: over a sample's elements, ``"mean"`` or ``"sum"``.

    Returns:
        Float64 of shape (batch,).

    Raises:
        ValueError: the step adds no noise; the message names the solver's stochastic form.
        TypeError, ValueError, IndexError: an argument is not as described.

    >>> from fastguide import FlowSchedule, flow_match_sde, guided_step
    >>> table, x, velocity = flow_match_sde(FlowSchedule(), 10), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    >>> y, log_prob = guided_step(table, 0, x, velocity, seeds=torch.tensor([1, 2]), return_log_prob=True)
    >>> torch.equal(log_prob_of(table, 0, x, velocity, None, y), log_prob)
    True
    """
    check_log_prob(table, index, reduction)
    chosen = backend_for(backend, checks.device_of("sample", sample).type)
    checks.check_operand("next_sample", next_sample, sample, False)
    before = None
    given = guidance, predictions, sample, gradient, variance, anchor, entries_of(history), next_sample
    if momentum is not None:
        if asks_for_gradients(*given, momentum.values):
            of_terms, terms = momentum_terms(momentum, table, index, sample, predictions, guidance)
            options: dict[str, Any] = {"gradient": gradient, "variance": variance, "history": history, "anchor": anchor}
            options |= {"reduction": reduction, "backend": backend}
            call_of = functools.partial(log_prob_of, table, index, sample)
            return momentum.add_recorded(
                _new_step, index, predictions, backend,
                lambda sums: call_of([sums, *terms[1:]], of_terms, next_sample, **options),
            )  # fmt: skip
        guidance, predictions, before = _with_momentum(momentum, table, index, sample, predictions, guidance, backend)
    call = chosen, table, index, sample, predictions, (gradient, variance), history, anchor
    used = UNGUIDED if guidance is None else guidance
    if momentum is not None or not asks_for_gradients(*given):
        a = _validated(*call, used, next_sample, before)
        value = _log_prob(chosen, a, reduction, makes_step=False)
        if history is not None:
            history.note(index)
        return value
    with torch.no_grad():
        a = _validated(*call, used, next_sample)
        own = a if a.history is None else a._replace(history=a.history.clone())
        value = _log_prob(chosen, own, reduction, makes_step=False)
        a = _validated(*call, to_be_recorded(used, chosen, sample), None)
        a = a._replace(out=empty_like(a.sample, a.rows.dtype))  # not rounded, as that of the value is not
    mean = recorded_step(chosen, table, guidance, a, None, index, history, None)
    if a.variance is not None:
        return _of_learned_variance(a._replace(variance=variance), mean, next_sample, reduction)
    log_prob: Tensor = _LogProb.apply(mean, next_sample, value, _deviation(a), reduction)  # type: ignore[no-untyped-call]
    return log_prob


def step_with_log_prob(
    step: Any,
    table: StepTable,
    call: Call,
    guidance: Guidance | None,
    history: History | None,
    reduction: Any,
    before: Callable[[StepArguments], None] | None,
) -> tuple[Tensor, Tensor]:
    """Make the step of a call, and return the next sample and its log-probability, for which that is held fixed.

    Args:
        step: ``guided_step``.
        table, guidance, history: as that got them.
        call: all that it got.
        reduction: over a sample's elements; True is ``"mean"``.
        before: what is done with the arguments once the call is checked; such a step is not recorded.
    """
    reduction = "mean" if reduction is True else reduction
    check_log_prob(table, call.index, reduction)
    if call.inpainting is not None:
        raise ValueError("inpainting: expected None with return_log_prob, as the known part has no probability")
    call = call._replace(guidance=guidance, history=history)
    of_mean = call.gradient, call.variance, call.anchor, entries_of(history)
    if asks_for_gradients(guidance, call.predictions, call.sample, call.noise, *of_mean):
        last = None if history is None else copy(history)
        new = step(table, *call[:4], **dict(zip(Call._fields[4:], call[4:], strict=True)))
        options = {name: getattr(call, name) for name in ("gradient", "variance", "anchor", "backend")}
        options |= {"history": last, "reduction": reduction}
        return new, log_prob_of(table, call.index, call.sample, call.predictions, guidance, new.detach(), **options)
    chosen = backend_for(call.backend, checks.device_of("sample", call.sample).type)
    a, generator = checks.validate(
        chosen, table, call.index, call.sample, call.predictions, UNGUIDED if guidance is None else guidance,
        (call.gradient, call.variance), call.noise, call.generator, call.seeds, None, history, call.anchor,
        call.original, call.out, call.staged, before if call.out is None else functools.partial(_check_apart, before),
    )  # fmt: skip
    increment = 0
    if generator is not None:
        a, increment = draw(a, generator, chosen.torch_stream, out_is_new=call.out is None)
    for written in (call.out, a.original, a.staged):
        if written is not None and not written.is_inference():
            torch.autograd.graph.increment_version(written)
    value = _log_prob(chosen, a, reduction, makes_step=True)
    if increment and isinstance(generator, torch.Generator):
        generator.set_offset(generator.get_offset() + increment)
    if history is not None:
        history.note(call.index)
    return a.out, value


# ---- What has a log-probability ----


def check_log_prob(table: StepTable, index: Any, reduction: Any) -> None:
    """Refuse steps without a log-probability, as far as the host knows them; ``None``: tables without any."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"return_log_prob, reduction: expected 'mean' or 'sum', got {reduction!r}")
    if not isinstance(table, StepTable):
        raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
    if isinstance(index, Cursor):
        raise TypeError("index: expected an int or an int64 tensor for a log-probability, got a Cursor")
    on_host = isinstance(index, Tensor) and index.device.type == "cpu" and index.dtype == torch.int64
    known = [index] if isinstance(index, int) else index.reshape(-1).tolist() if on_host else []
    silent = [row for row in known if 0 <= row < len(table) and not table.adds_noise[row]]
    if silent or not table.adds_noise_anywhere:
        other = _STOCHASTIC.get(table.name)
        hint = f"; its stochastic form is {other}" if other is not None else ""
        if table.adds_noise_anywhere:
            hint = "; table.adds_noise says which steps have one"
        which = f"{table.name}'s step {silent[0]}" if silent else table.name
        raise ValueError(
            f"table: expected a step that adds noise, as others have no log-probability, got {which}{hint}"
        )


def _check_apart(before: Callable[[StepArguments], None] | None, a: StepArguments) -> None:
    """Refuse an output in an input's memory, before anything is done."""
    for tensor in inputs(a):
        if tensor is not a.noise and overlaps(a.out, tensor):
            raise ValueError("out: expected memory apart from the inputs with return_log_prob, which are read again")
    if before is not None:
        before(a)


def _with_momentum(
    momentum: Momentum, table: StepTable, index: Any, sample: Tensor, predictions: Any, guidance: Any, backend: Any
) -> tuple[Guidance, list[Tensor], Callable[[StepArguments], None]]:
    """Return guidance of terms, the terms, and what adds them up once the call is checked."""
    guidance_of_terms, terms = momentum_terms(momentum, table, index, sample, predictions, guidance)
    add = functools.partial(momentum.add, _step_in_place, index, predictions, backend)
    return guidance_of_terms, momentum.to_be_written(terms), add


def _step_in_place(
    table: StepTable, index: Any, sample: Tensor, predictions: Any, guidance: Guidance, *, out: Tensor, backend: Any
) -> Tensor:
    """Do as ``guided_step``, which has log-probabilities too."""
    chosen = backend_for(backend, sample.device.type)
    a, _ = checks.validate(
        chosen, table, index, sample, predictions, guidance, (None, None), None, None, None, None, None, None, None,
        out, None,
    )  # fmt: skip
    chosen.step(*a)
    return out


def _new_step(
    table: StepTable, index: Any, sample: Tensor, predictions: Any, guidance: Guidance, *, backend: Any
) -> Tensor:
    """Do as ``guided_step`` where gradients are recorded."""
    chosen = backend_for(backend, sample.device.type)
    with torch.no_grad():
        a, _ = checks.validate(
            chosen, table, index, sample, predictions, guidance, (None, None), None, None, None, None, None, None, None,
            None, None,
        )  # fmt: skip
    return recorded_step(chosen, table, guidance, a, None, index, None, None)


def _validated(
    chosen: Backend,
    table: StepTable,
    index: int | Tensor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    optional: tuple[Tensor | None, Tensor | None],
    history: History | None,
    anchor: Tensor | None,
    guidance: Guidance,
    next_sample: Tensor | None,
    before: Callable[[StepArguments], None] | None = None,
) -> StepArguments:
    """Check a step whose noise is of no account."""
    a, _ = checks.validate(
        chosen, table, index, sample, predictions, guidance, optional, sample, None, None, None, history, anchor, None,
        next_sample, None, before,
    )  # fmt: skip
    return a._replace(noise=None)


# ---- Values ----


def _log_prob(chosen: Backend, a: StepArguments, reduction: Reduction, *, makes_step: bool) -> Tensor:
    """Return the log-probabilities of ``a.out``; make the step, or take that for what it made."""
    if a.variance is not None or a.program is not None or a.inverse_thresholds is not None:
        before = None if a.history is None else a.history.clone()
        place, a = a.made, with_own_weights(a)
        made = a if makes_step else a._replace(out=empty_like(a.sample), original=None, staged=None)
        chosen.step(*made)
        if place is not None and a.made is not None:
            place.copy_(a.made)
        a, makes_step = _with_made_weights(a)._replace(history=before), False
    if a.variance is not None:
        mean = empty_like(a.sample, a.rows.dtype)
        chosen.step(*_without_noise(a, mean))
        return _of_learned_variance(a, mean, a.out, reduction)
    squares = torch.empty(len(a.sample), dtype=torch.float64, device=a.sample.device)
    if chosen.squares is not None and not unknown_fields(a):
        chosen.squares(*a, makes_step=makes_step, squares=squares)
    else:
        add_squares(chosen.step, a, makes_step, squares)
    return _reduced(squares, _deviation(a), a.sample[:1].numel(), reduction)


def add_squares(step: StepFunction, a: StepArguments, makes_step: bool, squares: Tensor) -> None:
    """Do as the operator ``guided_step_squares``, by a step of any backend, or two."""
    mean = empty_like(a.sample, a.rows.dtype)
    history = a.history.clone() if makes_step and a.history is not None else a.history
    step(*_without_noise(a, mean)._replace(history=history))
    if makes_step:
        step(*a)
    squares.copy_((a.out.to(mean.dtype) - mean).square().double().flatten(1).sum(1))


def _squares_on_any_device(*arguments: Any, makes_step: bool, squares: Tensor) -> None:
    add_squares(torch.ops.fastguide.guided_step.default, StepArguments(*arguments), makes_step, squares)


library.impl("guided_step_squares", _squares_on_any_device, "CompositeExplicitAutograd")


def _without_noise(a: StepArguments, mean: Tensor) -> StepArguments:
    return a._replace(out=mean, original=None, staged=None, noise=None, seeds=None, philox=None, philox_threads=0)


def _with_made_weights(a: StepArguments) -> StepArguments:
    """Return the arguments of a step with the weights that its program has made, and no program."""
    if a.made is None:
        return a
    columns, count, predictions = a.made, a.weights.shape[-1] - 1, a.predictions
    if len(columns) > len(a.sample):
        return combined_in_blocks(a, columns.unflatten(0, (len(a.sample), -1)))
    if columns.shape[1] > count + 1:
        columns = with_sample_as_prediction(columns, count)
        predictions = [*split(predictions, count, len(a.sample)), a.sample]
    return a._replace(
        predictions=predictions, weights=columns[None], program=None, parameters=None, made=None, scratch=None
    )


def _deviation(a: StepArguments) -> Tensor:
    """Return each sample's ``out_noise``, float64 of shape (1,) or (batch,)."""
    return a.rows.index_select(0, position_of(a)[0])[:, ROW_COLUMNS.index("out_noise")].double()


def _reduced(squares: Tensor, deviation: Tensor, elements: int, reduction: Reduction) -> Tensor:
    log_density = -squares / (2 * deviation.square()) - elements * (deviation.log() + 0.5 * math.log(2 * math.pi))
    return log_density if reduction == "sum" else log_density / max(elements, 1)


class _LogProb(torch.autograd.Function):
    """The value that was found, whose gradient comes of the mean."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, next_sample: Tensor, value: Tensor, deviation: Tensor, reduction: Reduction
    ) -> Tensor:
        ctx.save_for_backward(mean, next_sample, deviation)
        ctx.elements = 1 if reduction == "sum" else max(mean[:1].numel(), 1)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mean, next_sample, deviation = ctx.saved_tensors

        def gradients_of(grad: Tensor) -> tuple[Tensor | None, ...]:
            wide = torch.promote_types(mean.dtype, torch.float32)
            factor = grad / (ctx.elements * deviation.square())
            of_mean = next_sample.to(wide) - mean.to(wide)
            of_mean.mul_(factor.to(wide).reshape(-1, *[1] * (mean.dim() - 1)))
            of_next = -of_mean.to(next_sample.dtype) if ctx.needs_input_grad[1] else None
            return of_mean.to(mean.dtype), of_next, None, None, None

        gradients = for_each_gradient(gradients_of, grad)
        return refusing_second(gradients, (grad, mean, next_sample), "log_prob_of")


def _of_learned_variance(a: StepArguments, mean: Tensor, next_sample: Tensor, reduction: Reduction) -> Tensor:
    """Return log-probabilities where every element has its own sigma, by torch's own operations."""
    assert a.variance is not None
    wide = a.rows.dtype
    row = a.rows.index_select(0, position_of(a)[0])

    def column(name: str) -> Tensor:
        return row[:, ROW_COLUMNS.index(name)].reshape(-1, *[1] * (mean.dim() - 1))

    log_sigma = 0.5 * (column("logvar_base") + column("logvar_span") * a.variance.to(wide)) + column("out_noise").log()
    scaled = (next_sample.to(wide) - mean.to(wide)) * torch.exp(-log_sigma)
    log_density = -0.5 * scaled.square() - log_sigma - 0.5 * math.log(2 * math.pi)
    total = log_density.double().flatten(1).sum(1)
    return total if reduction == "sum" else total / max(mean[:1].numel(), 1)
