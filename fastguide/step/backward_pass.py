"""The backward pass of a recorded step: another kernel, and for weights that a program makes of moments one more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..guidance.moment_weights import MomentWeights
from ..solvers.table import ROW_COLUMNS
from .backends.reference import guided_step_backward
from .backward import Gradients
from .memory import in_layout_of
from .noise import portable_noise
from .operator import StepArguments
from .recorded_plan import ELEMENTWISE, INPUTS, KEPT, Plan
from .through_moments import TermGradients, moments_in_parts, parts_of
from .weigh import (
    position_of,
    selected,
    split,
    weights_of_moments,
    with_gradient_scale,
    with_sample_as_prediction,
)


def gradients_of_inputs(plan: Plan, kept: list[Any], came: Gradients, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Return the gradients of ``INPUTS`` and of the predictions; ``None``: not needed."""
    a = _arguments(plan, kept, came)
    needed = dict(zip(INPUTS, needs, strict=False))
    new = {name: plan.new(plan.dtypes[name]) for name in ELEMENTWISE if needed[name]}
    if needed["history"]:
        new["history"] = plan.new(plan.dtypes["history"], plan.slots)
    of_predictions: list[Tensor] = []
    if any(needs[len(INPUTS) :]):
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
    return [*(new.get(name) if needed[name] else None for name in INPUTS), *(of_predictions or none)]


def _arguments(plan: Plan, kept: list[Any], came: Gradients) -> StepArguments:
    """Return the step's arguments as they were kept; what the backward pass does not read, any tensor stands for."""
    values = dict(zip(KEPT, kept, strict=False))
    first: Tensor = next(grad for grad in came[:3] if isinstance(grad, Tensor))[: plan.batch]
    # Hooks on saved tensors may have laid them out anew
    predictions = [in_layout_of(first, each) for each in split(kept[len(KEPT) :], plan.predictions, plan.batch)]
    for name in ("sample", "gradient", "variance", "noise", "mask"):
        values[name] = None if values[name] is None else in_layout_of(first, values[name])
    values["sample"] = first if values["sample"] is None else values["sample"]
    return StepArguments(
        **values, out=first, original=None, staged=None, index=plan.index,
        predictions=predictions or [first] * plan.predictions,
    )  # fmt: skip


def _run(
    plan: Plan, a: StepArguments, came: Gradients, new: dict[str, Tensor], of_predictions: list[Tensor], weighs: bool
) -> Tensor | None:
    """Fill the gradients; return those of each sample's weights if wanted: float64 of shape (batch, columns)."""
    columns = None
    if weighs:
        columns = torch.empty(len(a.out), a.weights.shape[-1], dtype=torch.float64, device=plan.device)
    gradients = came._replace(grad_predictions=tuple(of_predictions), grad_weights=columns)
    others: dict[str, Any] = {f"grad_{name}": new.get(name) for name in (*ELEMENTWISE, "history")}
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


# ---- Through a program ----


def _run_with_program(
    plan: Plan, a: StepArguments, came: Gradients, new: dict[str, Tensor], of_predictions: list[Tensor]
) -> dict[str, Tensor]:
    """Fill the gradients of a step whose weights are made of moments; return those of its constants.

    What a prediction gets is a sum of what comes through the step and through the weights, and so is what the sample
    gets if it has a weight or moments. Where the arithmetic is more precise than the gradients, the sums are made in
    it, of some samples at a time, so that they are rounded once.
    """
    of_sample = new.get("sample")
    places = of_predictions if of_sample is None else [*of_predictions, of_sample]
    if all(place.dtype == a.rows.dtype for place in places):
        through, of_moments = _through_weights(plan, a, _run_weighed(plan, a, came, new, of_predictions, True))
        _add_through_moments(plan, a, of_moments, of_predictions, of_sample)
        return through
    others = {name: place for name, place in new.items() if name != "sample"}
    through, of_moments = _through_weights(plan, a, _run_weighed(plan, a, came, others, [], True))
    exact: list[Tensor] = []
    for part in parts_of(a.sample):
        of_part = _of_samples(a, part)
        if not exact or len(exact[0]) != len(of_part.sample):
            exact = [plan.new(a.rows.dtype, samples=len(of_part.sample)) for _ in places]
        to_each, to_sample = exact[: len(of_predictions)], None if of_sample is None else exact[-1]
        to_others = {} if to_sample is None else {"sample": to_sample}
        _run_weighed(plan, of_part, _came_to_samples(plan, came, part), to_others, to_each, False)
        some = {name: None if grad is None else grad[part] for name, grad in of_moments.items()}
        _add_through_moments(plan, of_part, some, to_each, to_sample, [place[part] for place in places])
    return through


def _run_weighed(
    plan: Plan, a: StepArguments, came: Gradients, new: dict[str, Tensor], of_predictions: list[Tensor], weighs: bool
) -> Tensor | None:
    """Fill the gradients by the weights that were made, as if they were constants; return those of the weights."""
    assert a.made is not None
    count, columns, others, places = plan.weights, a.made, a.predictions, of_predictions
    of_sample = None
    if columns.shape[1] > count + 1:
        columns, others = with_sample_as_prediction(columns, count), [*others, a.sample]
        if places or "sample" in new:
            like = [plan.new(a.rows.dtype, samples=len(a.sample)) for _ in range(1 if places else 1 + count)]
            of_sample = like[-1]
            places = [*(places or like[:-1]), of_sample]
    of_columns = _run(plan, a._replace(weights=columns[None], predictions=others), came, new, places, weighs)
    if of_sample is not None and "sample" in new:
        new["sample"].add_(of_sample)
    return of_columns


def _add_through_moments(
    plan: Plan,
    a: StepArguments,
    of_moments: dict[str, Tensor | None],
    of_predictions: list[Tensor],
    of_sample: Tensor | None,
    places: list[Tensor] | None = None,
) -> None:
    """Add what predictions, and the sample, get through the moments that weights were made of.

    ``places``: where to write the sums, of the sample last; ``None``: where the others are.
    """
    terms = TermGradients(of_moments, a.predictions, a.sample)
    to: Sequence[Tensor | None] = places or [None] * (len(of_predictions) + 1)
    for number, found in enumerate(of_predictions):
        terms.add(plan.chosen, a.rows.dtype, number, found, to[number])
    if of_sample is not None and terms.reads_sample:
        terms.add(plan.chosen, a.rows.dtype, plan.weights, of_sample, to[-1])
    elif of_sample is not None and places is not None:
        places[-1].copy_(of_sample)


def _of_samples(a: StepArguments, part: slice) -> StepArguments:
    """Return what the gradients of some samples and their predictions are made of."""
    assert a.made is not None
    each = a.indices is not None and a.indices.dim() == 1
    return a._replace(
        out=a.out[part],
        sample=a.sample[part],
        predictions=[prediction[part] for prediction in a.predictions],
        indices=a.indices[part] if each and a.indices is not None else a.indices,
        gradient=None if a.gradient is None else a.gradient[part],
        mask=None if a.mask is None else a.mask[part],
        made=a.made[part],
        variance=None,
        noise=None,
        seeds=None,
    )


def _came_to_samples(plan: Plan, came: Gradients, part: slice) -> Gradients:
    """Return the gradients that come to some samples."""
    out, original, left = came.grad_out, came.grad_original, came.grad_left
    if left is not None:
        slots = [slot[part] for slot in left.split(plan.batch)]
        left = plan.new(left.dtype, plan.slots, len(slots[0]))
        for place, slot in zip(left.split(len(slots[0])), slots, strict=True):
            place.copy_(slot)
    return came._replace(
        grad_out=None if out is None else out[part],
        grad_original=None if original is None else original[part],
        grad_left=left,
    )


def _through_weights(
    plan: Plan, a: StepArguments, of_columns: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return the gradients of what weights are made of: those of constants, and those of moments by name."""
    made_by, count = plan.made_by, plan.weights
    assert isinstance(made_by, MomentWeights)
    assert of_columns is not None
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


def _of_known(plan: Plan, a: StepArguments, came: Gradients, needed: dict[str, bool]) -> dict[str, Tensor]:
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
