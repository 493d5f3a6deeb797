"""Guiders beside diffusers' own of the same name: results, in the step of a scheduler and by themselves, and state."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch

import fastguide.diffusers as fused
from fastguide.diffusers import guiders
from fastguide.diffusers.lazy_guidance import resolved
from tests.support.pyramids import pyramid, up
from tests.support.scheduler_pair import diffusers

STEPS = 10
SKIPPED = {"skip_layer_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
PERTURBED = {
    "perturbed_guidance_layers": [0], "perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0,
}  # fmt: skip
BLURRED = {"seg_guidance_layers": [0], "seg_guidance_start": 0.0, "seg_guidance_stop": 1.0}
CASES = {  # the class, its options, how many predictions it takes, and how far diffusers' float32 may be off
    "classifier-free": ("ClassifierFreeGuidance", {}, 2, 1e-5),
    "zero star": ("ClassifierFreeZeroStarGuidance", {"zero_init_steps": 1}, 2, 1e-5),
    "projected": ("AdaptiveProjectedGuidance", {"eta": 0.3, "adaptive_projected_guidance_rescale": 4.0}, 2, 1e-5),
    "projected, of any length": ("AdaptiveProjectedGuidance", {"adaptive_projected_guidance_rescale": 0.0}, 2, 1e-5),
    "projected and plain": (
        "AdaptiveProjectedMixGuidance",
        {"eta": 0.3, "adaptive_projected_guidance_momentum": None},
        2,
        1e-5,
    ),
    "projected, after plain steps": (
        "AdaptiveProjectedMixGuidance",
        {"adaptive_projected_guidance_start_step": 1, "adaptive_projected_guidance_rescale": 4.0},
        2,
        1e-5,
    ),
    "tangential": ("TangentialClassifierFreeGuidance", {}, 2, 1e-3),  # by a decomposition in float32
    "magnitude": ("MagnitudeAwareGuidance", {"alpha": 2.0}, 2, 1e-5),
    "perturbed": ("PerturbedAttentionGuidance", PERTURBED, 3, 1e-5),
    "skipped": ("SkipLayerGuidance", SKIPPED, 3, 1e-5),
    "blurred": ("SmoothedEnergyGuidance", BLURRED, 3, 1e-5),
    "weaker model": ("AutoGuidance", {"auto_guidance_layers": [0], "dropout": 0.1}, 2, 1e-5),
}


def both(kind, **options):
    """Ours and diffusers' guider, in the middle of a loop."""
    if not hasattr(diffusers.guiders, kind):
        pytest.skip(f"this diffusers has no {kind}")
    pair = [getattr(package, kind)(**options) for package in (guiders, diffusers.guiders)]
    for guider in pair:
        guider.set_state(step=5, num_inference_steps=STEPS, timestep=torch.tensor(500))
    return pair


def outputs(count, shape=(2, 16, 24), dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    first = torch.randn(shape, generator=generator, dtype=torch.float64)
    made = [
        (first + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(count)
    ]
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, made


@pytest.fixture
def seen(monkeypatch):
    """The guidances of the steps that are made."""
    found = []
    for module in (fused.scheduler_step, fused.counted_run):
        real = module.guided_step
        monkeypatch.setattr(module, "guided_step", lambda *a, real=real, **k: found.append(a[4]) or real(*a, **k))
    return found


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_step_makes_the_guider_s_result(name, original, rescale, scheduler, seen):
    kind, options, count, tolerance = CASES[name]
    pair = both(kind, guidance_scale=4.0, guidance_rescale=rescale, use_original_formulation=original, **options)
    x, given = outputs(count)
    results = []
    for guider, package in zip(pair, (fused, diffusers), strict=True):
        made = getattr(package, scheduler)()
        made.set_timesteps(STEPS)
        if hasattr(made, "_step_index"):
            made._step_index = 5
        output = guider.forward(*given)
        assert torch.equal(torch.as_tensor(output.pred_cond.clone()), given[0])
        results.append(made.step(output.pred, made.timesteps[5], x, return_dict=False)[0])
    assert (results[0] - results[1]).norm() <= tolerance * results[1].norm()
    assert seen[0].num_predictions == count


@pytest.mark.parametrize("name", CASES)
def test_other_uses_compute_what_diffusers_computes(name):
    kind, options, count, _ = CASES[name]
    ours, theirs = both(kind, guidance_scale=4.0, guidance_rescale=0.6, **options)
    _, given = outputs(count, dtype=torch.float64)
    got, expected = ours.forward(*given).pred, theirs.forward(*given).pred
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert torch.equal(got + 0, expected)
    assert torch.equal(got.abs(), expected.abs())


@pytest.mark.parametrize("name", CASES)
def test_they_have_diffusers_configuration_and_state(name):
    kind, options, count, _ = CASES[name]
    ours, theirs = both(kind, guidance_scale=4.0, **options)
    assert dict(ours.config) == dict(theirs.config)
    assert ours.state_dict() == theirs.state_dict() if hasattr(theirs, "state_dict") else True
    assert ours.num_conditions == theirs.num_conditions == count
    assert isinstance(ours, getattr(diffusers.guiders, kind))
    assert type(pickle.loads(pickle.dumps(ours))) is type(ours)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outside_of_its_interval_a_guider_returns_the_conditional_prediction(name):
    kind, options, count, _ = CASES[name]
    options = {key: 0.0 if key.endswith("_stop") else value for key, value in options.items()}
    ours, theirs = both(kind, guidance_scale=4.0, start=0.0, stop=0.3, **options)
    _, given = outputs(count)
    assert torch.equal(ours.forward(given[0]).pred + 0, theirs.forward(given[0]).pred)


@torch.no_grad()
def test_the_first_steps_of_zero_star_are_zero_with_rescaling_too():
    ours, theirs = both("ClassifierFreeZeroStarGuidance", guidance_scale=4.0, guidance_rescale=0.6, zero_init_steps=7)
    _, given = outputs(2)
    assert bool(theirs.forward(*given).pred.isnan().all())
    assert not bool(ours.forward(*given).pred.any())


@torch.no_grad()
def test_the_tangential_guider_says_whose_batch_it_is():
    ours, theirs = both("TangentialClassifierFreeGuidance", guidance_scale=4.0)
    with pytest.raises(AttributeError):
        _ = theirs.is_conditional
    assert not ours.is_conditional
    ours.prepare_models(torch.nn.Identity())
    ours._count_prepared = 1
    assert ours.is_conditional


@torch.no_grad()
def test_the_magnitude_s_guider_takes_images():
    ours, theirs = both("MagnitudeAwareGuidance", guidance_scale=4.0, alpha=2.0, guidance_rescale=0.5)
    _, given = outputs(2, (2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        theirs.forward(*given)
    packed = theirs.forward(*[each.flatten(1)[:, None] for each in given]).pred.view(2, 3, 8, 8)
    torch.testing.assert_close(ours.forward(*given).pred + 0, packed)


def test_the_smoothed_energy_s_guider_counts_its_model_s_calls(monkeypatch):
    """So that the third call is blurred."""
    from diffusers.guiders import smoothed_energy_guidance as module

    applied = []
    monkeypatch.setattr(module, "_apply_smoothed_energy_guidance_hook", lambda *a, **k: applied.append(a))
    for guider, expected in zip(both("SmoothedEnergyGuidance", **BLURRED), ([0, 0, 1], [0, 0, 0]), strict=True):
        applied.clear()
        counts = []
        for _ in range(3):
            guider.prepare_models(torch.nn.Identity())
            counts.append(len(applied))
        assert counts == expected


@pytest.mark.parametrize("kind", ["AdaptiveProjectedGuidance", "AdaptiveProjectedMixGuidance"])
@torch.no_grad()
def test_momentum_is_diffusers(kind, seen):
    """In the step, and by itself to the bit; the second kind adds it up in its plain steps as well."""
    options = {"adaptive_projected_guidance_start_step": 1} if kind.endswith("MixGuidance") else {}
    ours, theirs = both(kind, guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5, **options)
    schedulers = [package.DDIMScheduler(clip_sample=False) for package in (fused, diffusers)]
    for step in range(4):
        x, given = outputs(2 + step)
        results = []
        for guider, scheduler in zip((ours, theirs), schedulers, strict=True):
            scheduler.set_timesteps(STEPS)
            guider.set_state(step=step, num_inference_steps=STEPS, timestep=scheduler.timesteps[step])
            guider.prepare_inputs({"x": (torch.zeros(1), torch.zeros(1))})
            pred = guider.forward(*given[:2]).pred
            results.append((scheduler.step(pred, scheduler.timesteps[step], x)[0], pred + 0))
        (got, own), (expected, their_own) = results
        assert (got - expected).norm() <= 2e-6 * expected.norm()
        assert torch.equal(torch.as_tensor(own.clone()), their_own)
        average = ours.momentum_buffer.running_average
        assert type(average) is torch.Tensor
        assert torch.equal(average, theirs.momentum_buffer.running_average)
    projected = [guidance for guidance in seen if guidance.weights_from is not None]
    assert len(projected) >= 2  # what is repeated is not seen
    assert projected[-1].num_predictions == 3  # with the momentum


LTX2 = {  # scales, and how many predictions there are
    "plain": ({"guidance_scale": 3.0}, 2),
    "perturbed": ({"guidance_scale": 3.0, "stg_scale": 1.0}, 3),
    "only perturbed": ({"stg_scale": 1.0}, 2),
    "all": ({"guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 2.5}, 4),
}


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", LTX2)
@torch.no_grad()
def test_the_guider_of_ltx_2(name, rescale, seen):
    """In x_0, to which the predictions are converted before, and from which its result is after."""
    scales, count = LTX2[name]
    x, given = outputs(4)
    ours, theirs = both("LTX2Guidance", **scales, guidance_rescale=rescale)
    assert ours.active_predictions() == theirs.active_predictions()
    assert ours.num_conditions == count
    results = []
    for guider, package in ((ours, fused), (theirs, diffusers)):
        scheduler = package.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(STEPS)
        scheduler._step_index = 5
        sigma = scheduler.sigmas[5]
        places = {"pred_cond": 0, "pred_uncond": 1, "pred_cond_stg": 2, "pred_cond_modality": 3}
        predictions = {key: x - given[places[key]] * sigma for key in guider.active_predictions()}
        velocity = (x - guider.forward(**predictions).pred) / sigma
        results.append(scheduler.step(velocity, scheduler.timesteps[5], x, return_dict=False)[0])
    assert (results[0] - results[1]).norm() <= 1e-5 * results[1].norm()
    # with the sample, four predictions are more terms than the kernels take moments of
    assert seen[0].num_predictions == (3 if rescale and count == 4 else count + 1)


@pytest.mark.parametrize("kind", ["AdaptiveProjectedGuidance", "TangentialClassifierFreeGuidance"])
@torch.no_grad()
def test_an_output_that_is_written_to_is_refused(kind):
    ours, _ = both(kind, guidance_scale=4.0)
    x, given = outputs(2)
    pred = ours.forward(*given).pred
    given[1].mul_(2)
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
        scheduler.step(pred, scheduler.timesteps[5], x)
    with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
        pred.abs()


def test_what_torch_does_not_count_or_differentiates_is_computed_at_once():
    ours, theirs = both("AdaptiveProjectedGuidance", guidance_scale=4.0)
    _, given = outputs(2)
    given[0].requires_grad_()
    assert ours.forward(*given).pred.requires_grad
    with torch.inference_mode():
        _, given = outputs(2)
        assert torch.equal(ours.forward(*given).pred, theirs.forward(*given).pred)


@pytest.mark.parametrize("kind", ["ClassifierFreeGuidance", "TangentialClassifierFreeGuidance"])
@torch.no_grad()
def test_the_same_numbers_are_the_same_guidance(kind):
    """Which steps are repeated with; other numbers are another one, and so is another guider's, of another pipeline."""
    ours, _ = both(kind, guidance_scale=4.0, guidance_rescale=0.5)
    x, given = outputs(2)

    def guidance_of(guider):
        return resolved(guider.forward(*given).pred, x, None)[1]

    first, again = guidance_of(ours), guidance_of(ours)
    ours.guidance_scale = 5.0
    assert first is again
    assert guidance_of(ours) is not first
    other, _ = both(kind, guidance_scale=4.0, guidance_rescale=0.5)
    assert guidance_of(other) is not first
    alive = weakref.ref(other)
    del other
    gc.collect()
    assert alive() is None


# ---- Frequency-decoupled guidance, with pyramids in the place of kornia's ----

DECOUPLED = {  # options, and the scales that they mean
    "two levels": ({"guidance_scales": [6.0, 2.0]}, None),
    "three levels": ({"guidance_scales": [6.0, 3.0, 2.0]}, None),
    "rescaled": ({"guidance_scales": [6.0, 2.0], "guidance_rescale": 0.7}, None),
    "from the conditional": ({"guidance_scales": [6.0, 2.0], "use_original_formulation": True}, None),
    "a level that is over": ({"guidance_scales": [6.0, 2.0], "stop": [1.0, 0.3]}, [6.0, 1.0]),
    "a level that is not yet": ({"guidance_scales": [6.0, 2.0], "start": [0.8, 0.0]}, [1.0, 2.0]),
    "of what is parallel": ({"guidance_scales": [6.0, 2.0], "parallel_weights": 0.5}, "diffusers"),
    "rescaled by level": (
        {"guidance_scales": [6.0, 2.0], "guidance_rescale": 0.7, "guidance_rescale_space": "freq"}, "diffusers",
    ),
}  # fmt: skip


@pytest.fixture
def pyramids(monkeypatch):
    if not hasattr(diffusers.guiders, "FrequencyDecoupledGuidance"):
        pytest.skip("this diffusers has no FrequencyDecoupledGuidance")
    from diffusers.guiders import frequency_decoupled_guidance as module

    monkeypatch.setattr(module, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(module, "build_laplacian_pyramid_func", pyramid)
    monkeypatch.setattr(module, "upsample_and_blur_func", lambda x: up(x, tuple(2 * size for size in x.shape[-2:])))


@pytest.mark.parametrize("name", DECOUPLED)
@torch.no_grad()
def test_frequency_decoupled_guidance(name, pyramids, seen):
    options, meant = DECOUPLED[name]
    ours, theirs = both("FrequencyDecoupledGuidance", **options)
    assert dict(ours.config) == dict(theirs.config)
    x, (uncond, cond) = outputs(2, (2, 3, 16, 32))
    results = []
    if isinstance(meant, list):  # where diffusers raises an error, or takes another level's frequencies
        levels = [a + scale * (b - a) for a, b, scale in zip(pyramid(uncond, 2), pyramid(cond, 2), meant, strict=True)]
        expected = levels[0] + up(levels[1], (16, 32))
    else:
        expected = theirs.forward(cond, uncond).pred
    for pred, package in ((ours.forward(cond, uncond).pred, fused), (expected, diffusers)):
        scheduler = package.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(STEPS)
        results.append(scheduler.step(pred, scheduler.timesteps[5], x, return_dict=False)[0])
    assert (results[0] - results[1]).norm() <= 1e-5 * results[1].norm()
    assert (seen[0] is None) == (meant == "diffusers")
    again = ours.forward(cond, uncond).pred + 0
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_frequency_decoupled_guidance_of_any_size(pyramids):
    """kornia makes both sides powers of two, if neither is one, and diffusers returns that size."""
    ours, _ = both("FrequencyDecoupledGuidance", guidance_scales=[6.0, 2.0])
    _, (uncond, cond) = outputs(2, (2, 3, 11, 14))
    assert ours.forward(cond, uncond).pred.shape == cond.shape
    ours.set_state(step=9, num_inference_steps=STEPS, timestep=torch.tensor(100))
    ours.disable()
    assert ours.forward(cond, None).pred is cond
