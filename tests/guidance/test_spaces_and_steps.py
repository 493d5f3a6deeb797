"""Guidance that is taken in x_0, that knows how far the loop is, and that is left out of a part of it."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import (
    AdaptiveProjected,
    Classifier,
    ClassifierFree,
    Composed,
    Guidance,
    NoiseSchedule,
    Sampler,
    ZeroStar,
    as_guidance,
    guided_step,
)
from fastguide.step.backends.native import set_cpu_capability
from tests.support.recorded_graph import recorded  # noqa: F401

SCHEDULE, SHAPE = NoiseSchedule.linear(), (3, 4, 6, 5)
TABLE = fastguide.ddim(SCHEDULE, 10)
FLOW = fastguide.flow_match_euler(fastguide.FlowSchedule(shift=3.0), 10)
BACKENDS = ("native", "reference")


def randn(seed, count=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def flat(values):
    return values.flatten(1)


def each(values):
    return values.view(-1, 1, 1, 1)


# ---- x_0 ----


def rescaled(u, c, scale=7.5, phi=0.7):
    m = u + scale * (c - u)
    ratio = each(flat(c).std(1) / flat(m).std(1))
    return phi * ratio * m + (1 - phi) * m


def projected(u, c, scale=7.5):
    d = c - u
    d = d * (3.0 / each(flat(d).norm(dim=1))).clamp(max=1)
    unit = c / each(flat(c).norm(dim=1))
    return c + scale * (d - each((flat(d) * flat(unit)).sum(1)) * unit)


@as_guidance(predictions=3, space="original")
def mean_of_three(v):
    first, second, third = v.predictions
    return 0.5 * (first + second + v.norm(first) / v.norm(third) * third)


def mean(u, c, third):
    return 0.5 * (u + c + each(flat(u).norm(dim=1) / flat(third).norm(dim=1)) * third)


IN_ORIGINALS = {
    "rescaled": (ClassifierFree(7.5, guidance_rescale=0.7, space="original"), rescaled),
    "projected": (AdaptiveProjected(7.5, norm_threshold=3.0, base="cond", space="original"), projected),
    "one's own": (mean_of_three(), mean),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", [TABLE, FLOW], ids=["epsilon", "velocity"])
@pytest.mark.parametrize("name", IN_ORIGINALS)
def test_guidance_of_originals(name, table, backend):
    """Each prediction's x_0, combined, and that x_0's step."""
    guidance, formula = IN_ORIGINALS[name]
    x, *given = randn(1, 1 + guidance.num_predictions)
    for index in (0, 4, 9):
        row = {column: float(values[index]) for column, values in table.coefficients().items()}
        a, b = row["x0_scale"] * row["x0_sample"], row["x0_scale"] * row["x0_pred"]
        m = (formula(*[a * x + b * p for p in given]) - a * x) / b
        expected = guided_step(table, index, x, m)
        got = guided_step(table, index, x, given, guidance, backend=backend)
        assert (got - expected).norm() <= 1e-11 * expected.norm()
        assert guidance.last_weights.shape == (1, 3, guidance.num_predictions + 2)
        singles = [p.float() for p in given]
        close = guided_step(table, index, x.float(), singles, guidance, backend=backend)
        assert (close - expected).norm() <= 1e-5 * expected.norm()


def test_guidance_whose_weights_sum_to_one_is_the_same_in_every_space():
    x, u, c = randn(2, 3)
    all_kept = {"eta": 1.0, "norm_threshold": None}
    here, there = (AdaptiveProjected(7.5, **all_kept, space=space) for space in ("prediction", "original"))
    expected = guided_step(TABLE, 4, x, [u, c], here)
    assert (guided_step(TABLE, 4, x, [u, c], there) - expected).norm() <= 1e-13 * expected.norm()


def test_a_sample_in_place_and_the_next_input_staged():
    guidance, _ = IN_ORIGINALS["projected"]
    x, u, c = (values.float() for values in randn(3, 3))
    expected = guided_step(TABLE, 4, x, [u, c], guidance)
    staged = torch.zeros(6, *SHAPE[1:])
    assert guided_step(TABLE, 4, x, [u, c], guidance, out=x, staged=staged) is x
    assert torch.equal(x, expected)
    assert torch.equal(staged, torch.cat([x, x]))


@pytest.mark.parametrize("shape", [(1, 3, 200, 200), (5, 2, 33, 31)], ids=["parts", "samples"])
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_large_samples(capability, shape):
    guidance = ClassifierFree(7.5, guidance_rescale=0.7, space="original")
    generator = torch.Generator().manual_seed(4)
    x, u, c = (torch.randn(shape, generator=generator) for _ in range(3))
    best = set_cpu_capability("avx512")
    try:
        set_cpu_capability(capability)
        got = guided_step(TABLE, 4, x, [u, c.bfloat16()], guidance)
    finally:
        set_cpu_capability(best)
    expected = guided_step(TABLE, 4, x, [u, c.bfloat16()], guidance, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---- How far the loop is ----


def model(x, t, y):
    return 0.3 * torch.tanh(x + torch.sin(t / 300).reshape(-1, 1, 1, 1) + y.reshape(-1, 1, 1, 1))


COND, UNCOND = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)


def loop(x, guidance, table=TABLE):
    """The loop by hand; ``guidance``: of each step, or None for the conditional prediction."""
    for index, t in enumerate(table.timesteps):
        times = torch.full((len(x),), float(t))
        given = [model(x, times, y.to(x)) for y in (UNCOND, COND)]
        at = guidance(index)
        x = guided_step(table, index, x, given[1] if at is None else given, at, backend="reference")
    return x


def sample(guidance, x, table=TABLE, **options):
    return Sampler(model, table, guidance, **options)(x, cond=COND.to(x), uncond=UNCOND.to(x))


@pytest.mark.parametrize("cuda_graph", ["loop", False])
def test_the_first_steps_of_zero_star_are_of_no_prediction(cuda_graph, recorded):  # noqa: F811
    (x,) = randn(5)
    got = sample(ZeroStar(4.0, zero_init_steps=2), x, FLOW, cuda_graph=cuda_graph)
    later, zero = ZeroStar(4.0, zero_init_steps=0), Guidance(torch.zeros(1, 1, 3, dtype=torch.float64), None)
    expected = loop(x, lambda index: zero if index < 2 else later, FLOW)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_steps_are_counted_from_where_a_sample_begins():
    """Also of requests that share a batch, and of a loop that begins later."""
    (x,) = randn(6)
    requests = [(ZeroStar(4.0), FLOW), (ZeroStar(2.0, guidance_rescale=0.0), FLOW[4:]), (ZeroStar(4.0), FLOW)]
    slots = Sampler(model, FLOW, requests[0][0]).slots(3)
    done = {}
    for k, (guidance, table) in enumerate(requests):
        one = slice(k, k + 1)
        assert slots.admit(x[one], cond=COND[one], uncond=UNCOND[one], table=table, guidance=guidance) == k
        done |= slots.step()
    while slots.active:
        done |= slots.step()
    for k, (guidance, table) in enumerate(requests):
        expected = sample(guidance, x, table)[k]
        torch.testing.assert_close(done[k].view_as(expected), expected, rtol=1e-10, atol=1e-10)


@as_guidance(predictions=2)
def first_then_second(v, first, second=3.0, unused=0.0):
    uncond, cond = v.predictions
    return uncond + (first - second * v.norm(cond - uncond) / v.norm(uncond)) * (cond - uncond)


@as_guidance(predictions=2)
def second_then_first(v, second, first):
    uncond, cond = v.predictions
    return uncond + (first - second * v.norm(cond - uncond) / v.norm(uncond)) * (cond - uncond)


def test_the_same_program_with_its_parameters_in_another_order():
    """Requests with it share a state, which has a place for each parameter."""
    (x,) = randn(10)
    sampler = Sampler(model, TABLE)
    for guidance in (first_then_second(5.0, 2.0, 1.0), second_then_first(2.0, 5.0)):
        sampler.guidance = guidance
        got = sampler(x, cond=COND, uncond=UNCOND)
        torch.testing.assert_close(got, loop(x, lambda index, at=guidance: at), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("last", ["a step", "another loop"])
def test_a_sampler_s_weights_may_be_looked_at(last):
    """Also if the guidance has been used elsewhere since the loop before."""
    (x,) = randn(11)
    u, c = randn(12, 2)
    guidance, other = ZeroStar(4.0, zero_init_steps=0), ZeroStar(2.0, zero_init_steps=0)
    sampler = Sampler(model, TABLE, guidance)
    sampler(x, cond=COND, uncond=UNCOND)
    made = guidance.last_weights.clone()
    if last == "a step":
        guided_step(TABLE, 3, x, [u, c], guidance)
        assert not torch.equal(guidance.last_weights, made)
    else:
        sampler.guidance = other
        sampler(x, cond=COND, uncond=UNCOND)
        sampler.guidance = guidance
    sampler(x, cond=COND, uncond=UNCOND)
    assert torch.equal(guidance.last_weights, made)


# ---- Intervals ----

GUIDED = {
    "classifier-free": ClassifierFree(5.0),
    "rescaled": ClassifierFree(5.0, guidance_rescale=0.7),
    "projected": AdaptiveProjected(5.0, norm_threshold=3.0),
    "of x_0": AdaptiveProjected(5.0, norm_threshold=3.0, space="original"),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cuda_graph", ["loop", False])
@pytest.mark.parametrize("name", GUIDED)
def test_guidance_within_an_interval(name, cuda_graph, skip, recorded):  # noqa: F811
    (x,) = randn(8)
    inner = GUIDED[name]
    got = sample(inner.within(TABLE, 0.2, 0.75), x, cuda_graph=cuda_graph, skip_unconditional=skip)
    expected = loop(x, lambda index: inner if 2 <= index < 7 else None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GUIDED)
def test_the_steps_of_an_interval(name, backend):
    x, u, c = randn(9, 3)
    inner = GUIDED[name]
    guidance = inner.within(TABLE, 0.5)
    assert guidance.steps_without_unconditional() == (True,) * 5 + (False,) * 5
    for index in (4, 5):
        got = guided_step(TABLE, index, x, [u, c], guidance, backend=backend)
        expected = guided_step(TABLE, index, x, [u, c], inner) if index == 5 else guided_step(TABLE, index, x, c)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    both = guidance.within(TABLE, 0.0, 0.8)
    assert both.steps_without_unconditional() == (True,) * 5 + (False,) * 3 + (True,) * 2


def test_an_interval_of_noise_levels():
    levels = TABLE.levels.sigma / TABLE.levels.alpha
    guidance = ClassifierFree(5.0).within(TABLE, sigma=(0.3, float(levels[3])))
    active = [not skipped for skipped in guidance.steps_without_unconditional()]
    assert active == [0.3 < level <= float(levels[3]) for level in levels.tolist()]
    assert 0 < sum(active) < 7


def test_a_classifier_and_conditions_beside_it_have_no_part_outside():
    classifier = Classifier(grad_fn=lambda x, t: x, guidance_scale=3.0)
    guidance = (Composed([2.0, 3.0]) + classifier).within(TABLE, 0.5)
    weights = guidance.weights(torch.device("cpu"), torch.float64)
    assert torch.equal(weights[0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert torch.equal(weights[9, 0], torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=torch.float64))


def test_bad_arguments():
    guidance = ClassifierFree(5.0)
    with pytest.raises(ValueError, match=r"start: expected a fraction, 0 to 1, got 1\.5"):
        guidance.within(TABLE, 1.5)
    with pytest.raises(ValueError, match=r"stop: expected at least start, 0\.5, got 0\.25"):
        guidance.within(TABLE, 0.5, 0.25)
    with pytest.raises(ValueError, match="sigma: expected a low and a high level"):
        guidance.within(TABLE, sigma=(2.0, 1.0))
    with pytest.raises(ValueError, match="expected as many calls as there are scales, 3, got 10"):
        ClassifierFree.per_step([1.0, 2.0, 3.0]).within(TABLE, 0.5)
    with pytest.raises(TypeError, match="expected weights that are no function's"):
        Guidance.from_predictions(lambda p: torch.ones(3, 2), 2).within(TABLE, 0.5)
    with pytest.raises(ValueError, match=r"space: expected one of .*, got 'epsilon'"):
        ZeroStar(3.0, space="epsilon")
    with pytest.raises(ValueError, match="space: expected one of"):
        ClassifierFree(3.0, space="x0")
    with pytest.raises(ValueError, match="zero_init_steps: expected"):
        ZeroStar(3.0, zero_init_steps=-1)
    unknown = fastguide.StepTable.from_columns(TABLE.timesteps, {"x0_pred": torch.ones(10).double()}, name="of mine")
    with pytest.raises(ValueError, match="sigma: expected a table that knows the levels"):
        guidance.within(unknown, sigma=(0.1, 1.0))
