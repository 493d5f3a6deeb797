"""Record the guided prediction of weights that each group of a sample's elements has, some samples at a time.

torch's own operations make it, in float64: what they need beside the inputs is some samples', in either pass, and the
backward pass makes it anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..guidance.moment_weights import MomentWeights
from .batched_gradients import for_each_gradient
from .first_derivatives import refusing_second
from .memory import empty_like
from .operator import StepArguments
from .through_moments import parts_of
from .weigh import guided_by_groups, of_guided_prediction, split

_SHARE = 8
"""A backward pass needs 30 tensors of as many elements, in float64."""


def weighed_by_groups(a: StepArguments, made_by: MomentWeights, parameters: Tensor) -> StepArguments:
    """Do as ``weighed``, for weights of groups, where gradients are recorded."""
    predictions = split(a.predictions, a.weights.shape[-1] - 1, len(a.sample))
    plain = a._replace(weights=a.weights.detach(), gradient=None, variance=None, noise=None, anchor=None, history=None)
    m = _GuidedByGroups.apply(plain, made_by, a.sample, parameters, *predictions)  # type: ignore[no-untyped-call]
    return of_guided_prediction(a, m)


class _GuidedByGroups(torch.autograd.Function):
    """The guided prediction in the precision of the arithmetic; its inputs are the sample, parameters, predictions."""

    @staticmethod
    def forward(ctx: Any, a: StepArguments, made_by: MomentWeights, *inputs: Tensor) -> Tensor:
        made = empty_like(a.sample, a.rows.dtype)
        for part in parts_of(a.sample, _SHARE):
            m, exact = _guided(a, made_by, part, *_of_part(inputs, part))
            made[part].copy_(m)
            _place_for(made_by, exact, a)[part].copy_(exact)
        ctx.save_for_backward(a.rows, a.weights, a.indices, *inputs)
        ctx.made_by, ctx.index = made_by, a.index
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weights, indices, *inputs = ctx.saved_tensors
        sample, needs = inputs[0], ctx.needs_input_grad[2:]
        a = StepArguments(sample, None, None, sample, [], rows, weights, ctx.index, indices, None, None, None)
        if not len(sample):
            return None, None, *[torch.zeros_like(t) if needs[k] else None for k, t in enumerate(inputs)]

        def gradients_of(grad: Tensor) -> list[Tensor | None]:
            found: list[Tensor | None] = [None] * len(inputs)
            for part in parts_of(sample, _SHARE):
                _add_part(a, ctx.made_by, part, inputs, needs, found, grad[part])
            return found

        gradients = for_each_gradient(gradients_of, grad)
        return None, None, *refusing_second(gradients, (grad, *inputs), "guided_step")


def _add_part(
    a: StepArguments,
    made_by: MomentWeights,
    part: slice,
    inputs: list[Tensor],
    needs: tuple[bool, ...],
    gradients: list[Tensor | None],
    grad: Tensor,
) -> None:
    """Fill the gradients of some samples, or of the parameters, which are shared with others.

    Autograd adds up in float64 what each input gets in several ways, and the sum is rounded once.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().double().requires_grad_() for tensor in _of_part(inputs, part)]
        m, _ = _guided(a, made_by, part, *leaves)
        found = torch.autograd.grad(m, leaves, grad.double(), allow_unused=True)
    for k, (tensor, some) in enumerate(zip(inputs, found, strict=True)):
        if some is None or not needs[k]:  # in every part, such as a sample that has no weight
            continue
        whole = gradients[k]
        if whole is None:
            whole = gradients[k] = torch.zeros_like(tensor) if k == 1 else empty_like(a.sample, tensor.dtype)
        if k == 1:
            (whole[:, part] if whole.shape[1] > 1 else whole).add_(some)
        else:
            whole[part].copy_(some)


def _place_for(made_by: MomentWeights, exact: Tensor, a: StepArguments) -> Tensor:
    """Return where the weights go for ``last_weights``, which later steps overwrite."""
    place, shape = made_by.last_weights, (1, len(a.sample), *exact.shape[1:])
    fits = place is not None and place.shape == shape and place.dtype == a.rows.dtype and place.device == exact.device
    if place is None or not fits or place.is_inference():  # which only inference mode could write
        place = made_by.last_weights = exact.new_empty(shape, dtype=a.rows.dtype)
    return place[0]


def _of_part(inputs: Any, part: slice) -> list[Tensor]:
    """Return the inputs of some samples."""
    sample, parameters, *predictions = inputs
    return [
        sample[part],
        parameters[:, part] if parameters.shape[1] > 1 else parameters,
        *(prediction[part] for prediction in predictions),
    ]


def _guided(
    a: StepArguments, made_by: MomentWeights, part: slice, sample: Tensor, parameters: Tensor, *predictions: Tensor
) -> tuple[Tensor, Tensor]:
    each = a.indices is not None and a.indices.dim() == 1 and len(a.indices) > 1
    indices = a.indices[part] if each and a.indices is not None else a.indices
    weights = a.weights[:, part] if a.weights.shape[1] > 1 else a.weights
    of_part = a._replace(sample=sample, predictions=list(predictions), indices=indices, weights=weights)
    return guided_by_groups(of_part, made_by, parameters)
