"""Guidance that is made of norms, inner products and deviations, as diffusers computes it: traced, and fused."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import adaptive_projected_guidance, classifier_free_zero_star_guidance, guider_utils

import fastguide
from fastguide.diffusers import traced as module
from fastguide.diffusers.formula import Formula
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.taken import Taken
from fastguide.diffusers.traced import Combined, Fusion
from tests.support.pipelines import FreePipeline
from tests.support.scheduler_pair import fused

ONE = torch.ones(1, dtype=torch.float64)
PREDICTION = fastguide.StepTable.from_columns(
    torch.tensor([0]), {"x0_scale": ONE, "x0_pred": ONE, "out_x0": ONE}, name="the prediction"
)
SHAPE = (2, 4, 16, 12)
LATENTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def outputs(seed=0, count=2, delta=0.3, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator, dtype=torch.float64)
    others = [first + delta * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count - 1)]
    return [first, *others]


def traced(tensors, fusion=None, halves=False):
    fusion = Fusion() if fusion is None else fusion
    if halves:
        return module.traced(torch.cat(tensors), fusion).chunk(len(tensors))
    return [module.traced(tensor, fusion) for tensor in tensors]


# ---- Formulas, as diffusers has them ----


def rescaled(u, c, scale=7.5, rescale=0.7):
    return guider_utils.rescale_noise_cfg(u + scale * (c - u), c, rescale)


def zero_star(u, c):
    scale = classifier_free_zero_star_guidance.cfg_zero_star_scale(c.flatten(1), u.flatten(1))
    u = u * scale.view(-1, *(1,) * (len(c.shape) - 1))
    return u + 5.0 * (c - u)


def helios(u, c):
    alpha = torch.sum(c.view(2, -1).float() * u.view(2, -1).float(), dim=1, keepdim=True)
    alpha = alpha / (torch.sum(u.view(2, -1).float() ** 2, dim=1, keepdim=True) + 1e-8)
    alpha = alpha.view(2, *[1] * (len(c.shape) - 1)).to(c.dtype)
    return u * alpha + 5.0 * (c - u * alpha)


def projected(u, c, original=False):
    return adaptive_projected_guidance.normalized_guidance(c, u, 7.5, None, 0.3, 4.0, original)


def magnitude_aware(u, c):
    dim = list(range(1, c.ndim))
    d = c - u
    ratio = torch.linalg.vector_norm(d, dim=dim, keepdim=True) / torch.linalg.vector_norm(u, dim=dim, keepdim=True)
    return u + (1.0 + 9.0 * torch.exp(-2.0 * ratio)) * d


def limited(u, c):
    m = u + 5.0 * (c - u)
    norms = [each.norm(p=2, dim=(1, 2, 3), keepdim=True) for each in (c, m)]
    return m * (1.2 * norms[0] / norms[1]).clamp(max=1.0)


def root_mean_square(u, c):
    m = u + 5.0 * (c - u)
    sums = [each.square().sum((1, 2, 3), keepdim=True).sqrt() for each in (c, m)]
    return (m / sums[1]) * sums[0]


def in_originals(u, c):
    sigma = torch.tensor(0.8)
    x = LATENTS.to(u.dtype)
    a, b = x - u * sigma, x - c * sigma
    return (x - guider_utils.rescale_noise_cfg(a + 3.0 * (b - a), b, 0.7)) / sigma


def a_scale_for_each_sample(u, c):
    scale = torch.tensor([3.0, 9.0], dtype=u.dtype).view(2, 1, 1, 1)
    return guider_utils.rescale_noise_cfg(u + scale * (c - u), c, 0.5) * scale


def centred(u, c):
    m = u + 5.0 * (c - u)
    return m * (2.0 + c.sum((1, 2, 3), keepdim=True) / 500.0 - m.std((1, 2, 3), keepdim=True).clamp_min(0.5))


def negated(u, c):
    return -rescaled(u, c).to(torch.float64).type_as(u) * 0.5 + 2.0 * u


FORMULAS = {
    "rescaled": rescaled,
    "rescaled and projected": lambda u, c: guider_utils.rescale_noise_cfg(projected(u, c), c, 0.6),
    "Zero*": zero_star,
    "Zero* of Helios": helios,
    "projected": projected,
    "projected, from c": lambda u, c: projected(u, c, True),
    "magnitude-aware": magnitude_aware,
    "limited": limited,
    "sums of squares": root_mean_square,
    "in x_0": in_originals,
    "a scale for each sample": a_scale_for_each_sample,
    "sums": centred,
    "negated and cast": negated,
}


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def made_by_a_step(output, sample=None):
    sample = torch.zeros(output.shape, dtype=torch.float32) if sample is None else sample
    taken, guidance = resolved(output, sample, None)
    assert isinstance(guidance, fastguide.Guidance)
    predictions = list(taken.predictions) if isinstance(taken, Taken) else taken
    return fastguide.guided_step(PREDICTION, 0, sample, predictions, guidance), guidance


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("delta", [0.3, 0.01])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_step_makes_what_diffusers_computes(name, delta, halves):
    """At most twice as far from float64 as diffusers' own float32; and by themselves, the values are diffusers'."""
    given = outputs(delta=delta)
    single = [each.float() for each in given]
    expected, own = FORMULAS[name](*given), FORMULAS[name](*single)
    made = FORMULAS[name](*traced(single, halves=halves))
    assert type(made) is Formula
    assert (made.shape, made.dtype, made.device) == (own.shape, own.dtype, own.device)
    got, guidance = made_by_a_step(made)
    assert guidance.weights_from is not None
    assert error(got, expected) <= 2 * error(own, expected) + 2e-8
    assert torch.equal(made.clone(), own)


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"in x_0"}))  # whose latents would be rounded as well
def test_outputs_in_16_bits_are_taken_as_they_are(name):
    """Diffusers rounds each norm to them: a step does not."""
    given = [each.bfloat16() for each in outputs(delta=0.1)]
    expected, own = FORMULAS[name](*[each.double() for each in given]), FORMULAS[name](*given)
    got, _ = made_by_a_step(FORMULAS[name](*traced(given)))
    assert error(got, expected) <= 2e-6 < error(own, expected)


@pytest.mark.parametrize("formula", [in_originals, lambda u, c: (LATENTS.float() - (u + 3.0 * (c - u))) / 0.5])
def test_the_latents_are_the_last_term(formula):
    """As a kernel takes differences to the first one, and those of predictions are exact."""
    given = [each.float() for each in outputs()]
    taken, _ = resolved(formula(*traced(given)), torch.zeros(SHAPE), None)
    assert len(taken.predictions) == 3
    assert torch.equal(taken.predictions[-1], LATENTS.float())


def test_more_terms_than_the_kernels_take():
    """Outputs that occur together are added first, as LTX-2's: the step has three terms."""

    def formula(u, c, p, q):
        x = LATENTS.to(u.dtype)
        a, b, d, e = (x - each * 0.8 for each in (u, c, p, q))
        guided = b + 2.0 * (b - a) + 1.0 * (b - d) + 2.0 * (b - e)
        return (x - guider_utils.rescale_noise_cfg(guided, b, 0.7)) / 0.8

    given = outputs(count=4)
    single = [each.float() for each in given]
    got, guidance = made_by_a_step(formula(*traced(single)))
    assert guidance.num_predictions == 3
    assert error(got, formula(*given)) <= 2 * error(formula(*single), formula(*given))


def test_terms_that_cancel_in_one_of_several_sums():
    """Of more outputs than the kernels take: one whose weight is 0 there is added to one that is not there."""

    def formula(u, c, p, q):
        whole, shift = u + 2.0 * c + 3.0 * p + 4.0 * q + LATENTS.to(u.dtype), c - p + p
        return whole * (shift.std((1, 2, 3), keepdim=True) / whole.std((1, 2, 3), keepdim=True))

    given = outputs(count=4)
    single = [each.float() for each in given]
    got, guidance = made_by_a_step(formula(*traced(single)))
    assert guidance.num_predictions == 3
    assert error(got, formula(*given)) <= 2 * error(formula(*single), formula(*given))


def test_latents_that_cancel_are_no_term():
    """Over x_0 and back, as in a sum without a norm."""

    def formula(u, c):
        x = LATENTS.to(u.dtype)
        return rescaled(*[(x - (x - 0.7 * each)) / 0.7 for each in (u, c)])

    given = outputs()
    single = [each.float() for each in given]
    got, guidance = made_by_a_step(formula(*traced(single)))
    assert guidance.num_predictions == 2
    assert error(got, formula(*given)) <= 2 * error(formula(*single), formula(*given))


# ---- What is kept ----


def test_a_program_is_traced_once_for_all_numbers(monkeypatch):
    from fastguide.guidance import moment_weights

    calls = []
    real = moment_weights.encode
    monkeypatch.setattr(moment_weights, "encode", lambda *a: calls.append(a) or real(*a))
    fusion, found = Fusion(), []
    for seed, (scale, rescale) in enumerate([(7.5, 0.7), (5.0, 0.7), (7.5, 0.7), (5.0, 0.3)]):
        given = [each.float() for each in outputs(seed)]
        got, guidance = made_by_a_step(rescaled(*traced(given, fusion), scale, rescale))
        assert error(got, rescaled(*outputs(seed), scale, rescale)) <= 3e-7
        found.append(guidance)
    assert len(calls) == 1
    assert found[0] is found[2]  # whose steps are repeated
    assert len({id(each) for each in found}) == 3
    assert found[0].weights_from.on(torch.device("cpu"))[0] is found[1].weights_from.on(torch.device("cpu"))[0]
    other = made_by_a_step(rescaled(*traced([each.float() for each in outputs()], Fusion())))[1]
    assert other is not found[0]  # another pipeline has memory of its own


def test_momentum_is_a_state_that_is_computed_at_each_step():
    """So that its terms do not become more from step to step."""
    fusion, theirs = Fusion(), adaptive_projected_guidance.MomentumBuffer(-0.5)
    ours, exact = (adaptive_projected_guidance.MomentumBuffer(-0.5) for _ in range(2))
    for step in range(4):
        given = outputs(step)
        single = [each.float() for each in given]
        made, own, expected = (
            adaptive_projected_guidance.normalized_guidance(c, u, 7.5, buffer, 0.0, 4.0)
            for (u, c), buffer in ((traced(single, fusion), ours), (single, theirs), (given, exact))
        )
        got, guidance = made_by_a_step(made)
        assert guidance.num_predictions == (3 if step else 2)
        assert error(got, expected) <= 2 * error(own, expected) + (4e-7 if step else 0)  # its difference to u rounds
        fusion.steps += 1


def running_direction(u, c, state):
    direction = (c - u) / (c - u).std((1, 2, 3), keepdim=True)
    state = direction if state is None else direction + 0.5 * state
    return c + 2.0 * state, state


def running_norm(u, c, state):
    norm = (c - u).norm(2, (1, 2, 3), keepdim=True)
    state = norm if state is None else 0.5 * norm + 0.5 * state
    return u + 3.0 * (c - u) * (norm / state), state


def running_scale(u, c, state):
    ratio = u.std((1, 2, 3), keepdim=True) / c.std((1, 2, 3), keepdim=True)
    state = ratio * (c - u) if state is None else state * ratio
    return c + 2.0 * state, state


@pytest.mark.parametrize("formula", [running_direction, running_norm, running_scale])
def test_a_state_of_a_formula_is_computed_at_each_step(formula):
    """So that it holds no outputs of steps before the last one."""
    fusion, states = Fusion(), [None] * 3
    for step in range(4):
        given = outputs(step)
        single = [each.float() for each in given]
        done = [formula(*of, state) for of, state in zip((given, single, traced(single, fusion)), states, strict=True)]
        (expected, own, made), states = zip(*done, strict=True)
        assert len(made.seen) <= 3  # both outputs, and the state
        assert not isinstance(resolved(made, torch.zeros(SHAPE), None)[0], torch.Tensor)
        fusion.steps += 1
    assert error(made.clone(), expected) <= 2 * error(own, expected) + 2e-7


# ---- What is computed ----


def of_five(u, c):
    return rescaled(u, c) + LATENTS.float() + 2 * LATENTS.float() + 3 * LATENTS.float()


COMPUTED = {
    "a norm of tokens, whose dimension is gone": (lambda u, c: u.norm(dim=-1), ""),
    "of guidance": (lambda u, c: (c - u).norm(dim=-1), "norm over dim -1"),
    "over the batch": (lambda u, c: (c - u).std(), "std"),
    "another norm": (lambda u, c: (c - u).norm(p=1, dim=(1, 2, 3), keepdim=True), "norm over dim 1, 2, 3"),
    "biased": (lambda u, c: (c - u).std((1, 2, 3), correction=0, keepdim=True), "std over dim 1, 2, 3"),
    "normalized by another norm": (
        lambda u, c: torch.nn.functional.normalize(c - u, p=1, dim=1), "normalize over dim 1",
    ),
    "normalized over the batch": (lambda u, c: torch.nn.functional.normalize(c - u, dim=0), "normalize over dim 0"),
    "a product": (lambda u, c: ((c - u) * u).abs(), "abs"),
    "a number that decides": (lambda u, c: bool(((c - u).norm(2, (1, 2, 3), keepdim=True) > 1).all()), "gt"),
    "numbers without the samples' shape": (
        lambda u, c: (c - u).norm(2, (1, 2, 3)) * u.flatten(1)[:, :2], "mul",
    ),
    "a mask of too many terms": (lambda u, c: of_five(u, c) * LATENTS.float(), "mul"),
    "a number and a factor for each element": (
        lambda u, c: (c - u).norm(2, (1, 2, 3), keepdim=True) * LATENTS.float(), "mul",
    ),
    "a sum with what broadcasts": (lambda u, c: rescaled(u, c) + LATENTS.float()[:1], "add"),
    "divided into": (lambda u, c: (c - u).norm(2, (1, 2, 3), keepdim=True) / (c - u), "div"),
    "a part of too many terms": (lambda u, c: of_five(u, c)[:, :2] * 1.0, "getitem"),
    "a power": (lambda u, c: (c - u) ** 3, "pow"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_other_operations_are_computed_and_named(name):
    program, by = COMPUTED[name]
    fusion = Fusion()
    fusion.tries = True
    given = [each.float() for each in outputs()]
    got, expected = program(*traced(given, fusion)), program(*given)
    if isinstance(expected, torch.Tensor):
        got = got if type(got) is torch.Tensor else got.computed()
        assert torch.equal(got, expected)
    else:
        assert got == expected
    assert fusion.computed == ({by: 1} if by else {})


def a_limit(x):
    """Return a number for each sample, in the shape of the sample."""
    return torch.minimum(torch.ones_like(x), 12.0 / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True))


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("number", "is_fused"),
    [
        (lambda x: x.std((1, 2, 3), keepdim=True)[[1, 0]], False),
        (lambda x: x.std((1, 2, 3))[torch.tensor([1, 0])].view(2, 1, 1, 1), False),
        (lambda x: a_limit(x).transpose(0, 1), False),
        (lambda x: a_limit(x).permute(1, 0, 2, 3), False),
        (lambda x: x.std((1, 2, 3), keepdim=True).transpose(1, 3)[:, 0, ..., None].movedim(1, 2), True),
        (lambda x: x.std((1, 2, 3))[:, None, None, None], True),
    ],
)
def test_numbers_of_other_samples_are_computed(number, is_fused, halves):
    """A pipeline that puts the samples' numbers in another order gets them so."""
    given = [each.float() for each in outputs(shape=(2, 2, 6, 5))]
    own, made = (u + 4.0 * (c - u) * number(c) for u, c in (given, traced(given, halves=halves)))
    assert type(made) is (Formula if is_fused else Combined)
    if is_fused:
        assert error(made_by_a_step(made)[0], own.double()) <= 5e-7
    assert torch.equal(made.clone(), own)


@pytest.mark.parametrize("first", [True, False])
def test_a_scale_that_is_not_finite_is_computed_and_hinders_no_other(first):
    fusion, given = Fusion(), [each.float() for each in outputs()]
    for number in (float("inf"), 3.0) if first else (3.0, float("inf"), 3.0):
        scale = torch.tensor([3.0, number]).view(2, 1, 1, 1)
        made, own = (
            guider_utils.rescale_noise_cfg(u + scale * (c - u), c, 0.5) for u, c in (traced(given, fusion), given)
        )
        got, guidance = resolved(made, torch.zeros(SHAPE), None)
        if number == 3.0:
            assert guidance is not None
        else:
            torch.testing.assert_close(got, own, rtol=0, atol=0, equal_nan=True)


def test_one_sample_has_the_norms_of_its_batch():
    given = [each[:1].float() for each in outputs()]

    def formula(u, c):
        m = u + 5.0 * (c - u)
        return m * (c.std() / m.std())

    got, _ = made_by_a_step(formula(*traced(given)))
    torch.testing.assert_close(got, formula(*given))


def test_what_is_named_is_in_what_accelerate_returns():
    pipe = FreePipeline(torch.randn(4, 3, 4, 4))
    done = fused.accelerate(pipe)
    pipe(torch.randn(2, 3, 4, 4), 3, rescale=0.7)
    assert done.computed == {"std": 1}
    assert done.counts == {"fused without guidance": 3}


# ---- Writes ----


@pytest.mark.parametrize("what", ["an output", "the latents", "a scale"])
def test_what_is_written_to_before_the_step_is_refused(what):
    given = [each.float() for each in outputs()]
    x, scale = LATENTS.float(), torch.tensor([3.0, 9.0]).view(2, 1, 1, 1)
    u, c = traced(given)
    made = x + guider_utils.rescale_noise_cfg(u + scale * (c - u), c, 0.5) * scale
    {"an output": given[0], "the latents": x, "a scale": scale}[what].mul_(2.0)
    for use in (lambda: resolved(made, torch.zeros(SHAPE), None), lambda: made.abs()):
        with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
            use()


def test_in_inference_mode_a_formula_is_computed_before_others_can_write():
    with torch.inference_mode():
        given = [each.float() for each in outputs()]
        expected = rescaled(*given)
        u, c = traced([each.clone() for each in given])
        made = rescaled(u, c)
        c.mul_(3.0)
        got, guidance = resolved(made, torch.zeros(SHAPE), None)
    assert guidance is None
    assert torch.equal(got, expected)


def test_a_formula_that_was_written_to():
    given = [each.float() for each in outputs()]
    made = rescaled(*traced(given))
    made.mul_(0.5)
    got, guidance = resolved(made, torch.zeros(SHAPE), None)
    assert guidance is None
    assert torch.equal(got, 0.5 * rescaled(*given))


def test_an_output_that_is_cloned_is_traced_as_the_clone():
    """As Motif-Video's pipeline does, whose model may write its next output to the same memory."""
    given = [each.float() for each in outputs()]
    u, c = (each.clone() for each in traced([each.clone() for each in given]))
    held = [u.source.tensor, c.source.tensor]
    got, _ = made_by_a_step(rescaled(u, c))
    assert error(got, rescaled(*outputs())) <= 3e-7
    assert all(torch.equal(a, b) for a, b in zip(held, given, strict=True))
