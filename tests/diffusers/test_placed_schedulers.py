"""Schedulers whose steps go by the timestep and by what they are given, beside diffusers' own, as in pipelines."""

from __future__ import annotations

import pytest
import torch

from tests.support.scheduler_pair import SHAPE, model, pair, randn

STEPS = 9
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


def generators():
    return [torch.Generator().manual_seed(4) for _ in range(2)]


def assert_same(got, expected, tolerance=2e-6):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


# ---- CogVideoX ----


def cogvideox_ddim(scheduler, generator=None):
    scheduler.set_timesteps(STEPS)
    x, seen = randn(*SHAPE), []
    for t in scheduler.timesteps:
        x, original = scheduler.step(model(x, t), t, x, generator=generator, return_dict=False)
        seen += [x, original]
    return seen


def cogvideox_dpm(scheduler, generator=None, **how):
    scheduler.set_timesteps(STEPS)
    x, old, seen, timesteps = randn(*SHAPE, dtype=how.get("dtype", torch.float32)), None, [], scheduler.timesteps
    for i, t in enumerate(timesteps):
        back = timesteps[i - 1] if i > 0 else None
        x, old = scheduler.step(model(x, t), old, t, back, x, generator=generator, return_dict=False)
        if how.get("edit"):
            x, old = how["edit"](i, x, old)
        seen += [x, old]
    return seen


@pytest.mark.parametrize("config", [{}, ZERO_SNR, {"prediction_type": "sample", "set_alpha_to_one": False}])
@pytest.mark.parametrize("loop", [cogvideox_ddim, cogvideox_dpm])
def test_cogvideox(loop, config):
    name = {cogvideox_ddim: "CogVideoXDDIMScheduler", cogvideox_dpm: "CogVideoXDPMScheduler"}[loop]
    one, two = generators()
    ours, theirs = pair(name, **config)
    assert_same(loop(ours, one), loop(theirs, two))
    assert torch.equal(one.get_state(), two.get_state())


def test_cogvideox_dpm_runs_in_the_kernel_as_long_as_it_is_given_what_it_returned(monkeypatch):
    ours, _ = pair("CogVideoXDPMScheduler")
    monkeypatch.setattr("diffusers.CogVideoXDPMScheduler.step", None)
    cogvideox_dpm(ours)
    assert ours._counted.following == STEPS


@pytest.mark.parametrize("edited", [1, 4, STEPS - 1])
def test_cogvideox_dpm_of_another_original_is_left_to_diffusers(edited):
    """diffusers' own step goes on from what it is given, in the middle of a loop as well."""

    def edit(i, x, old):
        return (x, old * 0.9) if i == edited else (x, old)

    one, two = generators()
    ours, theirs = pair("CogVideoXDPMScheduler")
    assert_same(cogvideox_dpm(ours, one, edit=edit), cogvideox_dpm(theirs, two, edit=edit))
    assert torch.equal(one.get_state(), two.get_state())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cogvideox_dpm_of_an_original_edited_in_place_is_left_to_diffusers(mode):
    def edit(i, x, old):
        return x, (old.mul_(0.9) if i in (1, 2) else old)

    def edit_of_the_same_object(i, x, old):
        edit(i, x, old)
        return x, old

    for how in (edit, edit_of_the_same_object):
        one, two = generators()
        ours, theirs = pair("CogVideoXDPMScheduler")
        with mode():
            assert_same(cogvideox_dpm(ours, one, edit=how), cogvideox_dpm(theirs, two, edit=how))
        assert torch.equal(one.get_state(), two.get_state())


def test_cogvideox_dpm_keeps_nothing_after_its_last_step():
    ours, _ = pair("CogVideoXDPMScheduler")
    cogvideox_dpm(ours)
    assert ours._returned_original is None


def test_cogvideox_dpm_of_another_order_is_left_to_diffusers():
    results = []
    for scheduler in pair("CogVideoXDPMScheduler"):
        scheduler.set_timesteps(STEPS)
        x, t, generator = randn(*SHAPE), scheduler.timesteps, torch.Generator().manual_seed(0)
        x, old = scheduler.step(model(x, t[0]), None, t[0], None, x, generator=generator)
        x, old = scheduler.step(model(x, t[3]), old, t[3], t[0], x, generator=generator)
        results.append(scheduler.step(model(x, t[4]), old, t[4], t[2], x, generator=generator))
    assert_same(*results)


def test_cogvideox_dpm_returns_a_tuple_where_diffusers_does():
    """Of its first and last step, whatever it is asked for."""
    kinds = []
    for scheduler in pair("CogVideoXDPMScheduler"):
        scheduler.set_timesteps(3)
        x, old, back = randn(*SHAPE), None, None
        for t in scheduler.timesteps:
            result = scheduler.step(model(x, t), old, t, back, x, return_dict=True)
            kinds.append(type(result).__name__.removeprefix("Lazy"))
            x, old = result if isinstance(result, tuple) else (result.prev_sample, result.pred_original_sample)
            back = t
    assert kinds[:3] == kinds[3:] == ["tuple", "DDIMSchedulerOutput", "tuple"]


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_steps_before_set_timesteps_are_refused_as_diffusers_does(name):
    scheduler, _ = pair(name)
    x = randn(*SHAPE)
    given = (x, 999, x) if "DDIM" in name else (x, None, 999, None, x)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        scheduler.step(*given)


# ---- unCLIP ----


def unclip(scheduler, generator=None, learned=False, prev=True):
    scheduler.set_timesteps(STEPS)
    x, seen, timesteps = randn(*SHAPE), [], scheduler.timesteps
    for i, t in enumerate(timesteps):
        output = model(x, t)
        output = torch.cat([output, output.flip(1) * 0.9], 1) if learned else output
        following = timesteps[i + 1] if prev and i + 1 < len(timesteps) else None
        result = scheduler.step(output, t, x, prev_timestep=following, generator=generator)
        x = result.prev_sample
        seen += [x, result.pred_original_sample]
    return seen


@pytest.mark.parametrize("prev", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "sample", "clip_sample_range": 5.0},
        {"clip_sample": False, "num_train_timesteps": 40},
        {"variance_type": "learned_range"},
    ],
)
def test_unclip(config, prev):
    """Where a step leads to t - 1, diffusers takes beta from its table, and not from the quotient of the abars."""
    learned = config.get("variance_type") == "learned_range"
    one, two = generators()
    ours, theirs = pair("UnCLIPScheduler", **config)
    assert_same(unclip(ours, one, learned, prev), unclip(theirs, two, learned, prev), 1e-5)
    assert torch.equal(one.get_state(), two.get_state())


def test_unclip_runs_in_the_kernel(monkeypatch):
    monkeypatch.setattr("diffusers.UnCLIPScheduler.step", None)
    unclip(pair("UnCLIPScheduler")[0])


@pytest.mark.parametrize("config", [{"variance_type": "fixed_small"}, {"prediction_type": "v_prediction"}])
def test_unclip_refuses_what_diffusers_does(config):
    (name,) = config
    for scheduler in pair("UnCLIPScheduler", **config):
        scheduler.set_timesteps(STEPS)
        with pytest.raises(ValueError, match=name):
            scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE))


def test_unclip_to_another_timestep_is_left_to_diffusers():
    results = []
    for scheduler in pair("UnCLIPScheduler"):
        scheduler.set_timesteps(STEPS)
        x, t = randn(*SHAPE), scheduler.timesteps[2]
        generator = torch.Generator().manual_seed(0)
        results.append([scheduler.step(model(x, t), t, x, prev_timestep=300, generator=generator).prev_sample])
    assert torch.equal(results[0][0], results[1][0])


# ---- Wuerstchen ----


def wuerstchen(scheduler, generator=None, dtype=torch.float32, **how):
    scheduler.set_timesteps(STEPS, **how)
    x, seen = randn(*SHAPE, dtype=dtype), []
    for t in scheduler.timesteps[:-1]:
        ratio = t.expand(len(x))
        output = model(x, float(t))
        x = scheduler.step(output, ratio, x, generator=generator).prev_sample
        seen.append(x)
    return seen


@pytest.mark.parametrize("config", [{}, {"scaler": 2.0}, {"scaler": 0.5, "s": 0.01}])
def test_wuerstchen(config):
    one, two = generators()
    ours, theirs = pair("DDPMWuerstchenScheduler", **config)
    assert_same(wuerstchen(ours, one), wuerstchen(theirs, two))
    assert torch.equal(one.get_state(), two.get_state())


def test_wuerstchen_runs_in_the_kernel_and_keeps_its_state_in_float32(monkeypatch):
    monkeypatch.setattr("diffusers.DDPMWuerstchenScheduler.step", None)
    ours, _ = pair("DDPMWuerstchenScheduler")
    assert wuerstchen(ours, dtype=torch.bfloat16)[-1].dtype == torch.bfloat16
    x, t = randn(*SHAPE).bfloat16(), ours.timesteps[:1].expand(len(randn(*SHAPE)))
    assert ours.step(x, t, x).prev_sample.dtype == torch.bfloat16
    assert ours._counted.state.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wuerstchen_of_a_timestep_near_one_of_its_own(dtype):
    """diffusers takes where it leads to from the nearest of its own, and where it begins from itself."""
    results = []
    for scheduler in pair("DDPMWuerstchenScheduler"):
        scheduler.set_timesteps(STEPS)
        x, t = randn(*SHAPE) * 0.1, (scheduler.timesteps[3] + 0.02).to(dtype).expand(2)
        results.append(scheduler.step(x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample)
    torch.testing.assert_close(*results)


def test_wuerstchen_of_timesteps_that_differ_is_left_to_diffusers():
    results = []
    for scheduler in pair("DDPMWuerstchenScheduler"):
        scheduler.set_timesteps(STEPS)
        x, t = randn(*SHAPE), scheduler.timesteps[torch.tensor([4, 2])]
        results.append(scheduler.step(x * 0.1, t, x, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert torch.equal(*results)
