"""Make a scheduler's step like its last one, without planning it.

A scheduler's tables are its own: a kind of step that ``fastguide.step.repeat`` knows of one was planned by this
scheduler for tensors of the same layouts, dtypes and devices. So what is left to compare is what else a plan depends
on: the scheduler's state, the numbers, and whose generator draws.
"""

from __future__ import annotations

from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..guidance import Guidance
from ..solvers import StepTable
from ..step.repeat import kinds_of, repeat
from .lazy_guidance import resolved
from .lazy_outputs import LazyOriginal
from .scheduler_step import Plan, count_fused, is_last_row, predict_original
from .taken import Taken
from .timesteps import row_of


def repeated(
    scheduler: Any, arguments: tuple[Any, ...], draws: bool | None, model_output: Any, timestep: Any, sample: Any,
    generator: Any, return_dict: bool, guidance_scale: Any, gradient: Any = None, gradient_scale: Any = 1.0,
    gradient_form: Any = "epsilon",
) -> Any:  # fmt: skip
    """Make a step like the last one; ``None``: nothing was done.

    Args:
        scheduler: whose step it is.
        arguments: of ``step``, those that rows depend on.
        draws: whether diffusers draws noise at this step; ``None``: at all but timestep 0.
        model_output, timestep, sample, generator, return_dict, guidance_scale, gradient, gradient_scale, gradient_form:
            of ``step``.
    """
    last = None if is_dynamo_compiling() else scheduler._last_plan
    if last is None:
        return None
    before, scale, state, versions, table, guidance, table_token, guidance_token, returns = last
    if before != arguments or gradient is not None or gradient_form != "epsilon":
        return None
    if type(gradient_scale) is not float or gradient_scale != 1.0:
        return None
    kinds = kinds_of.get(table_token)
    if kinds is None:
        return None
    if type(model_output) is not Tensor:
        model_output, guidance_scale = resolved(model_output, sample, guidance_scale)
    if type(guidance_scale) is not type(scale) or guidance_scale != scale or type(sample) is not Tensor:
        return None
    predictions = predictions_again(model_output)
    if predictions is None:
        return None
    own = scheduler.__dict__
    try:
        if not all(map(is_, scheduler._read_state(own), state)):
            return None
        if (own["alphas_cumprod"]._version, own["timesteps"]._version) != versions:
            return None
        inputs_versions = sample._version, *versions_of(predictions)
    except (KeyError, RuntimeError):  # an attribute that a subclass computes; an inference tensor, which counts nothing
        return None
    row = _row(scheduler, timestep, sample)
    if row is None:
        return None
    source = None
    if row != 0 if draws is None else draws:  # a row that adds no noise has no kind that takes a generator
        source = torch.default_generator if generator is None else generator
    result = repeat(
        kinds, row, sample, predictions, guidance_token, None, None, None, source, None, None, None, None, None, None,
        None, None,
    )  # fmt: skip
    if result is None:
        return None
    if scheduler._fusion is not None:
        count_fused(scheduler, guidance, is_last=is_last_row(scheduler, row))
    dtype = model_output.dtype
    later = partial(_original, table, row, sample, predictions, dtype, guidance, result, inputs_versions, returns)
    if return_dict:
        return scheduler._output(result, later)
    return result, LazyOriginal.of(result, later, dtype if returns else None)


def _row(scheduler: Any, timestep: Any, sample: Tensor) -> int | None:
    """Return a timestep's row, if the host knows it; ``None``: it does not, or there are several."""
    row = timestep
    if type(row) is Tensor:  # a list, if it has several elements
        row = row.tolist() if row.is_cpu else None if row.dim() else row_of(scheduler, row, sample)
    return row if type(row) is int else None


def _original(
    table: StepTable,
    row: int,
    sample: Tensor,
    predictions: Tensor | list[Tensor],
    dtype: torch.dtype,
    guidance: Guidance | None,
    result: Tensor,
    versions: tuple[int, ...],
    returns_prediction: bool,
) -> Tensor:
    """Predict x_0 of a step."""
    planned = Plan(
        table, row, sample, predictions, guidance, None, None, dtype, result.dtype, None,
        returns_prediction=returns_prediction,
    )  # fmt: skip
    return predict_original(planned, result, planned.inputs_of_original(), versions)


def predictions_again(output: Any) -> Tensor | list[Tensor] | None:
    """Return the predictions of a step that may be like the last one; ``None``: it has more, or is no tensor."""
    if type(output) is Tensor:
        return output
    return list(output.predictions) if type(output) is Taken and output.variance is None else None


def versions_of(predictions: Tensor | list[Tensor]) -> tuple[int, ...]:
    """Return how often each was written to."""
    if type(predictions) is Tensor:
        return (predictions._version,)
    return tuple([each._version for each in predictions])
