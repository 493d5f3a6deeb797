"""Weights from moments of predictions whose mean is large beside what they deviate from it, or that nearly agree."""

from __future__ import annotations

import pytest
import torch

from fastguide import AdaptiveProjected, ClassifierFree, Perturbed, StepTable, guided_step

GUIDED = StepTable.from_columns(
    torch.zeros(1, dtype=torch.int64), {"out_pred": torch.ones(1, dtype=torch.float64)}, name="the prediction itself"
)
"""Its step returns the guided prediction."""
DEVIATIONS = [0.5, 0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4]  # of a mean of about 1


def std(a):
    return a.std((1, 2, 3), keepdim=True)


def rescaled(u, c):
    m = u + 7.5 * (c - u)
    return 0.7 * m * (std(c) / std(m)) + 0.3 * m


def perturbed(u, c, p):
    m = c + 6.5 * (c - u) + 3 * (c - p)
    return 0.7 * m * (std(c) / std(m)) + 0.3 * m


def projected(u, c):
    unit = torch.nn.functional.normalize(c, dim=(1, 2, 3))
    d = c - u
    return u + 7.5 * (d - (d * unit).sum((1, 2, 3), keepdim=True) * unit)


CASES = {
    "rescaled": (rescaled, ClassifierFree(7.5, guidance_rescale=0.7)),
    "three predictions": (perturbed, Perturbed(7.5, perturbed_guidance_scale=3.0, guidance_rescale=0.7)),
    "projected": (projected, AdaptiveProjected(7.5, eta=0.0, norm_threshold=None)),
}


def drawn(count, deviation, generator):
    """Draw predictions of two samples; those behind the first are its, and something of their own."""
    first, *others = torch.randn(count, 2, 3, 50, 40, generator=generator)
    others = [0.4 * first + (0.5 + 0.1 * k) * each + 0.02 for k, each in enumerate(others)]
    return [1 + deviation * each for each in (first, *others)]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("name", "deviation"), [
    *((name, deviation) for name in ("rescaled", "projected") for deviation in DEVIATIONS),
    *(("three predictions", deviation) for deviation in DEVIATIONS[2:]),  # which are less often added up again
])  # fmt: skip
def test_errors_are_those_of_plain_torch(name, deviation, backend, generator):
    """Whose norms and deviations are of float32 tensors; both are compared with float64."""
    formula, guidance = CASES[name]
    predictions = drawn(guidance.num_predictions, deviation, generator)
    out = guided_step(GUIDED, 0, torch.zeros_like(predictions[0]), predictions, guidance, backend=backend)
    expected = formula(*(each.double() for each in predictions))
    error, plain = ((each - expected).norm() / expected.norm() for each in (out, formula(*predictions)))
    assert error <= 2 * max(plain, torch.finfo(torch.float32).eps), (error, plain)


def test_predictions_in_bfloat16(generator):
    predictions = [each.bfloat16() for each in drawn(2, 0.05, generator)]
    x = torch.zeros(predictions[0].shape)
    out = guided_step(GUIDED, 0, x, predictions, CASES["rescaled"][1])
    expected = rescaled(*(each.double() for each in predictions))
    assert (out - expected).norm() <= 2e-7 * expected.norm()


def test_each_sample_alone_is_added_up_again(generator):
    """So that its bits depend on no other sample."""
    flat, steep = ([each[:1] for each in drawn(2, deviation, generator)] for deviation in (1e-3, 3.0))
    guidance = CASES["rescaled"][1]
    both = [torch.cat(pair) for pair in zip(flat, steep, strict=True)]
    out = guided_step(GUIDED, 0, torch.zeros_like(both[0]), both, guidance)
    for k, alone in enumerate((flat, steep)):
        assert torch.equal(out[k : k + 1], guided_step(GUIDED, 0, torch.zeros_like(alone[0]), alone, guidance))


@pytest.mark.parametrize("deviation", DEVIATIONS[:5])
@pytest.mark.parametrize("name", ["rescaled", "projected"])
def test_gradients_are_as_near_as_those_of_plain_torch(name, deviation, generator):
    formula, guidance = CASES[name]
    drawn_once, factor = drawn(2, deviation, generator), torch.randn(2, 3, 50, 40, generator=generator)

    def gradients(guided, dtype):
        predictions = [each.to(dtype).requires_grad_() for each in drawn_once]
        return torch.autograd.grad((guided(*predictions) * factor.to(dtype)).sum(), predictions)

    def step(*predictions):
        return guided_step(GUIDED, 0, torch.zeros_like(predictions[0]), list(predictions), guidance)

    expected = gradients(formula, torch.float64)
    for got, plain, each in zip(
        gradients(step, torch.float32), gradients(formula, torch.float32), expected, strict=True
    ):
        bound = 2 * max((plain - each).norm(), torch.finfo(torch.float32).eps * each.norm())
        assert (got - each).norm() <= bound, ((got - each).norm() / each.norm(), bound / each.norm())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("value", [1.0, 0.3, -2.7, 0.1, 1e3])
def test_predictions_without_deviation_stay_as_they_are(value, backend):
    """Where nothing but rounding would be divided by rounding."""
    u = torch.full((2, 3, 50, 40), value)
    out = guided_step(GUIDED, 0, torch.zeros_like(u), [u, 1.3 * u], CASES["rescaled"][1], backend=backend)
    expected = u + 7.5 * (1.3 * u - u)
    assert (out - expected).norm() <= 2e-7 * expected.norm()
