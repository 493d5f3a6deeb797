"""Masks before guidance and after it, and parts that are cut out: what the step takes, and what is made before it."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import guider_utils

from fastguide import StepTable, guided_step
from fastguide.diffusers import at_once
from fastguide.diffusers import traced as module
from fastguide.diffusers.guidance_arguments import guidance_of
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.scheduler_step import counted_as
from fastguide.diffusers.taken import Taken
from fastguide.diffusers.traced import Combined, Fusion, Traced
from tests.support import conditioned_pipelines as conditioned
from tests.support.family_pipelines import result
from tests.support.scheduler_pair import fused

SHAPE, SCALE = (2, 3, 4, 10), 3.5
GUIDED, ALONE = "fused with guidance", "fused without guidance"
PREDICTION = StepTable.from_columns(
    torch.zeros(1), {"out_pred": torch.ones(1, dtype=torch.float64)}, name="a prediction"
)


class Inputs:
    """The model's outputs, the latents, a known part and its mask, all of one dtype."""

    def __init__(self, seed, dtype=torch.float64, mask=(2, 1, 4, 1)):
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(4)]
        self.u, self.c, self.x, self.known = [each.to(dtype) for each in draw]
        self.mask = torch.rand(mask, generator=generator, dtype=torch.float64).to(dtype)
        self.sigma = torch.tensor(0.625, dtype=dtype)

    def traced(self, fusion):
        """Return the same with outputs that are traced."""
        self.u, self.c = module.traced(self.u, fusion), module.traced(self.c, fusion)
        return self

    def halves(self, fusion):
        self.u, self.c = module.traced(torch.cat([self.u, self.c]), fusion).chunk(2)
        return self


def guided(u, c):
    return c + SCALE * (c - u)


def velocity_of(x, x0, sigma):
    return (x - x0) / sigma


def known_velocity(i):
    """Put a known velocity in its place before guidance, as Cosmos-Predict2.5 does."""
    kept = (i.x - i.known) * i.mask
    return guided(kept + i.u * (1 - i.mask), kept + i.c * (1 - i.mask))


def known_x0(i):
    """Put a known x_0 in its place before guidance, as Cosmos-Predict2 does."""
    x0 = [i.mask * i.known + (1 - i.mask) * (0.6 * i.x + i.sigma * each) for each in (i.u, i.c)]
    return velocity_of(i.x, guided(*x0), i.sigma)


def known_after(i):
    """Put it there after guidance, as LTX-2 with conditions does."""
    x0 = guided(i.x - i.u * i.sigma, i.x - i.c * i.sigma)
    return velocity_of(i.x, x0 * (1 - i.mask) + i.known * i.mask, i.sigma)


def known_after_rescaling(i):
    cond = i.x - i.c * i.sigma
    x0 = guider_utils.rescale_noise_cfg(guided(i.x - i.u * i.sigma, cond), cond, 0.7)
    return velocity_of(i.x, (1 - i.mask) * x0 + i.known * i.mask, i.sigma)


def rescaled_sum(m, x):
    return guider_utils.rescale_noise_cfg(m + x, m, 0.7)


EXPRESSIONS = {  # and how many tensors the step weighs
    "a velocity": (known_velocity, 3),
    "x_0": (known_x0, 5),
    "after": (known_after, 3),
    "after rescaling": (known_after_rescaling, 3),
    "alone, after": (lambda i: guided(i.u, i.c) * i.mask, 1),
    "after, rescaled": (lambda i: rescaled_sum(guided(i.u, i.c) * i.mask, i.x), 2),
    "masked, rescaled": (lambda i: guider_utils.rescale_noise_cfg(known_velocity(i), i.c * i.mask, 0.7), 4),
}


def weighed(output):
    """Return what a step makes of its predictions, in float64, how many they are, and what it is counted as."""
    taken, scale = resolved(output, torch.zeros(SHAPE), None)
    assert type(taken) is Taken
    guidance = guidance_of(taken, torch.zeros(SHAPE), scale, None, 1.0, "epsilon")
    predictions = [each.double() for each in taken.predictions]
    made = guided_step(PREDICTION, 0, torch.zeros_like(predictions[0]), predictions, guidance)
    return made, len(predictions), counted_as(guidance)


def error(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [(2, 1, 4, 1), (1, 1, 1, 10), (10,), SHAPE], ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_masked_prediction_is_guided_in_the_step(name, mask, dtype):
    expression, count = EXPRESSIONS[name]
    seed = torch.randint(2**31, ()).item()
    own, given = expression(Inputs(seed, dtype, mask)), Inputs(seed, dtype, mask)
    exact = Inputs(seed, torch.float64, mask)
    for kind in ("u", "c", "x", "known", "mask"):  # of the rounded numbers
        setattr(exact, kind, getattr(given, kind).double())
    expected = expression(exact)
    for traced in (Inputs.traced, Inputs.halves):
        fusion = Fusion()
        got, predictions, counted = weighed(expression(traced(Inputs(seed, dtype, mask), fusion)))
        assert (predictions, counted) == (count, GUIDED)
        assert not fusion.computed
        assert error(got, expected) <= 2 * error(own, expected) + 2e-7


@pytest.mark.parametrize("name", ["a velocity", "after", "alone, after"])
def test_inference_mode(name):
    expression, _ = EXPRESSIONS[name]
    with torch.inference_mode():
        own = expression(Inputs(5, torch.float32))
        got, _, counted = weighed(expression(Inputs(5, torch.float32).traced(Fusion())))
    assert counted == GUIDED
    torch.testing.assert_close(got.float(), own, rtol=1e-5, atol=1e-5)


PUT_TOGETHER = {
    "stacked": lambda m: torch.stack(m.unbind()),
    "stacked alone": lambda m: torch.stack([m])[0],
    "joined": lambda m: torch.cat([m[:1], m[1:]]),
    "copied": lambda m: m.clone(),
}


@pytest.mark.parametrize("counts", [GUIDED, ALONE])
@pytest.mark.parametrize("name", PUT_TOGETHER)
def test_what_is_put_together_of_masked_guidance_is_guidance(name, counts):
    """What is put together of one masked prediction is none."""
    u, c = Inputs(12, torch.float32), Inputs(12, torch.float32).traced(Fusion())
    masked = [PUT_TOGETHER[name]((guided(i.u, i.c) if counts == GUIDED else i.c) * i.mask) + i.known for i in (u, c)]
    got, predictions, counted = weighed(masked[1])
    assert (predictions, counted) == (2, counts)
    torch.testing.assert_close(got.float(), masked[0])


def test_one_prediction_that_is_masked_guides_nothing():
    for masked in (lambda i: i.c * i.mask + i.known, lambda i: (0.5 * i.c) * i.mask + i.known):
        own, made = masked(Inputs(1, torch.float32)), masked(Inputs(1, torch.float32).traced(Fusion()))
        got, predictions, counted = weighed(made)
        assert (predictions, counted) == (2, ALONE)
        torch.testing.assert_close(got.float(), own)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masks_of_other_dtypes(dtype):
    mask = (torch.arange(10) > 4).to(dtype)
    given = Inputs(2, torch.bfloat16)
    made = mask * module.traced(given.c, Fusion())
    assert type(made) is Traced
    assert made.dtype == torch.bfloat16
    assert torch.equal(made.value(), mask * given.c)


def test_guidance_that_is_cast_is_masked_in_that_dtype():
    given, own, fusion = Inputs(9, torch.bfloat16), Inputs(9, torch.bfloat16), Fusion()
    mask = given.mask.float()
    u, c = [module.traced(each, fusion).float() for each in (given.u, given.c)]
    made = guided(u, c) * mask
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.value(), guided(own.u.float(), own.c.float()) * mask)


def test_a_sum_with_latents_in_float64_is_masked_in_that_dtype():
    given, own = Inputs(11, torch.float32), Inputs(11, torch.float32)
    x, fusion = torch.randn(SHAPE, dtype=torch.float64), Fusion()
    u, c = module.traced(given.u, fusion), module.traced(given.c, fusion)
    made = guided(u + x, c + x) * given.mask
    expected = guided(own.u.double() + x, own.c.double() + x) * given.mask
    assert made.dtype == torch.float64
    assert error(made.value(), expected) <= 1e-14


def test_what_is_masked_of_an_earlier_step_is_a_state():
    """It is added up at once: a sum that waits would grow at each step."""
    given, fusion = Inputs(10, torch.float32), Fusion()
    before = module.traced(given.u, fusion)
    fusion.steps += 1
    state = 0.5 * (before * given.mask)
    made = state + module.traced(given.c, fusion)
    assert type(made) is Traced
    assert not made.source.is_output
    assert torch.equal(made.value(), 0.5 * (given.u * given.mask) + given.c)


def test_what_is_masked_is_as_it_was():
    """The product is made at once, so that writes to the output or to the mask change nothing."""
    given = Inputs(3, torch.float32)
    expected = guided(given.u * given.mask, given.c * given.mask)
    u, c = given.u.clone(), given.c.clone()
    traced_u, traced_c = module.traced(u, Fusion()), module.traced(c, Fusion())
    traced_c.source.fusion = traced_u.source.fusion
    made = guided(traced_u * given.mask, traced_c * given.mask)
    for written in (u, c, given.mask):
        written.zero_()
    assert type(made) is Combined
    torch.testing.assert_close(weighed(made)[0].float(), expected)


def test_a_write_to_a_masked_prediction_is_seen():
    given = Inputs(4, torch.float32).traced(Fusion())
    u, c = given.u * given.mask, given.c * given.mask
    made = guided(u, c)
    c[:, 1:] = 0  # as Cosmos 3 does with actions
    with pytest.raises(RuntimeError, match="was written to after guidance"):
        resolved(made, torch.zeros(SHAPE), None)
    again = guided(u, c)
    expected = guided(u.value(), c.value())
    assert (c.value()[:, 1:] == 0).all()
    torch.testing.assert_close(weighed(again)[0].float(), expected)


MULTIPLES = {
    "a multiple": lambda of: of,
    "another sign": lambda of: -of,
    "a part": lambda of: of[:],
    "a sum of equals": lambda of: of + of,
}


@pytest.mark.parametrize("name", MULTIPLES)
def test_a_multiple_that_is_masked_waits_on(name):
    """As the output itself does: what is masked is computed for the product alone, and kept nowhere."""
    made, fusion = [], Fusion()
    fusion.tries = True
    for i in (Inputs(13, torch.float32), Inputs(13, torch.float32).traced(fusion)):
        of = 0.5 * i.u
        multiple = MULTIPLES[name](of)
        made.append(of + 0.3 * (multiple * i.mask) - multiple)
    assert type(made[1]) is Combined
    assert fusion.tries
    torch.testing.assert_close(weighed(made[1])[0].float(), made[0])
    assert torch.equal(made[1].value(), made[0])


LEFT = {
    "a gradient": lambda i: i.mask.requires_grad_(),
    "complex": lambda i: torch.view_as_complex(torch.ones(10, 2)),
    "more dimensions": lambda i: i.mask[None],
    "more samples": lambda i: torch.ones(3, 2, 1, 1, 1)[:, 0].repeat(1, 1, 1, 1)[:1].expand(1, 1, 1, 1)[None],
}


@pytest.mark.parametrize("name", LEFT)
def test_other_products_are_the_pipeline_s(name):
    given = Inputs(6, torch.float32)
    other = LEFT[name](given)
    fusion = Fusion()
    fusion.tries = True
    made = guided(*[module.traced(each, fusion) for each in (given.u, given.c)]) * other
    assert type(made) is torch.Tensor
    assert torch.equal(made, guided(given.u, given.c) * other)
    assert fusion.computed == {"mul": 1}


def test_guidance_before_a_mask_is_one_launch(monkeypatch):
    launches, real = [], at_once.guided_step

    def spy(*arguments, **named):
        launches.append(arguments[4])
        return real(*arguments, **named)

    monkeypatch.setattr(at_once, "guided_step", spy)
    known_after_rescaling(Inputs(7, torch.float32).traced(Fusion()))
    assert len(launches) == 1
    assert launches[0].weights_from is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_is_cut_out_of_rescaled_guidance(dtype):
    """As LTX-2 from an image does: its deviations are of the whole, whose first frame is then left out."""

    def expression(i):
        m = guider_utils.rescale_noise_cfg(guided(i.u, i.c), i.c, 0.7)
        return velocity_of(i.x.movedim(1, 2), m.permute(0, 2, 1, 3), i.sigma)[:, 1:]

    own, exact, given = (expression(Inputs(8, each)) for each in (dtype, torch.float64, torch.float64))
    taken, scale = resolved(expression(Inputs(8, dtype).traced(Fusion())), torch.zeros_like(own), None)
    guidance = guidance_of(taken, torch.zeros_like(own), scale, None, 1.0, "epsilon")
    predictions = [each.double().contiguous() for each in taken.predictions]
    got = guided_step(PREDICTION, 0, torch.zeros_like(predictions[0]), predictions, guidance)
    assert counted_as(guidance) == GUIDED
    assert error(got, exact) <= 2 * error(own, given) + 2e-7


# ---- Pipelines ----

COSMOS_1 = {ALONE: 7, GUIDED: 7}  # has its scheduler make x_0 first
PIPELINES = {
    "Cosmos 1": (conditioned.cosmos_1_from_image, COSMOS_1),
    "Cosmos-Predict2": (conditioned.cosmos_2_from_image, {GUIDED: 7}),
    "Cosmos-Predict2.5": (conditioned.cosmos_25_from_video, {GUIDED: 7}),
    "Cosmos-Transfer2.5": (conditioned.cosmos_25_transfer, {GUIDED: 14}),
    "LTX-2, from an image": (conditioned.ltx_2_from_image, {GUIDED: 14}),
    "LTX-2, with conditions": (conditioned.ltx_2_with_conditions, {GUIDED: 14}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_makes_the_same(name):
    make, counts = PIPELINES[name]
    pipe, given = make()
    before = {steps: result(pipe, given, steps) for steps in (4, 3)}
    assert (result(pipe, {**given, "guidance_scale": 4.5}) - before[4]).abs().max() > 0.02
    done = fused.accelerate(pipe)
    for steps, expected in before.items():
        torch.testing.assert_close(result(pipe, given, steps), expected, rtol=2e-4, atol=2e-4)
    assert done.counts == counts
    assert not done.computed
    fused.restore(pipe)
    assert torch.equal(result(pipe, given), before[4])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_in_inference_mode_makes_the_same(name):
    pipe, given = PIPELINES[name][0]()
    before = {steps: result(pipe, given, steps) for steps in (4, 3)}
    done = fused.accelerate(pipe)
    with torch.inference_mode():
        for steps, expected in before.items():
            torch.testing.assert_close(result(pipe, given, steps), expected, rtol=2e-4, atol=2e-4)
    assert done.counts == PIPELINES[name][1]
