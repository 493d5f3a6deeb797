"""Schedulers that threshold dynamically: whole loops beside diffusers' own, in one step each, and what is left."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastguide.diffusers.traced import Fusion, traced
from tests.support.scheduler_pair import SHAPE, assert_close, diffusers, fused, pair, randn

CASES = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "ddpm, learned variance": ("DDPMScheduler", {"variance_type": "learned_range"}),
    "ddim in parallel": ("DDIMParallelScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++, order 3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm++, SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm of noise": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"},
    ),
    "dpm++ in single steps": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc of noise": ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    "sa": ("SASolverScheduler", {}),
    "edm": ("EDMDPMSolverMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
IGNORED = {"unipc of noise", "tcd"}
"""Where diffusers' own step has no thresholding, whatever the configuration says."""


def loop(scheduler, learned, **options):
    """Return the samples of all steps of a loop."""
    scheduler.set_timesteps(7)
    takes = inspect.signature(scheduler.step).parameters
    if "generator" in takes:
        options["generator"] = torch.Generator().manual_seed(1)
    x, samples = randn(*SHAPE, seed=3) * scheduler.init_noise_sigma, []
    for k, t in enumerate(scheduler.timesteps):
        output = randn(SHAPE[0], SHAPE[1] * (2 if learned else 1), *SHAPE[2:], seed=10 + k)
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output.tanh() if learned else output, t, x, **options).prev_sample
        samples.append(x)
    return torch.stack(samples)


@pytest.mark.parametrize("most", [1.0, 1.5])
@pytest.mark.parametrize("case", CASES)
def test_loops_are_diffusers(case, most):
    name, config = CASES[case]
    numbers = {"dynamic_thresholding_ratio": 0.8, "sample_max_value": most}
    ours, theirs = pair(name, thresholding=True, **numbers, **config)
    learned = "variance_type" in config
    got, expected = loop(ours, learned), loop(theirs, learned)
    assert_close(got, expected)
    plain, _ = pair(name, **({"clip_sample": False} if name.startswith("DD") else {}), **config)
    without = loop(plain, learned)  # the test has teeth: thresholds matter
    matters = bool((without - got)[-1].norm() > 0.02 * got[-1].norm())
    assert matters is (case not in IGNORED)
    loops = ours._counted if hasattr(ours, "_counted") else None
    assert loops is None or loops.table is not None


def test_guidance_and_the_predicted_original_in_the_same_step(monkeypatch):
    ours, theirs = pair("DDIMScheduler", thresholding=True, sample_max_value=1.5)
    ours.set_timesteps(7)
    theirs.set_timesteps(7)
    output, x, scale = randn(4, *SHAPE[1:], seed=1), randn(*SHAPE), torch.tensor([2.0, 4.0])
    uncond, cond = output.chunk(2)
    monkeypatch.setattr(ours, "_threshold_sample", lambda sample: pytest.fail("left to diffusers"))
    got = ours.step(output, ours.timesteps[2], x, guidance_scale=scale)
    guided = uncond + scale.view(2, 1, 1, 1) * (cond - uncond)
    expected = theirs.step(guided, theirs.timesteps[2], x)
    for ours_, theirs_ in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        assert_close(ours_, theirs_)


def by_frames(whole):
    """Return guidance with a scale for each frame, as Stable Video Diffusion's."""
    uncond, cond = whole.chunk(2)
    return uncond + torch.linspace(1.0, 3.0, 4).view(1, 4, 1, 1, 1) * (cond - uncond)


def by_channels(whole):
    """Return guidance of some channels alone, as Lumina's."""
    cond, uncond = whole[:, :3].chunk(2)
    half = uncond + 3.0 * (cond - uncond)
    return torch.cat([torch.cat([half, half]), whole[:, 3:]], 1).chunk(2)[0]


@pytest.mark.parametrize(("guided", "shape"), [(by_frames, (1, 4, 3, 8, 8)), (by_channels, (1, 4, 8, 8))])
@pytest.mark.parametrize(("name", "config"), [CASES["lcm"], ("DPMSolverMultistepScheduler", {"solver_order": 1})])
def test_a_quantile_is_of_a_sample_where_scales_are_not(guided, shape, name, config):
    """Also of the predicted original, in the schedulers that return it."""
    whole, results, fusion = randn(2 * shape[0], *shape[1:], seed=1), [], Fusion()
    fusion.tries = True
    whole[:, 1] *= 6  # quantiles of frames or channels differ
    for scheduler, output in zip(
        pair(name, thresholding=True, sample_max_value=1000.0, **config), (traced(whole, fusion), whole), strict=True
    ):
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(1)
        done = scheduler.step(guided(output), scheduler.timesteps[3], randn(*shape), generator=generator)
        results.append(done.to_tuple())
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)
    assert fusion.computed == {"the step, which does not take it apart": 1}


def test_batch_step_without_noise_thresholds_too():
    ours, theirs = pair("DDIMParallelScheduler", thresholding=True, sample_max_value=1.5)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    output, x, timesteps = randn(*SHAPE, seed=1), randn(*SHAPE), ours.timesteps[[2, 4]]
    assert_close(*(each.batch_step_no_noise(output, timesteps, x) for each in (ours, theirs)))


@pytest.mark.parametrize("numbers", [{"sample_max_value": 0.5}, {"dynamic_thresholding_ratio": 0.0}])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_numbers_out_of_their_range_are_left_to_diffusers(name, numbers):
    ours, theirs = pair(name, thresholding=True, **numbers)
    assert torch.equal(loop(ours, False), loop(theirs, False))
    assert fused.thresholding.why_not_thresholded(ours.config) == "dynamic thresholding by numbers out of their range"


@pytest.mark.parametrize("case", sorted(IGNORED))
def test_numbers_that_nothing_reads_may_be_any(case):
    name, config = CASES[case]
    ours, theirs = pair(name, thresholding=True, sample_max_value=0.5, **config)
    assert_close(loop(ours, False), loop(theirs, False))
    assert ours._counted.table is not None


def test_a_noise_predicting_sa_solver_gives_what_is_meant():
    """diffusers raises: it divides a picture by the whole table of alphas. The meant value is that of its x_0."""
    config = {"thresholding": True, "sample_max_value": 1.5, "algorithm_type": "noise_prediction"}
    with pytest.raises(RuntimeError, match="must match the size"):
        loop(diffusers.SASolverScheduler(**config), False)
    got = loop(fused.SASolverScheduler(**config), False)
    assert bool(got.isfinite().all())
    assert not torch.equal(got, loop(fused.SASolverScheduler(**config | {"thresholding": False}), False))
