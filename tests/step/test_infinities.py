"""What is not finite in an element of an input stays in that element, and is what plain torch makes of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastguide.solvers.table import ROW_COLUMNS
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.operator import StepArguments
from tests.support.cases import DTYPES

VALUES = (torch.inf, -torch.inf, torch.nan)
SHAPE = (3, 2, 7, 11)  # no multiple of any vector's elements
GRADIENT_SCALE = 1.3
CASES = [  # predictions' weights, whether there is a learned variance, and the clip
    ([0.75], False, torch.inf),
    ([-0.5, 1.5], True, 1.0),
    ([-1.25, 1.5, 0.75], False, 2.0),
    ([-2.0, 1.5, 0.5, 0.75, 0.25], True, torch.inf),
]


def row_of(clip):
    """Return a row without a coefficient that is 0."""
    row = {name: 0.5 + 0.0625 * k for k, name in enumerate(ROW_COLUMNS)}
    return row | {"out_pred": -0.9, "clip": clip, "hist_slot": 1.0, "quantile": 0.0}


def step(backend, row, weights, tensors, history):
    """Return the next sample, the original one, the next model input and the history as a step makes them."""
    x, *predictions, g, v, z, anchor = tensors
    out, original, staged, left = *[torch.empty_like(x) for _ in range(3)], history.clone()
    of_sums = torch.tensor([[[sum(weights), *weights[1:], GRADIENT_SCALE]]])
    rows = torch.tensor([list(row.values())])
    more = {"anchor": anchor, "history": left}
    a = StepArguments(out, original, staged, x, predictions, rows, of_sums, 0, None, g, v, z, **more)
    BACKENDS[backend].step(*a)
    return out, original, staged, left.unflatten(0, (3, -1))[1]


def plain_step(row, weights, tensors, history):
    """Return them by the formulas of a row in plain torch, in float32."""
    x, *predictions, g, v, z, anchor = [None if tensor is None else tensor.float() for tensor in tensors]
    m, g = sum(weights) * predictions[0], GRADIENT_SCALE * g
    for weight, prediction in zip(weights[1:], predictions[1:], strict=True):
        m = m + weight * (prediction - predictions[0])
    x0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m + row["x0_grad"] * g)
    x0 = x0.clamp(-row["clip"], row["clip"])
    result = row["out_x0"] * x0 + row["out_sample"] * x + row["out_pred"] * m
    shift, deviation = row["out_grad"], row["out_noise"]
    if v is not None:
        log_variance = row["logvar_base"] + row["logvar_span"] * v
        shift = shift + row["out_var_grad"] * log_variance.exp()
        deviation = deviation * (0.5 * log_variance).exp()
    result = result + shift * g + deviation * z + row["out_anchor"] * anchor
    for slot, entry in enumerate(history.unflatten(0, (3, -1))):
        result = result + row[f"out_hist_{slot}"] * entry
    left = row["hist_x0"] * x0 + row["hist_sample"] * x
    return result, x0 + row["x0_noise"] * z, row["in_scale"] * result, left


@pytest.mark.parametrize(("weights", "learned", "clip"), CASES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_it_stays_there_as_plain_torch_has_it(backend, dtype, weights, learned, clip, generator):
    tensors = [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(len(weights) + 5)]
    tensors[-3] = tensors[-3] if learned else None
    history = torch.randn(3 * SHAPE[0], *SHAPE[1:], generator=generator)
    row, changed = row_of(clip), torch.zeros(SHAPE, dtype=torch.bool)
    before = step(backend, row, weights, tensors, history)

    given = [tensor for tensor in (*tensors, history[: SHAPE[0]]) if tensor is not None]
    pairs = itertools.cycle(itertools.product(itertools.combinations(given, 2), VALUES, VALUES))
    for place in torch.randperm(changed.numel(), generator=generator)[:200].tolist():
        (one, other), first, second = next(pairs)
        one.view(-1)[place], other.view(-1)[place] = first, second
        changed.view(-1)[place] = True

    results = step(backend, row, weights, tensors, history), plain_step(row, weights, tensors, history)
    for got, plain, unchanged in zip(*results, before, strict=True):
        assert torch.equal(got[~changed], unchanged[~changed])
        finite, plain = plain.isfinite(), plain.to(got.dtype)
        assert torch.equal(got.isfinite(), finite)
        torch.testing.assert_close(got[~finite], plain[~finite], rtol=0, atol=0, equal_nan=True)
