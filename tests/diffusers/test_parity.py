"""Whole loops give the pictures and draw the noise of diffusers' schedulers with classifier-free guidance."""

from __future__ import annotations

import pytest
import torch

import fastguide
from tests.support.textbook import ddim_step, ddpm_step

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 20
SCALE = 5.0
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def model(x, t, condition):
    return torch.tanh(0.3 * x + condition + t / 1000)


def assert_same_picture(ours, theirs, truth):
    """Compare within 1e-5 and what diffusers' own float32 rounds away (it takes 1 - abar in float32)."""
    their_error = (theirs - truth).norm() / truth.norm()
    assert (ours - theirs).norm() / theirs.norm() < 1e-5 + their_error
    assert (ours - truth).norm() / truth.norm() < 1e-5


def true_loop(table, schedule, x_T, step, **settings):
    """Run the textbook's loop in float64, with the same noise."""
    generator = torch.Generator().manual_seed(3)
    x = x_T.double()
    abar = schedule.alphas_cumprod
    final = abar[0].item() if step is ddim_step else 1.0
    for i, t in enumerate(table.host_timesteps):
        a_prev = abar[table.host_timesteps[i + 1]].item() if i + 1 < len(table) else final
        uncond, cond = model(x, t, 0.0), model(x, t, 0.5)
        z = torch.randn(x_T.shape, generator=generator).double() if table.adds_noise[i] else None
        if step is ddpm_step:
            settings["last"] = i + 1 == len(table)
        x = step(x, uncond + SCALE * (cond - uncond), abar[t].item(), a_prev, z=z, **settings)
    return x


def loops(table, scheduler, x_T, **step_options):
    """Return fastguide's and diffusers' sample after the same loop; their generators must end in the same state."""
    scheduler.set_timesteps(STEPS)
    assert table.host_timesteps == tuple(scheduler.timesteps.tolist())
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    x, y = x_T, x_T
    for i, t in enumerate(table.host_timesteps):
        uncond, cond = model(x, t, 0.0), model(x, t, 0.5)
        x = fastguide.guided_step(table, i, x, [uncond, cond], fastguide.ClassifierFree(SCALE), generator=ours)
        uncond, cond = model(y, t, 0.0), model(y, t, 0.5)
        y = scheduler.step(uncond + SCALE * (cond - uncond), t, y, generator=theirs, **step_options).prev_sample
    assert torch.equal(ours.get_state(), theirs.get_state())
    return x, y


def schedule_of(scheduler):
    """Make the schedule of diffusers' own numbers, which are float32, so that only the step is compared."""
    return fastguide.NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # of uneven timesteps diffusers does not see the next
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("eta", "use_clipped", "clip"), [(0.0, False, None), (0.0, True, 1.0), (1.0, False, 1.0)])
def test_ddim_loop_is_diffusers(eta, use_clipped, clip, prediction_type, spacing, generator):
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    table = fastguide.ddim(
        schedule_of(scheduler),
        STEPS,
        eta=eta,
        use_clipped_model_output=use_clipped,
        prediction_type=prediction_type,
        clip_sample_range=clip,
        timestep_spacing=spacing,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    x_T = torch.randn(2, 3, 8, 8, generator=generator)
    ours, theirs = loops(table, scheduler, x_T, eta=eta, use_clipped_model_output=use_clipped)
    settings = {"eta": eta, "clip": clip, "use_clipped": use_clipped, "prediction_type": prediction_type}
    assert_same_picture(ours, theirs, true_loop(table, schedule_of(scheduler), x_T, ddim_step, **settings))


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_loop_is_diffusers(variance_type, prediction_type, spacing, generator):
    scheduler = diffusers.DDPMScheduler(
        **BETAS, variance_type=variance_type, prediction_type=prediction_type, timestep_spacing=spacing
    )
    table = fastguide.ddpm(
        schedule_of(scheduler),
        STEPS,
        variance_type=variance_type,
        prediction_type=prediction_type,
        clip_sample_range=1.0,
        timestep_spacing=spacing,
    )
    x_T = torch.randn(2, 3, 8, 8, generator=generator)
    ours, theirs = loops(table, scheduler, x_T)
    settings = {"variance_type": variance_type, "clip": 1.0, "prediction_type": prediction_type}
    assert_same_picture(ours, theirs, true_loop(table, schedule_of(scheduler), x_T, ddpm_step, **settings))


def test_ddpm_trailing_is_diffusers_up_to_the_last_step(generator):
    """diffusers adds noise at the last trailing step, as that is not timestep 0; fastguide's last step adds none."""
    scheduler = diffusers.DDPMScheduler(**BETAS, timestep_spacing="trailing")
    table = fastguide.ddpm(schedule_of(scheduler), STEPS, clip_sample_range=1.0, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    x = y = torch.randn(2, 3, 8, 8, generator=generator)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    for i, t in enumerate(table.host_timesteps[:-1]):
        x = fastguide.guided_step(table, i, x, [model(x, t, 0.1)], generator=ours)
        y = scheduler.step(model(y, t, 0.1), t, y, generator=theirs).prev_sample
    assert (x - y).norm() / y.norm() < 1e-5
    assert not table.adds_noise[-1]


def test_learned_range_step_is_diffusers(generator):
    scheduler = diffusers.DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    table = fastguide.ddpm(schedule_of(scheduler), STEPS, variance_type="learned_range")
    for i in (0, 7, 18, 19):
        x, m, v = torch.randn(3, 2, 3, 8, 8, generator=generator)
        ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
        got = fastguide.guided_step(table, i, x, [m], variance=v, generator=ours)
        expected = scheduler.step(torch.cat([m, v], 1), scheduler.timesteps[i], x, generator=theirs).prev_sample
        assert (got - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "learned"])
def test_where_diffusers_returns_nan_fastguide_follows_the_paper(variance_type, generator):
    """diffusers takes the square root of a log-variance; solvers/test_rows.py has the paper's value."""
    scheduler = diffusers.DDPMScheduler(**BETAS, variance_type=variance_type)
    scheduler.set_timesteps(STEPS)
    table = fastguide.ddpm(schedule_of(scheduler), STEPS, variance_type=variance_type)
    x, m, v, z = torch.randn(4, 2, 3, 8, 8, generator=generator)
    output = torch.cat([m, v], 1) if variance_type == "learned" else m
    assert scheduler.step(output, scheduler.timesteps[3], x, generator=generator).prev_sample.isnan().any()
    got = fastguide.guided_step(table, 3, x, [m], variance=v if variance_type == "learned" else None, noise=z)
    assert got.isfinite().all()


def test_add_noise_is_diffusers(generator):
    scheduler = diffusers.DDPMScheduler(**BETAS)
    x, z = torch.randn(2, 4, 3, 8, 8, generator=generator)
    t = torch.tensor([0, 10, 500, 999])
    got = fastguide.add_noise(schedule_of(scheduler), x, t, z)
    torch.testing.assert_close(got, scheduler.add_noise(x, z, t), rtol=1e-5, atol=1e-6)
