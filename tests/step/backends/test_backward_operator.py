"""The operators beside the step's own: what torch demands of them, and what keeps a direct call from others' memory."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import ClassifierFree
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.backward import empty_clipped
from tests.step.test_gradients import SCHEDULE

OPERATORS = torch.ops.fastguide
TABLE = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
X = torch.zeros(2, 3, 5)


def arguments(out=None):
    rows, weights = TABLE.device_rows(None, torch.float32), ClassifierFree(3.0).weights(X.device, torch.float32)
    return (X.clone() if out is None else out, None, None, X, [X, X], rows, weights, 2, None, None, None, None)


def gradients(**changed):
    return {"grad_out": X, "grad_predictions": [torch.empty_like(X) for _ in range(2)], "grad_sample": None} | changed


def double(*shape):
    return torch.empty(shape, dtype=torch.float64)


def test_they_are_sound_operators():
    given = gradients(grad_sample=torch.empty_like(X), grad_weights=double(2, 3))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATORS.guided_step_backward.default, arguments(), given, test_utils=checks)
    given = {"clipped": empty_clipped(X)}
    torch.library.opcheck(OPERATORS.guided_step_clipped.default, arguments(), given, test_utils=checks)
    given = {"makes_step": True, "squares": double(2)}
    torch.library.opcheck(OPERATORS.guided_step_squares.default, arguments(), given, test_utils=checks)


REFUSED = {
    "grad_out: expected size 5 in dimension 2": {"grad_out": torch.empty(2, 3, 4)},
    "grad_predictions: expected 2, got 3": {"grad_predictions": [torch.empty_like(X)] * 3},
    "grad_weights: expected 6 numbers of float64": {"grad_weights": torch.empty(2, 3)},
    "grad_sample: expected samples that do not overlap": {"grad_sample": torch.empty(1, 3, 5).expand(2, 3, 5)},
    "grad_history: expected at most 3 slots, got 4": {"grad_history": torch.empty(8, 3, 5)},
    "clipped: expected 4 numbers of uint8, contiguous": {"clipped": torch.empty(2, 4, dtype=torch.uint8)[:, ::2]},
    "grad_left: expected size 2 in dimension 0, got 3": {"grad_left": torch.empty(3, 3, 5)},
}


@pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")
@pytest.mark.parametrize("message", REFUSED)
def test_other_tensors_are_refused(message):
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.guided_step_backward(*arguments(), **gradients(**REFUSED[message]))


@pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")
def test_squares_need_the_inputs_as_they_were():
    with pytest.raises(RuntimeError, match="squares: expected 2 numbers of float64"):
        OPERATORS.guided_step_squares(*arguments(), makes_step=True, squares=double(3))
    with pytest.raises(RuntimeError, match="out: expected memory apart from sample"):
        OPERATORS.guided_step_squares(*arguments(out=X), makes_step=True, squares=double(2))


@pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")
@pytest.mark.parametrize("place", [torch.empty(2, 2), torch.empty(2, 3, dtype=torch.uint8)])
def test_bits_of_a_clip_need_a_place_for_all(place):
    with pytest.raises(RuntimeError, match="clipped: expected 4 numbers of uint8, contiguous"):
        OPERATORS.guided_step_clipped(*arguments(), clipped=place)
