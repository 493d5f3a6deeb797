"""What the drop-in schedulers leave to diffusers, and what they refuse, with messages that name the argument."""

from __future__ import annotations

import pytest
import torch

from fastguide.diffusers.traced import Fusion, traced
from tests.support.scheduler_pair import SHAPE, STEPS, assert_close, fused, model, pair, randn

unet_2d = pytest.importorskip("diffusers.models.unets.unet_2d")

X = randn(*SHAPE)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_configuration_that_rows_do_not_express(name):
    """A threshold that may be below 1."""
    ours, theirs = pair(name, thresholding=True, sample_max_value=0.5)
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    x, output = 3 * randn(*SHAPE), randn(4, *SHAPE[1:], seed=1)
    uncond, cond = output.chunk(2)
    t = ours.timesteps[3]
    torch.manual_seed(0)
    got = ours.step(output, t, x, guidance_scale=torch.tensor([2.0, 4.0]))
    torch.manual_seed(0)
    expected = theirs.step(uncond + torch.tensor([2.0, 4.0])[:, None, None, None] * (cond - uncond), t, x)
    for ours_, theirs_ in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        assert_close(ours_, theirs_)
    with pytest.raises(ValueError, match="gradient: expected None for a step that is left to diffusers"):
        ours.step(uncond, t, x, gradient=x)


@pytest.mark.parametrize("learned", [False, True])
def test_guidance_of_twice_the_channels_for_diffusers_own_step(learned):
    """The output requires grad, and the variance is the conditional half's; channels may be even without one."""
    for channels in (3, 4):
        variance = {"variance_type": "learned_range"} if learned else {}
        ours, theirs = pair("DDPMScheduler", **variance)
        results = []
        x = randn(2, channels, 8, 8)
        wide = 2 * channels if learned else channels
        output = randn(4, wide, 8, 8, seed=1).requires_grad_()
        uncond, cond = output.chunk(2)
        guided = uncond + 3.0 * (cond - uncond)
        if learned:
            guided = torch.cat([guided[:, :channels], cond[:, channels:]], 1)
        for scheduler, given in ((ours, (output, 3.0)), (theirs, (guided, None))):
            scheduler.set_timesteps(STEPS)
            torch.manual_seed(0)
            more = {} if given[1] is None else {"guidance_scale": given[1]}
            results.append(scheduler.step(given[0], 83, x, **more).prev_sample)
        assert results[0].requires_grad
        assert_close(*(r.detach() for r in results))


def test_gradients_flow_as_in_diffusers():
    ours, theirs = pair("DDIMScheduler")
    gradients = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        x = randn(*SHAPE).requires_grad_()
        scheduler.step(model(x, 3), scheduler.timesteps[3], x).prev_sample.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_shapes_that_broadcast():
    ours, theirs = pair("DDIMScheduler")
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    got, expected = (
        s.step(randn(1, 3, 8, 8, seed=1), s.timesteps[3], randn(3, 3, 8, 8)).prev_sample for s in (ours, theirs)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler"])
def test_a_step_that_is_left_is_named_as_what_computed_guidance(name):
    scheduler, _ = pair(name, thresholding=True, sample_max_value=0.5)
    scheduler.set_timesteps(4)
    fusion = Fusion()
    fusion.tries = True
    uncond, cond = (traced(randn(*SHAPE, seed=seed), fusion) for seed in (1, 2))
    scheduler.step(uncond + 3.0 * (cond - uncond), scheduler.timesteps[0], X)
    assert fusion.computed == {"a step that is left to diffusers": 1}


def both_refuse(name, *arguments, steps=STEPS, config=None, **keywords):
    kinds = []
    for scheduler in pair(name, **(config or {})):
        if steps:
            scheduler.set_timesteps(steps)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            scheduler.step(*arguments, **keywords)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


@pytest.mark.parametrize(
    ("name", "arguments", "keywords"),
    [
        ("DDIMScheduler", (X, 10, X), {"steps": None}),
        ("DDIMScheduler", (X, 1000, X), {}),
        ("DDIMScheduler", (X, 10, X), {"eta": 1.0, "generator": torch.Generator(), "variance_noise": X}),
        ("DDIMScheduler", (X, 10, X), {"config": {"prediction_type": "score"}}),
        ("DDIMScheduler", (randn(2, 5, 8, 8), 10, X), {}),
        ("DDPMScheduler", (X, 10, X), {}),
        ("DDPMScheduler", (X, 996, X), {"config": {"variance_type": "learned_range"}}),
        ("DDPMScheduler", (X, 913, X), {"config": {"variance_type": "learned_range"}}),
        ("DDPMScheduler", (X, 913, X), {"config": {"prediction_type": "score"}}),
        ("DDPMScheduler", (randn(2, 6, 8, 8), 913, X), {}),
    ],
)
def test_what_diffusers_refuses_is_refused_alike(name, arguments, keywords):
    both_refuse(name, *arguments, **keywords)


def test_guidance_and_the_output_s_batch_have_to_agree():
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    doubled = randn(4, *SHAPE[1:])
    with pytest.raises(
        ValueError,
        match=r"model_output: expected the sample's batch, or guidance_scale=.*\(4, 3, 8, 8\) and \(2, 3, 8, 8\)",
    ):
        scheduler.step(doubled, 83, X)
    with pytest.raises(
        ValueError, match=r"model_output: expected twice the sample's batch .*\(2, 3, 8, 8\) and \(2, 3, 8, 8\)"
    ):
        scheduler.step(X, 83, X, guidance_scale=2.0)
    ddpm = fused.DDPMScheduler()
    ddpm.set_timesteps(STEPS)
    with pytest.raises(IndexError, match=r"timestep: expected one of the 12 that are set, 913, 830 .. 0, got 10"):
        ddpm.step(X, 10, X)
    with pytest.raises(TypeError, match="timestep: expected int64"):
        scheduler.step(X, torch.tensor(83.0), X)


WIDE = randn(4, *SHAPE[1:])
BAD = {
    "a model's whole output": (
        lambda s: s.step(unet_2d.UNet2DOutput(sample=X), 83, X),
        "model_output: expected a tensor, got UNet2DOutput; its .sample is one",
    ),
    "a tuple": (lambda s: s.step((X, X), 83, X), r"model_output: expected a tensor, got tuple; its \[0\] is one"),
    "no output": (lambda s: s.step(None, 83, X), "model_output: expected a tensor, got NoneType"),
    "no sample": (lambda s: s.step(X, 83, None), "sample: expected a tensor, got NoneType"),
    "a real timestep": (lambda s: s.step(X, 83.0, X), "timestep: expected an int or an int64 tensor, got 83.0"),
    "no timestep": (lambda s: s.step(X, None, X), "timestep: expected an int or an int64 tensor, got None"),
    "timesteps of others": (
        lambda s: s.step(X, torch.tensor([83, 0, 83]), X), r"timestep: expected shape \(\) or \(2,\), got \(3,\)",
    ),
    "a timestep of none": (lambda s: s.step(X, torch.tensor([83, 5000]), X), "timestep: expected 0 to 999, got 5000"),
    "a gradient by name": (lambda s: s.step(X, 83, X, gradient="g"), "gradient: expected a tensor .*, got str"),
    "one sample's gradient": (
        lambda s: s.step(X, 83, X, gradient=X[:1]), r"gradient: expected .*, the sample's shape, got \(1, 3",
    ),
    "a gradient's scale": (
        lambda s: s.step(X, 83, X, gradient=X, gradient_scale="2"), "gradient_scale: expected a number",
    ),
    "a scale of no gradient": (lambda s: s.step(X, 83, X, gradient_scale=2.0), "gradient_scale, .*: expected gr"),
    "a form": (lambda s: s.step(X, 83, X, gradient=X, gradient_form="foo"), "gradient_form: expected one of .*'foo'"),
    "a scale of no kind": (lambda s: s.step(WIDE, 83, X, guidance_scale={}), "guidance_scale: expected a number"),
    "scales of steps": (
        lambda s: s.step(WIDE, 83, X, guidance_scale=torch.ones(50, 1)),
        r"guidance_scale: expected a number, shape \(2,\) or \(2, 1, ...\), got \(50, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_messages_name_the_argument(case):
    call, message = BAD[case]
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call(scheduler)


def test_what_diffusers_accepts_is_accepted():
    ours, theirs = pair("DDIMScheduler")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(-1)
        scheduler.set_timesteps(2.5)
        scheduler.set_timesteps(STEPS)
    t = ours.timesteps[3]
    for arguments in ((X, t.reshape(1), X), (X, t.numpy(), X), (X[0, 0, 0, 0], t, X[0, 0, 0, 0])):
        assert_close(*(s.step(*arguments).prev_sample for s in (ours, theirs)))
    one_a_sample = torch.tensor([2.0, 4.0])
    got, expected = (ours.step(WIDE, t, X, guidance_scale=s) for s in (one_a_sample[:, None, None, None], one_a_sample))
    assert torch.equal(got.prev_sample, expected.prev_sample)


def test_transforms_and_forward_mode_are_left_to_diffusers():
    ours, theirs = pair("DDIMScheduler", clip_sample=False)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (output,)),
        lambda f: (torch.func.grad(lambda v: f(v).square().sum())(x),),
        lambda f: (torch.vmap(f)(torch.stack([x, output])),),
    ):
        results = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(STEPS)
            results.append(transform(lambda v, s=scheduler: s.step(output, 83, v).prev_sample))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


def test_a_variance_type_that_is_not_the_configuration_s_is_left_to_diffusers():
    ours, theirs = pair("DDPMScheduler")
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        scheduler.register_to_config(variance_type="fixed_large")
        torch.manual_seed(0)
        results.append(scheduler.step(randn(*SHAPE), 830, randn(*SHAPE, seed=1)).prev_sample)
    assert torch.equal(*results)
