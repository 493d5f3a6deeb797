"""Weights from moments of predictions so large or so small that float32 has no place for their squares."""

from __future__ import annotations

import pytest
import torch

from fastguide import ClassifierFree, Perturbed, StepTable, as_guidance, guided_step

GUIDED = StepTable.from_columns(
    torch.zeros(1, dtype=torch.int64), {"out_pred": torch.ones(1, dtype=torch.float64)}, name="the prediction itself"
)
"""Its step returns the guided prediction."""


@as_guidance(predictions=2)
def of_norms(v, scale):
    uncond, cond = v.predictions
    return uncond + scale * v.norm(cond - uncond) / v.norm(uncond) * (cond - uncond)


GUIDANCES = {
    "rescaled": ClassifierFree(7.5, guidance_rescale=0.7),
    "of norms": of_norms(7.5),  # reads no sums
    "three predictions": Perturbed(7.5, guidance_rescale=0.7),
}
SIZE = 9001  # two parts and a rest


def drawn(guidance, dtype, generator):
    """Draw predictions of two samples, of about 1."""
    first, *others = torch.randn(guidance.num_predictions, 2, SIZE, generator=generator)
    return [each.to(dtype) for each in (first, *(0.4 * first + 0.5 * other for other in others))]


def step(predictions, guidance, backend=None):
    return guided_step(GUIDED, 0, torch.zeros(predictions[0].shape), predictions, guidance, backend=backend)


def error(got, expected):
    return ((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-80, -72, 64, 90])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_guided_predictions_are_those_of_ordinary_numbers(guidance, exponent, dtype, backend, generator):
    """Times a power of two, which rounds nothing; a sample beside them is not concerned."""
    predictions = drawn(guidance, dtype, generator)
    factor = torch.tensor([2.0**exponent, 1.0], dtype=torch.float64)[:, None]
    expected = factor * step([each.double() for each in predictions], guidance)
    out = step([(each * factor).to(dtype) for each in predictions], guidance, backend)
    assert error(out, expected) <= 2e-7


@pytest.mark.parametrize("exponent", [-72, 64])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_gradients_are_those_of_ordinary_numbers(guidance, exponent, generator):
    """Which are the same, as the guided prediction grows with the predictions."""
    drawn_once, along = drawn(guidance, torch.float32, generator), torch.randn(2, SIZE, generator=generator)

    def gradients(factor, dtype):
        predictions = [(each * factor).to(dtype).requires_grad_() for each in drawn_once]
        return torch.autograd.grad(step(predictions, guidance), predictions, along.to(dtype))

    for got, expected in zip(gradients(2.0**exponent, torch.float32), gradients(1.0, torch.float64), strict=True):
        assert error(got, expected) <= 1e-6
