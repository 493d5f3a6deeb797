"""RFD4-Proteina's scheduler beside diffusers' own: whole loops, their masks, noise and dtypes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.support import rare_pipelines
from tests.support.diffusers_in_float64 import in_float64
from tests.support.scheduler_pair import diffusers, fused, pair, randn

NAME = "RFD4ProteinaScheduler"
LOG = {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 2.0, "tsr_sigma": 0.5}
CONFIGS = [
    LOG,
    {**LOG, "schedule_mode": "power", "noise_mode": "tan", "tsr_k": 1.3, "tail_steps": 0},
    {**LOG, "t_lim_ode": 0.7, "t_lim_ode_below": 0.2, "tail_steps": 3, "tail_step_multiplier": 3},
    {**LOG, "t_lim_ode": 0.0},
]
SHAPE = 2, 7, 3


def mask():
    return randn(*SHAPE[:2], seed=4) > -0.5


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def loop(scheduler, x, given=None, *, steps=40, start=None, dtype=None):
    """Return the samples of a loop, of a model that computes in ``dtype``."""
    scheduler.set_timesteps(steps, start_time=start)
    seen = []
    for t in scheduler.timesteps:
        output = (torch.tanh(0.5 * x + t) - 0.1 * x).to(dtype or x.dtype)
        x = scheduler.step(output, t, x, mask(), given, return_dict=False)[0]
        seen.append(x)
    return seen


def error(got, expected):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("start", [None, 0.4])
@pytest.mark.parametrize("config", CONFIGS)
def test_loops_are_as_near_to_float64_as_diffusers(config, start, monkeypatch):
    """With the same noise, after which the generators are at the same place."""
    ours, theirs = pair(NAME, **config)
    exact, (left, right) = diffusers.RFD4ProteinaScheduler(**config), (generators(), generators())
    theirs.set_timesteps(40, start_time=start)
    x = randn(*SHAPE)
    expected = loop(theirs, x, right, start=start)
    with in_float64(diffusers.RFD4ProteinaScheduler), monkeypatch.context() as patch:
        for name in ("timesteps", "_times", "_noise"):
            setattr(exact, name, getattr(theirs, name).double())
        exact._step_index, exact.set_timesteps = 0, lambda steps, start_time: None
        patch.setattr(
            "diffusers.schedulers.scheduling_rfd4_proteina.randn_tensor",
            lambda shape, generator, **how: torch.cat([
                torch.randn(1, *shape[1:], generator=each, dtype=torch.float32) for each in generator
            ]).double(),
        )  # fmt: skip
        exact = loop(exact, x.double(), generators(), start=start)
    monkeypatch.setattr(f"diffusers.{NAME}.step", None)
    got = loop(ours, x, left, start=start)
    assert error(expected, exact) < 1e-4
    assert error(got, exact) <= 2 * error(expected, exact) + 1e-7
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(left, right, strict=True))
    assert ours.step_index == theirs.step_index == 40


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("model", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_diffusers(state, model):
    got, expected = (loop(each, randn(*SHAPE).to(state), generators(), dtype=model) for each in pair(NAME, **LOG))
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    assert error(got, [x.double() for x in expected]) < (0.05 if model == torch.bfloat16 else 1e-4)


def test_tokens_that_are_not_emitted_are_zero():
    got = loop(fused.RFD4ProteinaScheduler(**LOG), randn(*SHAPE), generators())
    assert all((x[~mask()] == 0).all() and (x[mask()] != 0).all() for x in got)


@pytest.mark.parametrize("how", ["one", "none"])
def test_one_generator_and_torch_s_own(how):
    results = []
    for scheduler in pair(NAME, **LOG):
        torch.manual_seed(0)
        scheduler.set_timesteps(40)
        x, generator = randn(1, 8, 4), torch.Generator().manual_seed(3) if how == "one" else None
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * x, t, x, torch.ones(1, 8, dtype=torch.bool), generator).prev_sample
        results.append([x.double(), torch.randn(2, generator=generator).double()])
    assert error(*results) < 1e-5


def test_guidance_is_part_of_the_step():
    ours, theirs = pair(NAME, **LOG)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(40)
    x, t = randn(*SHAPE), ours.timesteps[0]
    uncond, cond = 0.3 * x, 0.1 + 0.2 * x
    expected = theirs.step(uncond + 3 * (cond - uncond), t, x, mask()).prev_sample
    got = ours.step(torch.cat([uncond, cond]), t, x, mask(), guidance_scale=3.0).prev_sample
    assert error([got], [expected.double()]) < 2e-5  # diffusers divides rounded differences by t, 0.001


def test_what_diffusers_refuses_is_refused():
    for scheduler in pair(NAME, **LOG):
        x = randn(*SHAPE)
        with pytest.raises(ValueError, match="Call set_timesteps before step"):
            scheduler.step(x, torch.tensor(0.1), x, mask())
        scheduler.set_timesteps(22)
        for t in (scheduler.timesteps[1], torch.tensor(0.1)):
            with pytest.raises(ValueError, match="must be the next element of timesteps"):
                scheduler.step(x, t, x, mask())
        with pytest.raises(ValueError, match=r"one torch.Generator per batch row \(2\)"):
            scheduler.step(x, scheduler.timesteps[0], x, mask(), torch.Generator())
        loop(scheduler, x, steps=22)
        with pytest.raises(ValueError, match="The trajectory is complete"):
            scheduler.step(x, scheduler.timesteps[-1], x, mask())


def test_what_is_left_to_diffusers_is_its_own():
    """Masks of numbers, and what autograd is to see; a loop goes on after either."""
    results, gradients = [], []
    for scheduler in pair(NAME, **LOG):
        scheduler.set_timesteps(40)
        x, given = randn(*SHAPE), generators()
        for number, t in enumerate(scheduler.timesteps):
            each = mask().float() * 0.5 if number == 3 else mask()
            output = (0.3 * x.detach()).requires_grad_(number == 25)
            x = scheduler.step(output, t, x, each, given).prev_sample
            if number == 25:
                x.sum().backward()
                gradients.append(output.grad)
                x = x.detach()
        results.append([x.double()])
    assert error(*results) < 1e-5
    assert torch.equal(*gradients)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_in_the_middle_of_a_loop_goes_on_as_the_loop_does(how):
    scheduler, results = fused.RFD4ProteinaScheduler(**{**LOG, "t_lim_ode": 0.0}), []
    scheduler.set_timesteps(40)
    x = scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE), mask()).prev_sample
    for each in (how(scheduler), scheduler):
        y = x.clone()
        for t in each.timesteps[1:]:
            y = each.step(0.3 * y, t, y, mask()).prev_sample
        results.append(y)
    assert torch.equal(*results)


def test_its_loop_is_no_table_alone():
    with pytest.raises(ValueError, match="a mask in each of its steps"):
        fused.step_table(diffusers.RFD4ProteinaScheduler(**LOG), 40)


@pytest.mark.parametrize("how", [{}, {"partial_t_bb_ca": 0.3, "partial_t_local_latents": 0.2}])
def test_the_pipeline_makes_the_same(how):
    pipe, given = rare_pipelines.rfd4_proteina()
    if how:
        atoms = torch.ones(2, 9, 37, dtype=torch.bool)
        given |= {"coords_nm": randn(2, 9, 37, 3), "atom37_mask": atoms, **how}
        pipe.vae.encode = lambda coords_nm, **rest: rare_pipelines.SimpleNamespace(latent=coords_nm[:, :, :4, 0])
    pipe.set_progress_bar_config(disable=True)

    def run():
        made = pipe(**given, generator=generators())
        return [made.bb_ca.double(), made.local_latents.double(), made.coords_nm.double()]

    before = run()
    done = fused.accelerate(pipe)
    assert done.exchanged == {"bb_ca_scheduler": NAME, "local_latents_scheduler": NAME}
    assert error(run(), before) < 1e-4
    assert done.counts == {"fused without guidance": 16}
    fused.restore(pipe)
    assert all(map(torch.equal, run(), before))


def changed(name, factor, *, in_place):
    """Return what multiplies one of a scheduler's tables by hand."""

    def change(scheduler):
        if in_place:
            getattr(scheduler, name).mul_(factor)
        else:
            setattr(scheduler, name, getattr(scheduler, name) * factor)

    return change


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("name", "factor"), [("timesteps", 0.97), ("_times", 0.99), ("_noise", 0.5)])
def test_tables_that_are_changed_by_hand_are_noticed(name, factor, in_place):
    """Before the second loop over the same steps, and in its middle."""
    results, change = [], changed(name, factor, in_place=in_place)
    for scheduler in pair(NAME, **LOG):
        loop(scheduler, randn(*SHAPE), generators())
        scheduler.set_timesteps(40)
        change(scheduler)
        x, given = randn(*SHAPE), generators()
        for k in range(30):
            if k == 15:
                change(scheduler)
            t = scheduler.timesteps[k]
            x = scheduler.step(torch.tanh(0.5 * x + t) - 0.1 * x, t, x, mask(), given).prev_sample
        results.append([x.double()])
    assert error(*results) < 1e-4


def test_times_without_a_score_are_left_to_diffusers():
    """At 0 it holds the sample, and draws nothing."""
    results = []
    for scheduler in pair(NAME, **LOG):
        scheduler.set_timesteps(40)
        scheduler.timesteps[0] = 0.0
        x, given = randn(*SHAPE), generators()
        for t in scheduler.timesteps[:3]:
            x = scheduler.step(0.3 * x, t, x, mask(), given).prev_sample
        results.append(x)
    assert torch.equal(*results)


def test_a_timestep_is_one_as_diffusers_takes_it():
    """Of no dimension, and of a dtype in which it computes."""
    for scheduler in pair(NAME, **LOG):
        x = randn(*SHAPE)
        scheduler.set_timesteps(22)
        with pytest.raises(ValueError, match="must be the next element of timesteps"):
            scheduler.step(x, scheduler.timesteps[:1], x, mask())
        assert scheduler.step(x, scheduler.timesteps[0].double(), x, mask()).prev_sample.dtype == torch.float64


def test_a_mask_is_what_it_is_at_each_step():
    """Whether torch counts who writes to it or not."""
    results = []
    for scheduler in pair(NAME, **LOG):
        scheduler.set_timesteps(22)
        x, emits = randn(*SHAPE), mask()
        for number, t in enumerate(scheduler.timesteps[:3]):
            if number == 1:
                emits.data.logical_not_()
            if number == 2:
                emits.numpy().fill(True)
            x = scheduler.step(0.3 * x, t, x + 1, emits, generators()).prev_sample
        results.append([x.double()])
    assert error(*results) < 1e-4
