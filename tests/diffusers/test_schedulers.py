"""The drop-in schedulers make diffusers' pictures with diffusers' noise, and take guidance into the step."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import fastguide
from fastguide.diffusers.tables import current_tables, table_of
from tests.support.scheduler_pair import NAMES, SHAPE, STEPS, assert_close, diffusers, fused, loop, model, pair, randn

DDIM = [{"eta": eta, "use_clipped_model_output": clipped} for eta in (0.0, 0.5, 1.0) for clipped in (False, True)]
DDPM = ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]
CONFIGS = {
    "leading": {},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "offset": {"steps_offset": 1, "clip_sample": False},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.7},
    "scaled linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    "few training steps": {"num_train_timesteps": 37},
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"])
def test_pictures_and_generators_are_diffusers(name, config, prediction_type):
    kinds = [({}, options) for options in DDIM] if "DDIM" in name else [({"variance_type": v}, {}) for v in DDPM]
    for others, options in kinds:
        learned = others.get("variance_type") == "learned_range"
        schedulers = pair(name, prediction_type=prediction_type, **CONFIGS[config], **others)
        results, states = [], []
        for scheduler in schedulers:
            scheduler.set_timesteps(STEPS)
            generator = torch.Generator().manual_seed(5)
            results.append(loop(scheduler, randn(*SHAPE), learned=learned, generator=generator, **options))
            states.append(generator.get_state())
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs)
        assert torch.equal(*states)


def test_custom_timesteps_and_all_timesteps():
    for timesteps in ([900, 401, 400, 7], [3], None):
        ours, theirs = pair("DDPMScheduler", num_train_timesteps=1000 if timesteps else 50)
        if timesteps:
            ours.set_timesteps(timesteps=timesteps)
            theirs.set_timesteps(timesteps=timesteps)
        (got, _), (expected, _) = (
            loop(s, randn(*SHAPE), generator=torch.Generator().manual_seed(1)) for s in (ours, theirs)
        )
        assert_close(got, expected)


def test_zero_signal_is_as_diffusers_has_it():
    for prediction_type in ("epsilon", "v_prediction"):
        for name in ("DDIMScheduler", "DDPMScheduler"):
            config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
            results = []
            for scheduler in pair(name, prediction_type=prediction_type, **config):
                scheduler.set_timesteps(STEPS)
                results.append(loop(scheduler, randn(*SHAPE), generator=torch.Generator().manual_seed(1))[0])
            assert torch.equal(results[0].isfinite(), results[1].isfinite())  # infinite, then: 0 * inf or not
            if prediction_type == "v_prediction":
                assert_close(*results)


def test_inversion():
    for config in ({}, {"clip_sample": False, "timestep_spacing": "trailing"}, {"set_alpha_to_one": False}):
        for prediction_type in ("epsilon", "v_prediction"):
            results = []
            for scheduler in pair("DDIMInverseScheduler", prediction_type=prediction_type, **config):
                scheduler.set_timesteps(STEPS)
                x = randn(*SHAPE)
                for t in scheduler.timesteps:
                    x = scheduler.step(model(x, t), t, x).prev_sample
                results.append(x)
            assert_close(*results)


def test_ddim_and_its_inversion_undo_each_other():
    forward, back = fused.DDIMScheduler(clip_sample=False), fused.DDIMInverseScheduler(clip_sample=False)
    forward.set_timesteps(100)
    back.set_timesteps(100)
    x = image = randn(*SHAPE)
    for t in back.timesteps:
        x = back.step(0.1 * x, t, x).prev_sample
    for t in forward.timesteps:
        x = forward.step(0.1 * x, t, x).prev_sample
    assert (x - image).norm() < 0.05 * image.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearer_to_float64_than_diffusers_in_16_bits(dtype):
    """Everything is in 16 bits, as in a pipeline of that dtype; the truth is diffusers' own step in float64."""
    results = []
    schedulers = (*pair("DDIMScheduler"), diffusers.DDIMScheduler())
    for scheduler, kind in zip(schedulers, (dtype, dtype, torch.float64), strict=True):
        scheduler.set_timesteps(STEPS)
        sample, output, noise = (randn(*SHAPE, seed=seed, dtype=dtype).to(kind) for seed in range(3))
        steps = [
            scheduler.step(output, t, sample, eta=1.0, variance_noise=noise).prev_sample.double()
            for t in scheduler.timesteps
        ]
        results.append(torch.stack(steps))
    ours, theirs, truth = results
    assert (ours - truth).norm() < 0.65 * (theirs - truth).norm()  # one rounding is left, of the result


# ---- Guidance ----


@pytest.mark.parametrize("name", NAMES)
def test_guidance_scale_combines_the_doubled_output(name):
    ours, theirs = pair(name)
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    x, output = randn(*SHAPE), randn(4, *SHAPE[1:], seed=1)
    uncond, cond = output.chunk(2)
    t = ours.timesteps[4]
    torch.manual_seed(3)
    got = ours.step(output, t, x, guidance_scale=7.5).prev_sample
    torch.manual_seed(3)
    expected = theirs.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
    assert_close(got, expected)


def test_a_scale_and_a_timestep_of_each_sample():
    for name in ("DDIMScheduler", "DDPMScheduler"):
        ours = getattr(fused, name)(clip_sample=False)
        ours.set_timesteps(STEPS)
        x, output = randn(*SHAPE), randn(4, *SHAPE[1:], seed=1)
        for t in (ours.timesteps[[3, 7]], ours.timesteps[3]):
            torch.manual_seed(0)
            got = ours.step(output, t, x, guidance_scale=torch.tensor([2.0, 5.0])).prev_sample
            torch.manual_seed(0)
            noise = torch.randn(SHAPE)
            for b, scale in enumerate((2.0, 5.0)):
                one = getattr(fused, name)(clip_sample=False)
                one.set_timesteps(STEPS)
                alone = one.step(output[b::2], int(t[b] if t.dim() else t), x[b : b + 1], guidance_scale=scale)
                if name == "DDIMScheduler":
                    torch.testing.assert_close(got[b : b + 1], alone.prev_sample, rtol=1e-6, atol=1e-6)
                else:
                    table = table_of(one, current_tables(one), x.device, ())
                    mean = fastguide.guided_step(
                        table, int(t[b] if t.dim() else t), x[b : b + 1], list(output[b::2].split(1)),
                        fastguide.ClassifierFree(scale), noise=noise[b : b + 1],
                    )  # fmt: skip
                    torch.testing.assert_close(got[b : b + 1], mean, rtol=1e-6, atol=1e-6)


def test_learned_variance_with_guidance_is_the_conditional_s():
    ours, theirs = pair("DDPMScheduler", variance_type="learned_range")
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    x, output = randn(*SHAPE), randn(4, 6, 8, 8, seed=1).clamp(-1, 1)
    (uncond, _), (cond, variance) = (half.chunk(2, 1) for half in output.chunk(2))
    t = ours.timesteps[4]
    torch.manual_seed(3)
    got = ours.step(output, t, x, guidance_scale=3.0).prev_sample
    torch.manual_seed(3)
    expected = theirs.step(torch.cat([uncond + 3.0 * (cond - uncond), variance], 1), t, x).prev_sample
    assert_close(got, expected)
    ddim, _ = pair("DDIMScheduler")  # has no use for the variance
    ddim.set_timesteps(STEPS)
    without = torch.cat([uncond, cond])
    assert torch.equal(ddim.step(output, t, x, guidance_scale=3.0)[0], ddim.step(without, t, x, guidance_scale=3.0)[0])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_variance_without_use_is_left_out_of_guided_steps(name):
    """The output has twice the channels, as DiT's, and the scheduler's variance is fixed."""
    results = []
    for width in (6, 3):
        scheduler = getattr(fused, name)()
        scheduler.set_timesteps(STEPS)
        output = randn(4, 6, 8, 8, seed=1)[:, :width]
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, 83, randn(*SHAPE), generator=generator, guidance_scale=3.0).prev_sample)
    assert torch.equal(*results)


def test_weights_made_of_a_fake_mode_s_scale_are_real():
    """Weights of numbers are made once for all steps, so also for those outside of the mode."""
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert (
            type(scheduler.step(torch.ones(4, 3, 8, 8), 83, torch.ones(SHAPE), guidance_scale=1.2345)[0]) is FakeTensor
        )
    step = randn(4, *SHAPE[1:]), 83, randn(*SHAPE, seed=1)
    got, expected = (scheduler.step(*step, guidance_scale=scale)[0] for scale in (1.2345, [1.2345, 1.2345]))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("form", ["epsilon", "epsilon_after_clip", "mean"])
@pytest.mark.parametrize("doubled", [False, True])
def test_a_classifier_s_gradient(form, doubled):
    scheduler = fused.DDPMScheduler(clip_sample=True)
    scheduler.set_timesteps(20)
    x, gradient = randn(*SHAPE), randn(*SHAPE, seed=2)
    output = randn(4 if doubled else 2, *SHAPE[1:], seed=1)
    guidance = fastguide.Classifier(None, 1.5, form)
    guidance = fastguide.ClassifierFree(4.0) + guidance if doubled else guidance
    table = fastguide.ddpm(fastguide.NoiseSchedule.linear(), 20, clip_sample_range=1.0)
    step = {"gradient": gradient, "gradient_scale": 1.5, "gradient_form": form}
    got = scheduler.step(
        output, 500, x, torch.Generator().manual_seed(1), guidance_scale=4.0 if doubled else None, **step
    )
    expected = fastguide.guided_step(
        table, table.index(500), x, output, guidance, gradient=gradient, generator=torch.Generator().manual_seed(1)
    )
    assert_close(got.prev_sample, expected, 1e-4)  # of rows in float32 and in float64


# ---- Noise ----


def test_a_generator_for_each_sample_and_the_global_one():
    for name, options in (("DDIMScheduler", {"eta": 1.0}), ("DDPMScheduler", {})):
        results = []
        for scheduler in pair(name):
            scheduler.set_timesteps(STEPS)
            generators = [torch.Generator().manual_seed(i) for i in range(2)]
            several = loop(scheduler, randn(*SHAPE), generator=generators, **options)[0]
            one = loop(scheduler, randn(*SHAPE), generator=[torch.Generator().manual_seed(9)], **options)[0]
            torch.manual_seed(4)
            results.append((several, one, loop(scheduler, randn(*SHAPE), **options)[0], torch.rand(1)))
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs)


def test_noise_is_of_the_model_output_s_dtype():
    for name, options in (("DDIMScheduler", {"eta": 1.0}), ("DDPMScheduler", {})):
        results = []
        for scheduler in pair(name):
            scheduler.set_timesteps(STEPS)
            generator = torch.Generator().manual_seed(1)
            x = randn(*SHAPE)
            results.append(loop(scheduler, x, dtype=torch.bfloat16, generator=generator, **options)[0])
        assert_close(*results, tolerance=2e-2)  # bfloat16's predictions
        assert results[0].dtype == torch.float32


def test_variance_noise_is_used_as_it_is():
    ours, theirs = pair("DDIMScheduler")
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    x, output, noise = randn(*SHAPE), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    t = ours.timesteps[3]
    got, expected = (s.step(output, t, x, eta=0.7, variance_noise=noise).prev_sample for s in (ours, theirs))
    assert_close(got, expected)


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "learned"])
def test_the_paper_s_variance_where_diffusers_has_nan(variance_type):
    ours, theirs = pair("DDPMScheduler", variance_type=variance_type)
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    learned = variance_type == "learned"
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    log_variance = torch.full(SHAPE, -3.0)
    full = torch.cat([output, log_variance], 1) if learned else output
    t = ours.timesteps[3]
    assert theirs.step(full, t, x).prev_sample.isnan().all()
    got = ours.step(full, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    plain = fused.DDPMScheduler(variance_type="fixed_large")
    plain.set_timesteps(STEPS)
    expected = plain.step(output, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    if learned:
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        beta = 1 - plain.alphas_cumprod[t] / plain.alphas_cumprod[ours.timesteps[4]]
        expected = expected + (torch.exp(log_variance / 2) - beta.sqrt()) * noise
    assert_close(got, expected)
