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
from .backends.reference import guided_step_backward
from .backends.registry import Backend
from .backward import Gradients, empty_clipped, unknown_fields
from .batched_gradients import for_each_gradient
from .draw import draw
from .first_derivatives import refusing_second
from .history import History
from .memory import empty_like, empty_strided, in_layout_of, overlaps
from .noise import DeviceGenerator, portable_noise
from .operator import StepArguments
from .through_groups import weighed_by_groups
from .through_moments import TermGradients, moments_in_parts
from .weigh import (
    made_in_step,
    position_of,
    selected,
    split,
    weighed,
    weights_of_moments,
    with_gradient_scale,
    with_sample_as_prediction,
)

_ELEMENTWISE = ("sample", "gradient", "variance", "noise", "anchor")
_INPUTS = (*_ELEMENTWISE, "history", "known", "known_noise", "weights", "parameters")
"""The fields that get gradients, beside the predictions."""
_KEPT = ("sample", "rows", "weights", "indices", "gradient", "variance", "noise", "seeds", "mask", "parameters", "made")
"""The fields that a backward pass may read, beside the predictions."""
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
        make = weighed if made_by.dims is None else weighed_by_groups
        a = make(a, made_by, made_by.on(a.sample.device)[1])
    elif guidance is not None and made_by is not None:
        a = a._replace(weights=guidance.weights_for(a.predictions, a.sample.device, a.rows.dtype))
    if a.weights.requires_grad:
        a = a._replace(weights=selected(a.weights, position_of(a)[0], len(a.sample))[None])
    original = a.original
    if original is not None and original._is_view():  # which a function of several outputs may not write to
        a = a._replace(original=empty_like(a.sample, original.dtype))
    writes = not isinstance(index, int) or bool(table.rows[index, _SLOT] >= 0)
    plan = _Plan(chosen, a, table.clips, writes, None if a.program is None else guidance)
    inputs = [getattr(a, name) for name in _INPUTS]  # no noise that is drawn: it may lie in `out`, which is returned
    needs = {n: isinstance(t, Tensor) and t.requires_grad for n, t in zip(_INPUTS, inputs, strict=True)}
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


class _Plan:
    """What the two passes of a step share beside the tensors that autograd keeps; it keeps none itself."""

    def __init__(
        self, chosen: Backend, a: StepArguments, clips: bool, writes_history: bool, guidance: Guidance | None
    ) -> None:
        self.arguments: StepArguments | None = a
        """Until the step is made."""
        self.chosen, self.clips, self.writes_history = chosen, clips, writes_history
        self.made_by = None if guidance is None else guidance.weights_from
        """Of a step with a program."""
        self.batch, self.shape, self.device = len(a.sample), a.sample.shape, a.sample.device
        self.strides = (a.sample.numel() // max(self.batch, 1), *a.sample.stride()[1:])
        self.weights = a.weights.shape[-1] - 1
        self.stacked = len(a.predictions) == 1 and self.weights > 1
        self.predictions = self.weights if self.stacked else len(a.predictions)
        self.slots = 0 if a.history is None else len(a.history) // max(self.batch, 1)
        self.index = a.index
        self.dtypes = {name: tensor.dtype for name in _INPUTS if isinstance(tensor := getattr(a, name), Tensor)}
        self.of_predictions = [prediction.dtype for prediction in a.predictions]

    def new(self, dtype: torch.dtype, copies: int = 1) -> Tensor:
        """Return a tensor in the layout that all have, for the batch once or several times."""
        return empty_strided((copies * self.batch, *self.shape[1:]), self.strides, dtype, self.device)

    def keeps_bits(self, a: StepArguments, needs: dict[str, bool]) -> bool:
        """Tell whether the step writes where it clips; or it clips nothing, or keeps inputs instead."""
        weighs = needs["weights"] or a.program is not None
        return self.clips and not weighs and self.chosen.clipped is not None and self.device.type == "cpu"

    def kept(self, a: StepArguments, needs: dict[str, bool]) -> StepArguments:
        """Return a step's arguments without those that the backward pass does not read.

        Args:
            a: the step's.
            needs: which of ``_INPUTS`` get gradients.
        """
        weighs, of_variance = needs["weights"] or a.program is not None, needs["variance"]
        reads = weighs or (self.clips and not self.keeps_bits(a, needs))
        varies = of_variance or needs["gradient"] or needs["noise"] or needs["weights"]
        return a._replace(
            sample=a.sample if reads else None,  # type: ignore[arg-type]
            predictions=a.predictions if reads else [],
            gradient=a.gradient if reads or of_variance else None,
            variance=a.variance if varies else None,
            noise=a.noise if of_variance else None,
            seeds=a.seeds if of_variance else None,
        )

    def placed(self, grad: Tensor | None) -> Tensor | None:
        """Return a gradient in that layout, and with its own sign."""
        grad = None if grad is None else grad.resolve_neg()
        if grad is None or (grad.stride()[1:] == self.strides[1:] and grad.stride(0) >= self.strides[0]):
            return grad
        return self.new(grad.dtype, len(grad) // max(self.batch, 1)).copy_(grad)


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
    """One step; its inputs are a plan, ``original``, which it writes, ``_INPUTS`` and the predictions."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, original: Tensor | None, *inputs: Tensor | None) -> Any:
        a, plan.arguments = plan.arguments, None
        assert a is not None
        left = None
        if a.history is not None and plan.writes_history:  # else it stays as it is
            left = a.history.clone()
            a = a._replace(history=left)
        needs = dict(zip(_INPUTS, ctx.needs_input_grad[_BEFORE:], strict=False))
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
        ctx.save_for_backward(clipped, *(getattr(kept, name) for name in _KEPT), *kept.predictions)
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
        plan: _Plan = ctx.plan

        def gradients_of(*came: Tensor | None) -> list[Tensor | None]:
            out, original, left = map(plan.placed, came)
            return _gradients(plan, kept, Gradients(out, original, left, clipped=clipped), needs[_BEFORE:])

        gradients = for_each_gradient(gradients_of, *came)
        by_name = dict(zip(_KEPT, kept, strict=False))
        weighs = needs[_BEFORE + _INPUTS.index("weights")] or by_name["made"] is not None
        only_masks = not weighs and by_name["variance"] is None  # what is kept says where x_0 was clipped, no more
        return (*[None] * _BEFORE, *refusing_second(gradients, came if only_masks else (*came, *kept), "guided_step"))


# ---- Backward ----


def _gradients(plan: _Plan, kept: list[Any], came: Gradients, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Return the gradients of ``_INPUTS`` and of the predictions; ``None``: not needed."""
    a = _arguments(plan, kept, came)
    needed = dict(zip(_INPUTS, needs, strict=False))
    new = {name: plan.new(plan.dtypes[name]) for name in _ELEMENTWISE if needed[name]}
    if needed["history"]:
        new["history"] = plan.new(plan.dtypes["history"], plan.slots)
    of_predictions: list[Tensor] = []
    if any(needs[len(_INPUTS) :]):
        copies = plan.weights if plan.stacked else 1
        of_predictions = [plan.new(dtype, copies) for dtype in plan.of_predictions]
    apart = split(of_predictions, plan.predictions, plan.batch)
    if a.made is not None:
        new |= _run_with_program(plan, a, came, new, apart)
    else:
        columns = _run(plan, a, came, new, apart, needed["weights"])
        if columns is not None:
            new["weights"] = columns if a.weights.shape[1] != 1 else columns.sum(0, keepdim=True)
    if "weights" in new:
        new["weights"] = new["weights"].reshape(a.weights.shape).to(a.weights.dtype)
    new |= _of_known(plan, a, came, needed)
    none: list[Tensor | None] = [None] * len(plan.of_predictions)
    return [*(new.get(name) if needed[name] else None for name in _INPUTS), *(of_predictions or none)]


def _arguments(plan: _Plan, kept: list[Any], came: Gradients) -> StepArguments:
    """Return the step's arguments as they were kept; what the backward pass does not read, any tensor stands for."""
    values = dict(zip(_KEPT, kept, strict=False))
    first: Tensor = next(grad for grad in came[:3] if isinstance(grad, Tensor))[: plan.batch]
    # Hooks on saved tensors may have laid them out anew
    predictions = [in_layout_of(first, each) for each in split(kept[len(_KEPT) :], plan.predictions, plan.batch)]
    for name in ("sample", "gradient", "variance", "noise", "mask"):
        values[name] = None if values[name] is None else in_layout_of(first, values[name])
    values["sample"] = first if values["sample"] is None else values["sample"]
    return StepArguments(
        **values, out=first, original=None, staged=None, index=plan.index,
        predictions=predictions or [first] * plan.predictions,
    )  # fmt: skip


def _run(
    plan: _Plan, a: StepArguments, came: Gradients, new: dict[str, Tensor], of_predictions: list[Tensor], weighs: bool
) -> Tensor | None:
    """Fill the gradients; return those of each sample's weights if wanted: float64 of shape (batch, columns)."""
    columns = None
    if weighs:
        columns = torch.empty(plan.batch, a.weights.shape[-1], dtype=torch.float64, device=plan.device)
    gradients = came._replace(grad_predictions=tuple(of_predictions), grad_weights=columns)
    others: dict[str, Any] = {f"grad_{name}": new.get(name) for name in (*_ELEMENTWISE, "history")}
    gradients = gradients._replace(**others)
    noise = a.noise if a.seeds is None else _drawn(a)
    a = a._replace(
        noise=noise, seeds=None, known=a.mask, known_noise=a.mask, program=None, parameters=None, made=None
    )  # of the known part, nothing is read
    (plan.chosen.backward or guided_step_backward)(*a, **gradients._asdict())
    return columns


def _drawn(a: StepArguments) -> Tensor:
    """Return the noise that the step has drawn from seeds, in the layout of its tensors."""
    assert a.seeds is not None
    steps, first, _ = position_of(a)
    step = steps - first
    drawn = portable_noise(a.seeds, a.out.shape, step=step if len(step) != 1 else step[0])
    return in_layout_of(a.out, drawn)


def _run_with_program(
    plan: _Plan, a: StepArguments, came: Gradients, new: dict[str, Tensor], of_predictions: list[Tensor]
) -> dict[str, Tensor]:
    """Fill the gradients of a step whose weights are made of moments; return those of its constants."""
    assert a.made is not None
    count, columns, others, places = plan.weights, a.made, a.predictions, of_predictions
    of_sample = None
    if columns.shape[1] > count + 1:
        columns, others = with_sample_as_prediction(columns, count), [*others, a.sample]
        if places or "sample" in new:
            of_sample = plan.new(a.sample.dtype)
            places = [*(places or [plan.new(a.sample.dtype) for _ in range(count)]), of_sample]
    of_columns = _run(plan, a._replace(weights=columns[None], predictions=others), came, new, places, True)
    assert of_columns is not None
    if of_sample is not None and "sample" in new:
        new["sample"].add_(of_sample)
    del of_sample, places
    through, of_moments = _through_weights(plan, a, of_columns)
    terms = TermGradients(of_moments, a.predictions, a.sample)
    for number, place in enumerate(of_predictions):
        terms.add(plan.chosen, a.rows.dtype, number, place)
    if "sample" in new and terms.reads_sample:
        terms.add(plan.chosen, a.rows.dtype, count, new["sample"])
    return through


def _through_weights(
    plan: _Plan, a: StepArguments, of_columns: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return the gradients of what weights are made of: those of constants, and those of moments by name."""
    made_by, count = plan.made_by, plan.weights
    assert isinstance(made_by, MomentWeights)
    assert a.parameters is not None
    moments = moments_in_parts(a.predictions, made_by.program.inputs, a.sample)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (a.parameters, a.weights, *moments.values())]
        parameters, weights, *values = leaves
        steps, first, _ = position_of(a)
        named = dict(zip(made_by.names, selected(parameters, steps, plan.batch).unbind(-1), strict=False))
        given = dict(zip(moments, values, strict=True))
        terms = weights_of_moments(a, given, made_by.program, (steps, first), named)
        made = with_gradient_scale(terms, count, selected(weights, steps, plan.batch)[:, -1:])
        if made.shape[1] > count + 1:
            made = with_sample_as_prediction(made, count)
        of_parameters, of_weights, *of_moments = torch.autograd.grad(made, leaves, of_columns, allow_unused=True)
    constants = {"parameters": of_parameters, "weights": of_weights}
    return {n: grad for n, grad in constants.items() if grad is not None}, dict(zip(moments, of_moments, strict=True))


def _of_known(plan: _Plan, a: StepArguments, came: Gradients, needed: dict[str, bool]) -> dict[str, Tensor]:
    """Return the gradients of the known part of x_0 and its noise, which are rare, by torch's own operations."""
    grad = came.grad_out
    if a.mask is None or grad is None or not (needed["known"] or needed["known_noise"]):
        return {}
    row = a.rows.index_select(0, position_of(a)[0])
    behind = (1 - a.mask.to(row.dtype)) * grad.to(row.dtype)
    names = {"known": "known_sample", "known_noise": "known_noise"}
    factors = {name: row[:, ROW_COLUMNS.index(column)] for name, column in names.items()}
    return {
        name: (factor.reshape(-1, *[1] * (grad.dim() - 1)) * behind).to(plan.dtypes[name])
        for name, factor in factors.items()
        if needed[name]
    }
