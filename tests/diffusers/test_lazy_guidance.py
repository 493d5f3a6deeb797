"""Guidance that is deferred to the step: which expressions are, and that all others have the plain values."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import weakref

import numpy as np
import pytest
import torch

from fastguide.diffusers import guiders
from fastguide.diffusers import traced as module
from fastguide.diffusers.guidance_arguments import guidance_of
from fastguide.diffusers.halves import OfHalves
from fastguide.diffusers.joined import Joined
from fastguide.diffusers.lazy_guidance import Taken, Weights, resolved
from fastguide.diffusers.traced import Combined, Fusion
from tests.support.scheduler_pair import STEPS, diffusers, fused, pair, randn

WHOLE = randn(4, 3, 5)
UNCOND, COND = WHOLE.chunk(2)
SAMPLE = randn(2, 3, 5, seed=1)


def traced(output, fusion=None):
    """Return a model's output as ``accelerate`` has it."""
    return module.traced(output, Fusion() if fusion is None else fusion)


def two_calls(uncond=UNCOND, cond=COND):
    """Return the outputs of two calls of a model."""
    fusion = Fusion()
    return traced(uncond, fusion), traced(cond, fusion)


DEFERRED = {
    "a pipeline's": (lambda u, c: u + 7.5 * (c - u), 7.5),
    "scale last": (lambda u, c: u + (c - u) * 7.5, 7.5),
    "prediction last": (lambda u, c: 7.5 * (c - u) + u, 7.5),
    "functions": (lambda u, c: torch.add(u, torch.mul(torch.sub(c, u), 7.5)), 7.5),
    "a number of numpy's": (lambda u, c: u + np.float32(7.5) * (c - u), 7.5),
    "compiled": (torch.compile(lambda u, c: u + 7.5 * (c - u), backend="eager"), 7.5),
    "a whole number": (lambda u, c: u + 3 * (c - u), 3.0),
    "a tensor": (lambda u, c: u + torch.tensor(2.0) * (c - u), 2.0),
    "two tensors": (lambda u, c: u + torch.tensor(2.0) * (torch.tensor(3.0) * (c - u)), 6.0),
    "one a sample": (lambda u, c: u + torch.tensor([2.0, 3.0]).view(2, 1, 1) * (c - u), torch.tensor([2.0, 3.0])),
    "no scale": (lambda u, c: u + (c - u), 1.0),
    "the paper's form": (lambda u, c: c + 2.0 * (c - u), 3.0),
}


@pytest.mark.parametrize("name", DEFERRED)
def test_guidance_is_deferred(name):
    expression, scale = DEFERRED[name]
    for whole in (True, False):
        halves = traced(WHOLE).chunk(2) if whole else two_calls()
        guided = expression(*halves)
        assert type(guided) in (Combined, OfHalves)
        assert (guided.shape, guided.dtype, guided.device, len(guided)) == (
            SAMPLE.shape,
            torch.float32,
            WHOLE.device,
            2,
        )
        output, got = resolved(guided, SAMPLE, None)
        if whole:
            assert output is WHOLE
        else:
            assert len(output.predictions) == 2
        if not whole and name in ("the paper's form", "prediction last"):  # the conditional prediction comes first
            scale = 1 - scale
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(scale))
        torch.testing.assert_close(guided.clone(), expression(UNCOND, COND))


COMPUTED = {
    "half of it": lambda u, c: u + 2.0 * (c - u)[:1],
    "a scale that broadcasts": lambda u, c: torch.ones(2, 1, 1, 1) * (c - u),
    "divided by what may be anything": lambda u, c: (u + 2.0 * (c - u)) / torch.full((5,), 3.0),
    "rescaled": lambda u, c: (lambda g: 0.7 * (g * (c.std() / g.std())) + 0.3 * g)(u + 2.0 * (c - u)),
    "cast to numbers that are whole": lambda u, c: (u + 2.0 * (c - u)).to(torch.int64),
    "divided into": lambda u, c: 2.0 / u,
    "no number": lambda u, c: float("nan") * (c - u),
    "joined": lambda u, c: torch.cat([u + 2.0 * (c - u), c]),
    "written into": lambda u, c: torch.zeros(2, 3, 5).copy_(u + 2.0 * (c - u)),
    "in place": lambda u, c: (u + 2.0 * (c - u)).mul_(3.0),
    "copied": lambda u, c: copy.deepcopy(u + 2.0 * (c - u)),
    "a keyword": lambda u, c: torch.add(u, c - u, alpha=2.0),
    "numpy": lambda u, c: torch.from_numpy((u + 2.0 * (c - u)).numpy()),
    "interpolated by a tensor": lambda u, c: torch.lerp(u, c, torch.full((5,), 2.0)).abs(),
    "a function of numpy's": lambda u, c: torch.as_tensor(np.tanh(u + 2.0 * (c - u))),
    "an index": lambda u, c: torch.arange(5.0)[((u + 2.0 * (c - u)) > 9).long()],
    "assigned": lambda u, c: torch.zeros(2, 3, 5).index_put_((torch.arange(2),), u + 2.0 * (c - u)),
    "set": lambda u, c: (lambda z: z.__setitem__(slice(None), u + 2.0 * (c - u)) or z)(torch.zeros(2, 3, 5)),
    "unpacked": lambda u, c: torch.stack([*(u + 2.0 * (c - u))]),
    "gathered": lambda u, c: (u + 2.0 * (c - u))[torch.tensor([1, 0])],
    "copied by a reshape": lambda u, c: (u + 2.0 * (c - u)).transpose(1, 2).reshape(-1),
    "reflected": lambda u, c: 1.0 - 2.0 ** (u + 2.0 * (c - u)),
    "in place by an operator": lambda u, c: operator.iadd(u + 2.0 * (c - u), 1.0),
    "in a dictionary": lambda u, c: torch.func.functional_call(torch.nn.Identity(), {}, (u + 2.0 * (c - u),)).abs(),
    "attributes": lambda u, c: (u + 2.0 * (c - u)).data.T,
    "compiled": lambda u, c: torch.compile(lambda x: x.exp(), backend="eager")(u + 2.0 * (c - u)),
    "saved": lambda u, c: pickle.loads(pickle.dumps(u + 2.0 * (c - u))),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_everything_else_is_computed(name):
    expected = COMPUTED[name](UNCOND.clone(), COND.clone())
    got = COMPUTED[name](*traced(WHOLE).chunk(2))
    assert type(got) is torch.Tensor
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected) or "nan" in repr(expected)
    assert repr(got) == repr(expected)


LINEAR = {  # of three predictions: what is made of them, and the weights
    "uncond first": (lambda p, q, r: p - q, (1.0, -1.0, 0.0)),
    "twice scaled": (lambda p, q, r: p + 2.0 * (3.0 * (q - p)), (-5.0, 6.0, 0.0)),
    "two differences": (lambda p, q, r: (q - p) + (q - p), (-2.0, 2.0, 0.0)),
    "three of InstructPix2Pix": (lambda p, q, r: r + 7.5 * (p - q) + 1.5 * (q - r), (7.5, -6.0, -0.5)),
    "perturbed attention": (lambda p, q, r: p + 5.0 * (q - p) + 3.0 * (q - r), (-4.0, 8.0, -3.0)),
    "skipped layers": (lambda p, q, r: (p + 5.0 * (q - p)) + (q - r) * 2.8, (-4.0, 7.8, -2.8)),
    "negated": (lambda p, q, r: -(p + 5.0 * (q - p)), (4.0, -5.0, 0.0)),
    "a negated prediction": (lambda p, q, r: -p, (-1.0, 0.0, 0.0)),
    "divided": (lambda p, q, r: (p + q) / 4.0, (0.25, 0.25, 0.0)),
    "cast first": (lambda p, q, r: (lambda u, c: u + 5.0 * (c - u))(p.double(), q.double()), (-4.0, 5.0, 0.0)),
    "cast last": (lambda p, q, r: (p + 5.0 * (q - p)).to(torch.bfloat16), (-4.0, 5.0, 0.0)),
    "interpolated": (lambda p, q, r: torch.lerp(p, q, 5.0), (-4.0, 5.0, 0.0)),
    "stacked alone": (lambda p, q, r: torch.stack([p + 5.0 * (q - p)], dim=1).squeeze(1), (-4.0, 5.0, 0.0)),
    "multiplied by a number": (lambda p, q, r: 0.7 * (p + 5.0 * (q - p)), (0.7 * -4.0, 3.5, 0.0)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_combinations_are_taken_apart(name):
    """And their values, if they are asked for, are the pipeline's."""
    expression, weights = LINEAR[name]
    plain = [randn(2, 3, 5, seed=seed) for seed in range(3)]
    expected = expression(*plain)
    for outputs in (traced(torch.cat(plain)).chunk(3), [traced(p, f) for f in [Fusion()] for p in plain]):
        made = expression(*outputs)
        assert made.dtype == expected.dtype
        output, got = resolved(made, SAMPLE, None)
        assert isinstance(output, Taken)
        assert output.dtype == expected.dtype
        columns = guidance_of(output, SAMPLE, got, None, 1.0, "epsilon").weights(torch.device("cpu"), torch.float64)
        total, *others, _ = columns[0, 0].tolist()  # the first column is the sum of all
        for each, weight in zip(output.predictions, (total - sum(others), *others), strict=True):
            (number,) = [number for number, one in enumerate(plain) if torch.equal(each, one)]
            assert weight == pytest.approx(weights[number], abs=1e-12)
        assert total == pytest.approx(sum(weights), abs=1e-12)
        assert torch.equal(plain_of(made), expected)


def plain_of(made):
    return made.clone() if type(made) is torch.Tensor else made.computed()


def test_a_scale_for_each_sample_in_a_sum_of_three():
    scale = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    p, q, r = (randn(2, 3, 5, seed=seed) for seed in range(3))
    fusion = Fusion()
    a, b, c = (traced(each, fusion) for each in (p, q, r))
    output, weights = resolved(a + scale * (b - a) + 2.0 * (c - b), SAMPLE, None)
    assert isinstance(weights, Weights)
    guidance = guidance_of(output, SAMPLE, weights, None, 1.0, "epsilon")
    columns = guidance.weights(torch.device("cpu"), torch.float64)[0]
    assert torch.equal(columns[:, :3], torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 2.0]]).double())


VIEWS = {
    "channels": lambda x: x[:, :2],
    "split channels": lambda x: x.split(1, dim=1)[1],
    "chunked channels": lambda x: torch.chunk(x, 3, dim=1)[2],
    "unbound": lambda x: x.unbind(0)[1],
    "squeezed": lambda x: x.unsqueeze(1).squeeze(1),
    "flattened": lambda x: x.flatten(1),
    "reshaped": lambda x: x.reshape(6, 5),
    "viewed": lambda x: x.view(2, 15),
    "permuted": lambda x: x.permute(0, 2, 1).transpose(1, 2),
    "narrowed": lambda x: x.narrow(1, 1, 2),
    "all of it": lambda x: x[...],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_traced(name):
    """Of outputs before they are combined, and of what was combined."""
    view = VIEWS[name]
    expected = view(UNCOND + 2.0 * (COND - UNCOND))
    for halves in (traced(WHOLE).chunk(2), two_calls()):
        after = view(halves[0] + 2.0 * (halves[1] - halves[0]))
        u, c = (view(half) for half in halves)
        for made in (after, u + 2.0 * (c - u)):
            assert type(made) is Combined
            assert made.shape == expected.shape
            output, scale = resolved(made, randn(*expected.shape), None)
            assert scale == 2.0
            assert [each.shape for each in output.predictions] == [expected.shape] * 2
            assert torch.equal(made.computed(), expected)


@pytest.mark.parametrize("by", [lambda g, v: torch.cat([g, v], dim=1), lambda g, v: torch.cat((g, v), 1)])
def test_a_learned_variance_is_joined(by):
    """As DeepFloyd's and Kandinsky's pipelines do."""
    whole = randn(4, 6, 5)
    uncond, cond = traced(whole).chunk(2)
    u, _ = uncond.split(3, dim=1)
    c, variance = cond.split(3, dim=1)
    joined = by(u + 2.0 * (c - u), variance)
    assert type(joined) is Joined
    output, scale = resolved(joined, SAMPLE, None)
    assert scale == 2.0
    assert torch.equal(output.variance, whole[2:, 3:])
    main, rest = joined.split(3, dim=1)
    assert type(main) is Combined
    assert torch.equal(rest.computed(), whole[2:, 3:])
    u, c = (half[:, :3] for half in whole.chunk(2))
    assert torch.equal(joined.computed(), torch.cat([u + 2.0 * (c - u), whole[2:, 3:]], 1))


def test_in_inference_mode_guidance_is_deferred_until_others_have_the_output():
    """torch does not count there who writes to a tensor; so what was combined is computed before others may."""
    with torch.inference_mode():
        whole = WHOLE.clone()
        output = traced(whole)
        uncond, cond = output.chunk(2)
        guided = uncond + 2.0 * (cond - uncond)
        assert resolved(guided, SAMPLE, None)[0] is whole
        expected = UNCOND + 2.0 * (COND - UNCOND)
        output.mul_(3.0)  # and is written to
        got, scale = resolved(guided, SAMPLE, None)
        assert scale is None
        assert torch.equal(got, expected)
        assert type(uncond + 2.0 * (cond - uncond)) is torch.Tensor
        assert torch.equal(uncond + 2.0 * (cond - uncond), 3.0 * UNCOND + 2.0 * (3.0 * COND - 3.0 * UNCOND))


WRITES = {
    "clamped": lambda g: g.clamp_(-1, 1),
    "an element": lambda g: g.__setitem__((slice(None), 0), 0.0),
    "a view": lambda g: g[:1].zero_(),
    "out": lambda g: torch.mul(g, 3.0, out=g),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_guidance_stays(write):
    """This holds for writes to a part of it, before the rest is deferred, as well."""
    for expression in (
        lambda u, c, w: w(u + 2.0 * (c - u)),
        lambda u, c, w: u + 2.0 * w(c - u),
        lambda u, c, w: u + w(2.0 * (c - u)),
    ):

        def written(guided):
            WRITES[write](guided)
            return guided

        expected = expression(UNCOND.clone(), COND.clone(), written)
        got = expression(*traced(WHOLE).chunk(2), written)
        output, scale = resolved(got, SAMPLE, None)
        if scale is None:
            assert torch.equal(output, expected)
        else:  # the sum of u and what was written
            assert scale == Weights((1.0, 1.0), is_guidance=False)
            assert torch.equal(sum(output.predictions), expected)
        assert torch.equal(got.clone(), expected)


def test_predictions_written_to_before_guidance():
    whole = WHOLE.clone()
    uncond, cond = traced(whole).chunk(2)
    uncond.mul_(0.5)
    output, scale = resolved(uncond + 2.0 * (cond - uncond), SAMPLE, None)
    assert scale == 2.0
    assert torch.equal(output, torch.cat([0.5 * UNCOND, COND]))


def test_a_traced_output_may_be_made_to_require_grad():
    output = traced(WHOLE.clone())
    output.requires_grad_()
    assert output.requires_grad
    assert output.chunk(2)[1].requires_grad


def test_c_plus_plus_that_does_not_ask_torch_refuses_guidance():
    """It would be worse to be taken for a tensor."""
    uncond, cond = traced(WHOLE).chunk(2)
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor' for argument 'x'"):
        torch.jit.script(_doubled)(uncond + 2.0 * (cond - uncond))


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * x


@pytest.mark.parametrize("original", [False, True])
def test_a_compiled_step_takes_guidance(original):
    scheduler, _ = pair("DDIMScheduler")
    scheduler.set_timesteps(STEPS)
    timestep = scheduler.timesteps[3]
    uncond, cond = (traced(WHOLE) if original else WHOLE).chunk(2)
    step = torch.compile(scheduler.step, backend="eager")
    with torch.no_grad():
        got = step(uncond + 2.0 * (cond - uncond), timestep, SAMPLE).prev_sample
        expected = scheduler.step(WHOLE, timestep, SAMPLE, guidance_scale=2.0).prev_sample
    torch.testing.assert_close(got, expected)


def test_predictions_of_two_outputs_are_not_mixed():
    (uncond, _), (_, cond) = traced(WHOLE).chunk(2), traced(WHOLE + 1).chunk(2)
    assert torch.equal(cond - uncond, COND + 1 - UNCOND)
    assert type(cond - uncond) is torch.Tensor


def test_an_output_written_to_after_guidance_is_refused():
    whole = WHOLE.clone()
    uncond, cond = traced(whole).chunk(2)
    guided = uncond + 2.0 * (cond - uncond)
    uncond.mul_(2.0)
    for use in (lambda: guided + 1, lambda: resolved(guided, SAMPLE, None)):
        with pytest.raises(
            RuntimeError, match="the model's output was written to after guidance had been taken from it"
        ):
            use()


def test_a_step_takes_plain_values_of_what_it_cannot_take_apart():
    """Its output is not of the sample's shape, or has a scale besides."""
    uncond, cond = traced(WHOLE).chunk(2)
    guided = uncond + 2.0 * (cond - uncond)
    for output, sample, scale in ((guided, SAMPLE[:1], None), (guided, SAMPLE, 3.0)):
        got, same_scale = resolved(output, sample, scale)
        assert type(got) is torch.Tensor
        assert same_scale == scale
    assert type(resolved(traced(WHOLE), SAMPLE, None)[0]) is torch.Tensor


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"])
def test_guiders_fuse_into_the_step(name, rescale, original, monkeypatch):
    seen = []
    real = fused.scheduler_step.guided_step
    monkeypatch.setattr(fused.scheduler_step, "guided_step", lambda *a, **k: seen.append(a[4]) or real(*a, **k))
    x, cond, uncond = (randn(2, 3, 8, 8, seed=seed) for seed in range(3))
    config = {"guidance_scale": 4.0, "guidance_rescale": rescale, "use_original_formulation": original}
    results = []
    with torch.no_grad():
        for guider, scheduler in zip(
            (guiders.ClassifierFreeGuidance(**config), diffusers.ClassifierFreeGuidance(**config)),
            pair(name),
            strict=True,
        ):
            assert dict(guider.config)["guidance_scale"] == 4.0
            scheduler.set_timesteps(STEPS)
            guider.set_state(step=3, num_inference_steps=STEPS, timestep=scheduler.timesteps[3])
            torch.manual_seed(0)
            results.append(scheduler.step(guider.forward(cond, uncond)[0], scheduler.timesteps[3], x).prev_sample)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert [guidance.num_predictions for guidance in seen] == [2]


def test_steps_of_diffusers_and_gradients_take_a_guider_s_result():
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    guider.set_state(step=3, num_inference_steps=STEPS, timestep=3)
    x, cond, uncond = (randn(2, 3, 8, 8, seed=seed) for seed in range(3))
    plain = uncond + 3.0 * (cond - uncond)
    ours, theirs = pair("DDIMScheduler", thresholding=True, sample_max_value=0.5)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
    got = ours.step(guider.forward(cond, uncond)[0], 83, x).prev_sample
    torch.testing.assert_close(got, theirs.step(plain, 83, x).prev_sample)
    cond.requires_grad_()
    assert guider.forward(cond, uncond)[0].requires_grad


@pytest.mark.parametrize("by", ["a traced output", "a guider"])
def test_nothing_outlives_its_step(by):
    """Without Python's collector of cycles: an output is freed with the last name that a pipeline has for it."""
    scheduler, _ = pair("DDIMScheduler")
    scheduler.set_timesteps(STEPS)
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    guider.set_state(step=3, num_inference_steps=STEPS, timestep=3)
    x, outputs = randn(2, 3, 8, 8), []
    gc.collect()
    gc.disable()
    try:
        for timestep in scheduler.timesteps:
            output = randn(4, 3, 8, 8)
            outputs.append(weakref.ref(output))
            uncond, cond = (output if by == "a guider" else traced(output)).chunk(2)
            guided = guider.forward(cond, uncond)[0] if by == "a guider" else uncond + 3.0 * (cond - uncond)
            assert type(guided) in (Combined, OfHalves)
            x = scheduler.step(guided, timestep, x).prev_sample
            del output, uncond, cond, guided
            assert sum(alive() is not None for alive in outputs) == 0
    finally:
        gc.enable()
