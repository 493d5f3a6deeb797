"""Frequency-decoupled guidance, beside the formula of diffusers' guider: two Laplacian pyramids, combined by levels."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, FrequencyDecoupled, NoiseSchedule, Sampler, guided_step
from tests.support.pyramids import pyramid, up

ONE = torch.ones(1, dtype=torch.float64)
PREDICTION = fastguide.StepTable.from_columns(
    torch.tensor([0]), {"x0_scale": ONE, "x0_pred": ONE, "out_x0": ONE}, name="the prediction"
)
TABLE = fastguide.ddim(NoiseSchedule.linear(), 6)
SHAPE = (2, 3, 32, 16)


def predictions(shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=generator, dtype=torch.float64)
    return u, u + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)


# ---- The formula ----


def formula(u, c, scales, base="uncond", rescale=0.0):
    levels = [
        (b if base == "cond" else a) + scale * (b - a)
        for a, b, scale in zip(pyramid(u, len(scales)), pyramid(c, len(scales)), scales, strict=True)
    ]
    made = levels[-1]
    for band in reversed(levels[:-1]):
        made = up(made, band.shape[-2:]) + band
    ratio = c.flatten(1).std(1) / made.flatten(1).std(1)
    return made * (rescale * ratio + 1 - rescale).view(-1, *[1] * (made.dim() - 1))


CASES = {
    "two": ([10.0, 5.0], {}, SHAPE),
    "three": ([12.0, 6.0, 2.0], {}, SHAPE),
    "four": ([9.0, 7.0, 3.0, 1.5], {}, (2, 3, 48, 64)),
    "from the conditional": ([9.0, 4.0], {"base": "cond"}, SHAPE),
    "rescaled": ([12.0, 6.0, 2.0], {"guidance_rescale": 0.7}, SHAPE),
    "odd sizes": ([10.0, 5.0, 3.0], {}, (2, 3, 27, 14)),
    "videos": ([10.0, 5.0], {}, (2, 3, 4, 12, 16)),
    "without channels": ([10.0, 5.0], {}, (2, 12, 16)),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_the_step_makes_the_formula(name, backend):
    scales, options, shape = CASES[name]
    u, c = predictions(shape)
    guidance = FrequencyDecoupled(scales, **options)
    keywords = {key.removeprefix("guidance_"): value for key, value in options.items()}
    expected = formula(u, c, scales, **keywords)
    terms = guidance.terms([u, c])
    assert len(terms) == guidance.num_predictions == 1 + len(scales)
    got = guided_step(PREDICTION, 0, torch.zeros(shape, dtype=torch.float64), terms, guidance, backend=backend)
    assert (got - expected).norm() <= 1e-13 * expected.norm()
    single = [u.float(), c.float()]
    own = formula(*single, scales, **keywords)
    got = guided_step(PREDICTION, 0, torch.zeros(shape), guidance.terms(single), guidance, backend=backend)
    assert (got - expected).norm() <= 2 * (own - expected).norm()
    low = [u.bfloat16(), c.bfloat16()]
    expected = formula(*[each.double() for each in low], scales, **keywords)
    got = guided_step(PREDICTION, 0, torch.zeros(shape), guidance.terms(low), guidance, backend=backend)
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_equal_scales_are_classifier_free_guidance():
    u, c = predictions()
    guidance = FrequencyDecoupled([7.5, 7.5, 7.5])
    got = guided_step(PREDICTION, 0, torch.zeros_like(u), guidance.terms(torch.cat([u, c])), guidance)
    expected = guided_step(PREDICTION, 0, torch.zeros_like(u), [u, c], ClassifierFree(7.5))
    assert torch.equal(got, expected)


def test_scales_for_each_sample_and_step():
    u, c = predictions()
    guidance = FrequencyDecoupled([torch.tensor([[10.0, 4.0], [8.0, 2.0]]), 3.0])
    assert (guidance.steps, guidance.batch) == (2, 2)
    table = fastguide.ddim(NoiseSchedule.linear(), 2)
    got = guided_step(table, 1, u, guidance.terms([u, c]), guidance)
    for k, scale in enumerate((8.0, 2.0)):
        expected = guided_step(table, 1, u, formula(u, c, [scale, 3.0]))[k]
        torch.testing.assert_close(got[k], expected, rtol=1e-12, atol=1e-12)


# ---- In a loop ----


def model(x, t, y):
    return 0.3 * torch.tanh(x + y.reshape(-1, 1, 1, 1) * torch.linspace(-1, 1, x.shape[-1]).to(x))


COND, UNCOND = torch.tensor([1.0, -0.5]).double(), torch.zeros(2).double()


def loop(x, scales, active=lambda index: True):
    for index in range(len(TABLE)):
        u, c = model(x, None, UNCOND), model(x, None, COND)
        x = guided_step(TABLE, index, x, formula(u, c, scales) if active(index) else c)
    return x


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_sampler_makes_the_terms(batched, skip):
    """And calls the model for two conditions only."""
    calls = []

    def counted(x, t, y):
        calls.append(len(x))
        return model(x, t, y)

    guidance = FrequencyDecoupled([6.0, 2.0]).within(TABLE, 0.0, 0.5)
    x, _ = predictions(seed=1)
    sampler = Sampler(counted, TABLE, guidance, batched=batched, skip_unconditional=skip)
    got = sampler(x, cond=COND, uncond=UNCOND)
    expected = loop(x, [6.0, 2.0], lambda index: index < 3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert sum(calls) == 2 * (3 * 2 + 3 * (1 if skip else 2))


def test_a_last_scale_of_one_needs_the_unconditional_prediction():
    """It has no weight of its own then, but the low-passes are made of it."""
    guidance = FrequencyDecoupled([6.0, 1.0])
    assert guidance.steps_without_unconditional() == (False,)
    x, _ = predictions(seed=2)
    got = Sampler(model, TABLE, guidance, skip_unconditional=True)(x, cond=COND, uncond=UNCOND)
    torch.testing.assert_close(got, loop(x, [6.0, 1.0]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("skip", [False, True])
def test_gradients_of_a_loop(skip):
    """They go through the low-passes too."""
    x, _ = predictions(seed=4)
    guidance = FrequencyDecoupled([6.0, 2.0]).within(TABLE, 0.0, 0.5)
    sampler = Sampler(model, TABLE, guidance, skip_unconditional=skip)
    got, expected = (x.clone().requires_grad_() for _ in range(2))
    sampler.differentiable(got, cond=COND, uncond=UNCOND).square().sum().backward()
    loop(expected, [6.0, 2.0], lambda index: index < 3).square().sum().backward()
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-10)


def test_rescaled_in_a_sampler_and_with_a_classifier_beside():
    x, _ = predictions(seed=3)
    guidance = FrequencyDecoupled([6.0, 2.0], guidance_rescale=0.7) + Classifier(grad_fn=lambda x, t: 0.0 * x)
    assert (guidance.num_conditions, guidance.num_predictions) == (2, 3)
    got = Sampler(model, TABLE, guidance)(x, cond=COND, uncond=UNCOND)
    y = x
    for index in range(len(TABLE)):
        u, c = model(y, None, UNCOND), model(y, None, COND)
        y = guided_step(TABLE, index, y, formula(u, c, [6.0, 2.0], rescale=0.7))
    torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-10)


def test_bad_arguments():
    with pytest.raises(ValueError, match="guidance_scales: expected a sequence of at least two scales"):
        FrequencyDecoupled([7.5])
    with pytest.raises(ValueError, match="base: expected"):
        FrequencyDecoupled([7.5, 2.0], base="u")
    with pytest.raises(ValueError, match="expected at most 4"):
        FrequencyDecoupled([7.5, 2.0, 3.0, 4.0], guidance_rescale=0.5)
    guidance = FrequencyDecoupled([7.5, 2.0])
    u, c = predictions()
    with pytest.raises(ValueError, match="predictions: expected two, unconditional and conditional, got 3"):
        guidance.terms([u, c, c])
    with pytest.raises(ValueError, match="at least 6 by 6 pixels"):
        guidance.terms([u[..., :5], c[..., :5]])
    with pytest.raises(ValueError, match=r"expected shape \(batch, ..., height, width\)"):
        guidance.terms([u[0, 0], c[0, 0]])
