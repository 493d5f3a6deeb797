"""Compute at once what a pipeline masks or cuts before the step, and trace that on as it does a model's output.

The step has no place for a mask between guidance and the solver's update. So a product with one is made by the
pipeline's own operation, of each prediction that it is asked for; guidance of such products, and sums of them with what
is known, are the step's again. What is masked after guidance, or cut by views that no step undoes, is made in a launch
of its own first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..solvers import StepTable
from ..step.guided_step import guided_step
from ..step.memory import dense, empty_like
from .fitted import fitted_predictions, refusal_of
from .formula import as_vector
from .guidance_arguments import guidance_of
from .lazy_guidance import taken_apart
from .remade import remade
from .taken import PerFrame
from .traced import Combined, Source, Traced, traced
from .weights_of_formula import Conversion


def masked(function: Callable[..., Any], first: Any, second: Any) -> Traced | None:
    """Return the product of a vector and a tensor that has other numbers within a sample; ``None``: it is none.

    Args:
        function: of torch, which multiplies.
        first, second: a vector, as formula.py has them, and a tensor that broadcasts to it, in this order or the other.
    """
    vector, mask = (first, second) if type(second) is Tensor else (second, first)
    vector = as_vector(vector)
    if vector is None or type(mask) is not Tensor or mask.requires_grad or mask.is_complex():
        return None
    like = vector.like()
    sizes = zip(reversed(like.shape), reversed(mask.shape), strict=False)
    fits = mask.dim() <= like.dim() and all(size in (1, whole) for whole, size in sizes)
    made = at_once(vector) if fits and mask.device == like.device else None
    if made is None:
        return None
    value = made.value()
    return _traced_as((made.source,), function(mask, value) if mask is first else function(value, mask))


def at_once(vector: Any) -> Traced | None:
    """Return a vector as a tensor that is traced, a sum or a formula made in one launch; ``None``: it cannot be.

    Of what is no sum, it is the output itself, or what the pipeline's own operations make of it.
    """
    if type(vector) is Traced:
        return vector
    sources = [source for source, _ in vector.seen]
    if type(vector) is Combined and len(vector.terms) == 1:
        vector.check_unchanged()
        return _traced_as(sources, remade(vector, {}))
    launched = _launched(vector)
    if launched is None:
        return None
    made = _traced_as(sources, launched[0])
    made.source.guides = made.source.guides or launched[1]
    return made


def _traced_as(sources: Sequence[Source], value: Tensor) -> Traced:
    """Return a tensor that is traced as those that it was made of."""
    made = traced(value, sources[0].fusion)
    own = made.source
    own.step = sources[0].step
    own.is_output = any(source.is_output for source in sources)
    own.is_of_outputs = any(source.is_of_outputs for source in sources)
    own.guides = any(source.guides for source in sources)
    return made


def _launched(vector: Any) -> tuple[Tensor, bool] | None:
    """Compute a vector of several tensors, and tell whether it guides; ``None``: the kernels do not take it."""
    sample = vector.like()
    taken = taken_apart(vector, sample)
    if taken is None or type(taken[1]) is PerFrame or (isinstance(taken[0], Tensor) and taken[1] is None):
        return None
    output, scale = taken
    guidance = guidance_of(output, sample, scale, None, 1.0, "epsilon")
    if guidance is None or guidance.num_predictions < 2 or refusal_of(sample, output, None, None) is not None:
        return None
    sample = dense(sample)
    if vector.dtype == torch.float64:
        sample = sample.double()
    fitted = fitted_predictions(output, sample, guidance, False)
    if fitted is None:
        return None
    made = guided_step(
        _guidance_alone(sample.device), 0, sample, fitted[0], guidance, out=empty_like(sample, vector.dtype)
    )
    return made, not isinstance(guidance, Conversion)


@functools.cache
def _guidance_alone(device: torch.device) -> StepTable:
    """Return ``x' = m``."""
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    table = StepTable.from_columns(torch.zeros(1, device="cpu"), {"out_pred": one}, name="guidance ahead of a step")
    return table.to(device)
