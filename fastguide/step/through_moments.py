"""Pass the gradient of weights that a program makes of moments on to the predictions and the sample.

A moment is an inner product of two terms, or the sum of one (``fastguide.guidance.moments``). Its gradient by a term is
the other one, or 1: so that of a term is a sum of the terms again, with factors of each sample's own, and a step adds
that to what is there. Only the few numbers of each sample go through autograd, and no tensor of the sample's size is
made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from ..guidance.moments import are_spread, moments_of
from ..solvers.table import StepTable
from .backends.registry import Backend
from .operator import StepArguments
from .weigh import with_gradient_scale, with_sample_as_prediction

_AT_ONCE = {"cpu": 2**18}
"""Elements whose moments are added up at a time, on the CPU as many as its caches hold."""
_AT_ONCE_ELSEWHERE = 2**24


def parts_of(sample: Tensor, share: int = 1) -> list[slice]:
    """Return which samples are looked at together: of so many elements, or of that over ``share``."""
    batch = len(sample)
    size = sample.numel() // max(batch, 1)
    step = max(_AT_ONCE.get(sample.device.type, _AT_ONCE_ELSEWHERE) // (share * max(size, 1)), 1)
    return [slice(begin, begin + step) for begin in range(0, batch, step)]


def moments_in_parts(predictions: Sequence[Tensor], names: Collection[str], sample: Tensor) -> dict[str, Tensor]:
    """Return ``moments_of`` these tensors, some samples at a time: what they need beside the tensors is of some.

    Args:
        predictions, names, sample: as that takes them, in any dtypes; they are computed in float32, or in float64 if
            one is.
    """
    some = parts_of(sample)
    if len(some) < 2:
        return _moments(predictions, names, sample)
    parts = [_moments([prediction[s] for prediction in predictions], names, sample[s]) for s in some]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "numel"}
    return parts[0] | joined


def _moments(predictions: Sequence[Tensor], names: Collection[str], sample: Tensor) -> dict[str, Tensor]:
    """Return moments, on a CPU in float64 of samples that leave few digits to those in float32, as its kernel does."""
    found = moments_of(predictions, names, sample)
    if sample.device.type != "cpu":
        return found
    spread = are_spread(found)
    if spread.all():
        return found
    again = moments_of(predictions, names, sample, exactly=True)
    return {name: each if name == "numel" else torch.where(spread, each, again[name]) for name, each in found.items()}


class TermGradients:
    """The gradients of a sample's terms: that of term i is ``sum_j products[:, i, j] * t_j + sums[:, i]``.

    Terms are the first prediction, the differences of the others to it, and the sample.

    Args:
        of_moments: the gradients of the moments, by name, each float64 of shape (batch,), or ``None`` for 0.
        predictions: one for each weight.
        sample: of the step.
    """

    def __init__(self, of_moments: Mapping[str, Tensor | None], predictions: list[Tensor], sample: Tensor) -> None:
        self.count = count = len(predictions)
        wanted = {name: grad for name, grad in of_moments.items() if grad is not None and name != "numel"}
        self._places = {name: [int(part) for part in name.split("_")[1:]] for name in wanted}
        self.reads_sample = any(count in places for places in self._places.values())
        self._sums_up = any(len(places) == 1 for places in self._places.values())
        self._terms = [*predictions, sample] if self.reads_sample else predictions
        self._products = sample.new_zeros(len(sample), count + 1, count + 1, dtype=torch.float64)
        self._sums = sample.new_zeros(len(sample), count + 1, dtype=torch.float64)
        for name, (first, *second) in self._places.items():
            if second:
                self._products[:, first, second[0]] += wanted[name]
                self._products[:, second[0], first] += wanted[name]
            else:
                self._sums[:, first] += wanted[name]

    def add(self, chosen: Backend, dtype: torch.dtype, number: int, found: Tensor, place: Tensor | None = None) -> None:
        """Add the gradient of a prediction, or of the sample, whose number comes next, to what was found.

        Args:
            chosen: makes the step that adds it.
            dtype: of the arithmetic, float32 or float64.
            number: which.
            found: of the sample's shape and layout.
            place: where to write the sum; ``None``: where ``found`` is.
        """
        products, sums = self._products[:, number], self._sums[:, number]
        if number == 0:  # a part of each difference, whose sign it has not
            products = products - self._products[:, 1 : self.count].sum(1)
            sums = sums - self._sums[:, 1 : self.count].sum(1)
        columns = with_gradient_scale(products, self.count, products.new_zeros(1, 1))
        columns = with_sample_as_prediction(columns, self.count) if self.reads_sample else columns[:, :-1]
        if self._sums_up:
            found.add_(sums.reshape(-1, *[1] * (found.dim() - 1)).to(dtype))
        rows = _adding(found.device).device_rows(None, dtype)
        weights, out = columns.to(dtype).contiguous()[None], found if place is None else place
        chosen.step(*StepArguments(out, None, None, found, self._terms, rows, weights, 0, None, None, None, None))


@cache
def _adding(device: torch.device) -> StepTable:
    """Return the table of a step that adds the guided prediction to the sample."""
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    columns = {"out_sample": one, "out_pred": one}
    return StepTable.from_columns(torch.zeros(1, dtype=torch.int64, device="cpu"), columns, name="a sum").to(device)
