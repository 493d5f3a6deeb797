"""Steps that autograd follows: forward the same kernel, backward another one, and nothing kept that it need not read.

A step is linear but for the clip of x_0, so that its backward pass is weights again (csrc/kernels/cpu/backward.h). The
step on the CPU writes bits where it clips, and needs none of its inputs any more; elsewhere, the clip's mask is
computed anew. Through weights that a program makes of moments, through_moments.py passes gradients on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch

from .._plain_tensors import check_that_they_are_plain
from ..guidance import Guidance
from ..guidance.moment_weights import MomentWeights
from ..solvers.table import ROW_COLUMNS, StepTable
from .backends.registry import Backend
from .backward import Gradients, empty_clipped, unknown_fields
from .backward_pass import gradients_of_inputs
from .batched_gradients import for_each_gradient
from .draw import draw
from .first_derivatives import refusing_second
from .history import History
from .memory import empty_like, in_layout_of, overlaps
from .noise import DeviceGenerator
from .operator import StepArguments
from .recorded_plan import INPUTS, KEPT, Plan
from .through_groups import weighed_by_groups
from .weigh import made_in_step, position_of, selected, split, weighed

_SLOT = ROW_COLUMNS.index("hist_slot")
_BEFORE = 2
"""Arguments of ``_Step`` before the inputs."""


# ---- What is recorded ----


def asks_for_gradients(guidance: Guidance | None, predictions: Any, *others: Tensor | None) -> bool:
    """Tell whether any input of a step requires a gradient; refuse what is differentiated in another way."""
    records = torch.is_grad_enabled()
    if not records and forward_ad._current_level < 0 and _functorch.peek_interpreter_stack() is None:
        return False
    several = predictions if isinstance(predictions, (list, tuple)) else (predictions,)
    tensors = [tensor for tensor in (*several, *others) if isinstance(tensor, Tensor)]
    if not torch.compiler.is_compiling():
        check_that_they_are_plain(tensors, "guided_step")
    if not records:
        return False
    asked = any(tensor.requires_grad for tensor in tensors)
    return asked or (isinstance(guidance, Guidance) and guidance.requires_grad)


def _check_that_it_records(a: StepArguments, out: Tensor | None) -> None:
    """Refuse forms of a step through which no gradient can go."""
    if torch.compiler.is_compiling():
        raise NotImplementedError("sample: no gradients are recorded within torch.compile; make the step outside of it")
    if a.cursor is not None:
        raise ValueError("index: expected an int or a tensor where gradients are recorded, got a Cursor")
    if a.inverse_thresholds is not None:
        raise ValueError("table: expected no dynamic thresholding where gradients are recorded, got a table with it")
    for name, tensor in (("out", out), ("staged", a.staged)):
        if tensor is not None:
            raise ValueError(f"{name}: expected None where gradients are recorded, got a tensor to write to")
    if a.mask is not None and a.mask.requires_grad:
        raise ValueError("inpainting.mask: expected one that requires no grad, got one that does")
    for name in unknown_fields(a):
        raise ValueError(f"{name}: expected none where gradients are recorded, as its own is not known, got one")


def to_be_recorded(guidance: Guidance, chosen: Backend, sample: Tensor) -> Guidance:
    """Return guidance for the checks of a step, which would make its weights without recording how."""
    made_by = guidance.weights_from
    in_step = isinstance(made_by, MomentWeights) and made_by.dims is None and made_in_step(chosen, made_by, sample)
    return guidance if made_by is None or in_step else guidance.with_constants()


def recorded_step(
    chosen: Backend,
    table: StepTable,
    guidance: Guidance | None,
    a: StepArguments,
    generator: torch.Generator | DeviceGenerator | None,
    index: Any,
    history: History | None,
    out: Tensor | None,
) -> Tensor:
    """Make and record the step of checked arguments; return the next sample.

    Args:
        chosen: the backend.
        table, guidance, generator, index, history, out: as ``guided_step`` got them.
        a: the operator's arguments, without noise that is still to be drawn.
    """
    _check_that_it_records(a, out)
    made_by = None if guidance is None or a.program is not None else guidance.weights_from
    if isinstance(made_by, MomentWeights):
        parameters = made_by.on(a.sample.device)[1]
        if made_by.dims is None:
            a = weighed(_with_precise_predictions(a), made_by, parameters)
        else:
            a = weighed_by_groups(a, made_by, parameters)
    elif guidance is not None and made_by is not None:
        a = a._replace(weights=guidance.weights_for(a.predictions, a.sample.device, a.rows.dtype))
    if a.weights.requires_grad:
        a = a._replace(weights=selected(a.weights, position_of(a)[0], len(a.sample))[None])
    original = a.original
    if original is not None and original._is_view():  # which a function of several outputs may not write to
        a = a._replace(original=empty_like(a.sample, original.dtype))
    writes = not isinstance(index, int) or bool(table.rows[index, _SLOT] >= 0)
    plan = Plan(chosen, a, table.clips, writes, None if a.program is None else guidance)
    inputs = [getattr(a, name) for name in INPUTS]  # no noise that is drawn: it may lie in `out`, which is returned
    needs = {n: isinstance(t, Tensor) and t.requires_grad for n, t in zip(INPUTS, inputs, strict=True)}
    _check_that_it_stays(plan.kept(a, needs), a.original)
    _check_that_it_can_be_written(original)
    increment = 0
    if generator is not None:
        in_kernel = chosen.torch_stream and a.variance is None  # whose gradient reads the noise
        a, increment = draw(a, generator, in_kernel, out_is_new=True, keeps_noise=needs["variance"])
        plan.arguments = a
    new: Tensor
    new, found, entries = _Step.apply(plan, a.original, *inputs, *a.predictions)  # type: ignore[no-untyped-call]
    if original is not None and original is not a.original:
        original.copy_(found)
    if increment and isinstance(generator, torch.Generator):
        generator.set_offset(generator.get_offset() + increment)
    if history is not None:
        if entries is not None:
            history.entries = entries
        history.note(index)
    return new


def with_own_weights(a: StepArguments) -> StepArguments:
    """Return the arguments of a step that writes the weights that it makes to memory of its own, to be read again.

    The guidance's place for them, which is for ``last_weights``, is written by other threads' steps as well.
    """
    return a if a.made is None else a._replace(made=torch.empty_like(a.made))


def _with_precise_predictions(a: StepArguments) -> StepArguments:
    """Return a step's arguments with predictions in the precision of the arithmetic, in which autograd then adds up.

    Each gets a gradient through the step and one through the weights; their sum is rounded once.
    """
    each = split(a.predictions, a.weights.shape[-1] - 1, len(a.sample))
    return a._replace(predictions=[in_layout_of(a.sample, prediction.to(a.rows.dtype)) for prediction in each])


def _check_that_it_stays(kept: StepArguments, original: Tensor | None) -> None:
    """Refuse to write x_0 to what the backward pass reads: torch would not notice, as it counts writes from then on."""
    if original is None:
        return
    named = [(name, getattr(kept, name)) for name in ("sample", "gradient", "variance", "noise")]
    for name, tensor in (*named, *((f"predictions[{k}]", each) for k, each in enumerate(kept.predictions))):
        if tensor is not None and overlaps(original, tensor):
            raise ValueError(
                f"original: expected memory apart from {name}, of which gradients are made, got an overlap"
            )


def _check_that_it_can_be_written(original: Tensor | None) -> None:
    """Refuse to write x_0 where torch would refuse it, but only after the step."""
    if original is None:
        return
    refused = None
    if original.is_inference():
        refused = "an inference tensor"
    elif original._is_view():
        refused = _VIEWS_NOT_WRITTEN.get(torch._C._autograd._get_creation_meta(original).name)
    if refused is not None:
        raise ValueError(
            "original: expected a tensor that autograd lets be written to, where gradients are recorded, got "
            f"{refused}; allocate it by torch.empty_like(sample)"
        )
    owner = original if original._base is None else original._base
    if original.requires_grad and owner.is_leaf:
        raise ValueError(
            "original: expected no leaf that requires a gradient, nor a view of one, where gradients are recorded, "
            "got a tensor to write to"
        )


_VIEWS_NOT_WRITTEN = {
    "MULTI_OUTPUT_NODE": "a view that unbind(), split() or another function of several views returned",
    "NO_GRAD_MODE": "a view that was made under torch.no_grad()",
    "INFERENCE_MODE": "a view that was made in inference mode",
    "IN_CUSTOM_FUNCTION": "a view that a torch.autograd.Function returned",
}
"""Those that autograd refuses to follow a write to, by how torch says that they were created."""


class _Step(torch.autograd.Function):
    """One step; its inputs are a plan, ``original``, which it writes, ``INPUTS`` and the predictions."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, original: Tensor | None, *inputs: Tensor | None) -> Any:
        a, plan.arguments = plan.arguments, None
        assert a is not None
        left = None
        if a.history is not None and plan.writes_history:  # else it stays as it is
            left = a.history.clone()
            a = a._replace(history=left)
        needs = dict(zip(INPUTS, ctx.needs_input_grad[_BEFORE:], strict=False))
        clipped = empty_clipped(a.sample) if plan.keeps_bits(a, needs) else None
        place, a = a.made, with_own_weights(a)
        kept = plan.kept(a, needs)
        if clipped is None:
            plan.chosen.step(*a)
        else:
            assert plan.chosen.clipped is not None
            plan.chosen.clipped(*a, clipped=clipped)
        if place is not None and a.made is not None:
            place.copy_(a.made)
        ctx.save_for_backward(clipped, *(getattr(kept, name) for name in KEPT), *kept.predictions)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if original is not None:
            ctx.mark_dirty(original)
        return a.out, original, left

    @staticmethod
    def backward(ctx: Any, *came: Tensor | None) -> Any:
        needs, (clipped, *kept) = ctx.needs_input_grad, ctx.saved_tensors
        if all(grad is None for grad in came):
            return (None,) * len(needs)
        plan: Plan = ctx.plan

        def gradients_of(*came: Tensor | None) -> list[Tensor | None]:
            out, original, left = map(plan.placed, came)
            return gradients_of_inputs(plan, kept, Gradients(out, original, left, clipped=clipped), needs[_BEFORE:])

        gradients = for_each_gradient(gradients_of, *came)
        by_name = dict(zip(KEPT, kept, strict=False))
        weighs = needs[_BEFORE + INPUTS.index("weights")] or by_name["made"] is not None
        only_masks = not weighs and by_name["variance"] is None  # what is kept says where x_0 was clipped, no more
        return (*[None] * _BEFORE, *refusing_second(gradients, came if only_masks else (*came, *kept), "guided_step"))
