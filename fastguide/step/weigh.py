"""Make a step's weights from moments by torch's own operations: for backends whose kernels do not make them.

Where each group of a sample's elements has weights of its own, the guided prediction is made before the step as well,
and the step has that one prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..guidance.groups import lie_in_blocks, number_of_groups, resolved
from ..guidance.moment_weights import MomentWeights
from ..guidance.moments import moments_of
from ..guidance.program import Program
from ..solvers.table import ROW_COLUMNS
from .backends.registry import Backend
from .memory import empty_like, in_blocks, in_layout_of
from .operator import StepArguments
from .original import combined, per_sample


def made_in_step(backend: Backend, made_by: MomentWeights, sample: Tensor) -> bool:
    """Tell whether a backend's step makes these weights, rather than gets what was made of them before."""
    device, dims = sample.device.type, made_by.dims
    if device not in backend.makes_weights or dims is None:
        return device in backend.makes_weights
    if sample.numel() == 0 or not lie_in_blocks(dims, sample):
        return False
    if device == "cpu":
        return True
    elements = sample.numel() // (sample.shape[0] * number_of_groups(dims, sample))
    if backend.compiles_programs:
        # In compiled code a program may be another tensor than the guidance's, whose words nobody knows.
        return elements <= backend.group_elements and not torch.compiler.is_compiling()
    return len(made_by.program.weights) <= backend.group_terms and elements <= backend.group_elements


def needs_scratch(backend: Backend, made_by: MomentWeights, sample: Tensor) -> bool:
    """Tell whether a step that makes these weights needs memory beside them."""
    return not (backend.compiles_programs and number_of_groups(made_by.dims, sample) > 1)


def scratch_of(backend: Backend, made_by: MomentWeights, sample: Tensor) -> Tensor | None:
    """Return that memory, if the step needs any."""
    return made_by.scratch_for(sample) if needs_scratch(backend, made_by, sample) else None


def weighed(a: StepArguments, made_by: MomentWeights, parameters: Tensor) -> StepArguments:
    """Return the arguments of a step with the weights that a program makes, and no program.

    Where the sample has a weight too, it is one more prediction.

    Args:
        a: the step's arguments; ``weights`` give the gradient's scale.
        made_by: has the program, and keeps what was made.
        parameters: its parameters and constants, of shape (calls or 1, batch or 1, numbers).
    """
    count = a.weights.shape[-1] - 1
    if made_by.dims is not None:
        m, exact = guided_by_groups(a, made_by, parameters)
        made_by.last_weights = exact.to(a.weights.dtype)[None].detach()
        return of_guided_prediction(a, in_layout_of(a.sample, m.to(a.weights.dtype)))
    predictions, exact = _exact_weights(a, made_by, parameters)
    made = exact.to(a.weights.dtype)
    made_by.last_weights = made[None].detach()
    if made.shape[1] > count + 1:
        made, predictions = with_sample_as_prediction(made, count), [*predictions, a.sample]
    return a._replace(
        predictions=predictions, weights=made[None], program=None, parameters=None, made=None, scratch=None
    )


def guided_by_groups(a: StepArguments, made_by: MomentWeights, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the guided prediction, of weights that each group has, and these: float64 of (batch, groups, columns).

    Both are in float64, as what cancels is divided by its norm. The arguments are those of ``weighed``.
    """
    assert made_by.dims is not None
    dims = resolved(made_by.dims, a.sample)
    predictions, exact = _exact_weights(a, made_by, parameters, dims)
    sizes = [1 if k in dims else size for k, size in enumerate(a.sample.shape)]
    x, each = a.sample.double(), [prediction.double() for prediction in predictions]
    return combined([weight.reshape(sizes) for weight in exact.unbind(-1)], each, x), exact


def _exact_weights(
    a: StepArguments, made_by: MomentWeights, parameters: Tensor, dims: tuple[int, ...] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return the predictions, one for each weight, and the weights with the gradient's scale, in float64."""
    batch, count = a.sample.shape[0], a.weights.shape[-1] - 1
    predictions = split(a.predictions, count, batch)
    steps, first, _ = position_of(a)
    named = dict(zip(made_by.names, selected(parameters, steps, batch).unbind(-1), strict=False))
    terms = weights_of(a, predictions, made_by.program, (steps, first), named, dims)
    return predictions, with_gradient_scale(terms, count, selected(a.weights, steps, batch)[:, -1:])


def combined_in_blocks(a: StepArguments, made: Tensor) -> StepArguments:
    """Return the arguments of a step with the guided prediction, made of each block's weights, and no program.

    ``made``: of shape (batch, blocks, columns), in the dtype to compute in; a block is so many elements that lie one
    after the other.
    """
    blocks = made.shape[1]
    predictions = split(a.predictions, a.weights.shape[-1] - 1, a.sample.shape[0])
    x, *each = [in_blocks(tensor, blocks).to(made.dtype) for tensor in (a.sample, *predictions)]
    m = empty_like(a.sample, a.rows.dtype)
    in_blocks(m, blocks).copy_(combined([weight[..., None] for weight in made.unbind(-1)], each, x))
    return of_guided_prediction(a, m)


def of_guided_prediction(a: StepArguments, m: Tensor) -> StepArguments:
    """Return the arguments of a step with the guided prediction that was made, and no program."""
    scale = selected(a.weights, position_of(a)[0], a.sample.shape[0])[:, -1:]
    weights = torch.cat([torch.ones_like(scale), scale], -1)[None]
    return a._replace(predictions=[m], weights=weights, program=None, parameters=None, made=None, scratch=None)


def weights_of(
    a: StepArguments,
    predictions: Sequence[Tensor],
    program: Program,
    position: tuple[Tensor, Tensor],
    parameters: dict[str, Tensor],
    dims: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the weights of the terms of each sample, float64 of shape (batch, terms), or (batch, groups, terms).

    Args:
        a: the step's arguments.
        predictions: one for each weight.
        program: makes them.
        position: the row of each sample, and of its first step, of shape (1,) or (batch,).
        parameters: the program's, by name, each of shape (1,) or (batch,).
        dims: the dimensions of a group of elements that has weights of its own; ``None``: a sample has.
    """
    given = [prediction.to(a.rows.dtype) for prediction in predictions]
    moments = moments_of(given, program.inputs, a.sample.to(a.rows.dtype), dims, exactly=True)
    return weights_of_moments(a, moments, program, position, parameters, dims)


def weights_of_moments(
    a: StepArguments,
    moments: Mapping[str, Tensor],
    program: Program,
    position: tuple[Tensor, Tensor],
    parameters: dict[str, Tensor],
    dims: tuple[int, ...] | None = None,
) -> Tensor:
    """Do as ``weights_of`` with moments that are there, by name."""
    batch = a.sample.shape[0]
    steps, first = position
    columns = a.rows.index_select(0, steps).double().unbind(-1)
    row = dict(zip(ROW_COLUMNS, columns, strict=True)) | {"step": (steps - first).double()}
    others, sizes = row | parameters, [batch]
    if dims is not None:
        others = {name: per_sample(values, a.sample) for name, values in others.items()}
        sizes = [1 if k in dims else size for k, size in enumerate(a.sample.shape)]
    like = torch.zeros(sizes, dtype=torch.float64, device=a.sample.device)
    weights = torch.stack([like + weight for weight in program.run({**moments, **others})], -1)
    return weights if dims is None else weights.flatten(1, -2)


def with_gradient_scale(terms: Tensor, count: int, scale: Tensor) -> Tensor:
    """Return the terms' weights with a gradient's scale, (batch or 1, 1), behind those of so many predictions."""
    behind = per_sample(scale.double(), terms).expand(*terms.shape[:-1], 1)
    return torch.cat([terms[..., :count], behind, terms[..., count:]], -1)


def with_sample_as_prediction(made: Tensor, count: int) -> Tensor:
    """Return made weights of so many predictions and the sample, as a step reads them of one prediction more."""
    of_sample = made[:, -1:]
    return torch.cat([made[:, :1] + of_sample, made[:, 1:count], of_sample, made[:, count : count + 1]], -1)


def position_of(a: StepArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sample's row, the row of its first step, and whether it is not finished; one for all, or (batch,)."""
    rows = a.rows
    steps = torch.full((1,), a.index, device=rows.device) if a.indices is None else a.indices.reshape(-1)
    live, first = torch.ones_like(steps, dtype=torch.bool), torch.zeros_like(steps)
    if a.cursor is not None:
        steps, end, first, _ = a.cursor.unbind(1)
        live = steps < end
        steps = torch.where(live, steps, 0)
    # Compiled code would count from the end; a row beyond the table is refused.
    return torch.where(steps < 0, rows.shape[0], steps), first, live


def split(predictions: list[Tensor], count: int, batch: int) -> list[Tensor]:
    """Return all predictions, also where one tensor holds them one after the other along the batch."""
    if len(predictions) == 1 and count > 1:
        return list(predictions[0].unflatten(0, (count, batch)).unbind(0))
    return list(predictions)


def selected(values: Tensor, steps: Tensor, batch: int) -> Tensor:
    """Return what each sample has, shape (batch or 1, columns), from (steps or 1, batch or 1, columns)."""
    if values.shape[0] == 1:
        return values[0]
    if steps.numel() == 1:
        return values.index_select(0, steps)[0]
    return values.expand(-1, batch, -1)[steps, torch.arange(batch, device=values.device)]
