"""Add up the moments of a sample's predictions: inner products and sums of the terms that vectors are made of.

The terms are the first prediction and the differences of the others to it, as the step reads them. A difference of
predictions is exact in float32 where they nearly agree; from moments of the predictions themselves it would come out as
the difference of three nearly equal numbers, and lose up to three digits of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def moments_of(predictions: Sequence[Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return moments of each sample, in float64, shape (batch,).

    Args:
        predictions: each of shape (batch, ...).
        names: those that are wanted: ``dot_i_j`` of two terms, ``sum_i`` of one, ``numel``. Others are left out.
    """
    first = predictions[0]
    exact = torch.float64 if any(each.dtype == torch.float64 for each in predictions) else torch.float32
    base = first.to(exact)
    terms = [base.double().flatten(1)] + [None] * (len(predictions) - 1)
    wanted = {name: [int(part) for part in name.split("_")[1:]] for name in names if name[:4] in ("dot_", "sum_")}

    def term(number: int) -> Tensor:
        if terms[number] is None:
            terms[number] = (predictions[number].to(exact) - base).double().flatten(1)
        found = terms[number]
        assert found is not None
        return found

    made = {}
    for name, numbers in wanted.items():
        values = [term(number) for number in numbers]
        made[name] = values[0].sum(1) if len(values) == 1 else torch.linalg.vecdot(values[0], values[1])
    if "numel" in names:
        made["numel"] = torch.full((1,), float(terms[0].shape[1]), dtype=torch.float64, device=first.device)  # type: ignore[union-attr]
    return made
