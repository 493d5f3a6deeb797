"""pi-Flow's scheduler beside diffusers' own: whole rollouts as one sum, and what its steps take and refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastguide.diffusers import piflow_schedulers
from fastguide.diffusers.traced import Fusion, traced
from tests.support.diffusers_in_float64 import in_float64
from tests.support.scheduler_pair import diffusers, fused, pair, randn

NAME = "PiflowScheduler"
SHAPE = 2, 3, 4, 6


def velocities(x, t, n_grid):
    """Return so many velocities in the last dimension, none like another."""
    scales = torch.linspace(0.3, 0.9, n_grid, dtype=torch.float64).tolist()
    return torch.cat([torch.tanh(scale * x + t.to(x) / 700) - 0.2 * x for scale in scales], -1)


def loop(scheduler, x, steps=4, *, begin=None, dtype=None, as_output=True):
    """Return the samples of a loop, of a model that computes in ``dtype``."""
    scheduler.set_timesteps(steps)
    if begin is not None:
        scheduler.set_begin_index(begin)
    seen = []
    for t in scheduler.timesteps[begin or 0 :]:
        output = velocities(x.to(dtype or x.dtype), t, scheduler.n_grid)
        x = scheduler.step(output, t, x, return_dict=as_output)[0]
        seen.append(x)
    return seen


def error(got, expected):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))


CONFIGS = [
    {},
    {"n_grid": 2, "shift": 1.0},
    {"n_grid": 3, "num_policy_substeps": 7},
    {"n_grid": 32, "final_step_size_scale": 1.0},
    {"eps": 0.05, "shift": 0.3},
    {"eps": 1e-12, "shift": 3.0},
    {"num_policy_substeps": 1, "final_step_size_scale": 0.1, "num_train_timesteps": 500},
]


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
@pytest.mark.parametrize("config", CONFIGS)
def test_loops_in_float32_are_nearer_to_float64_than_diffusers(config, steps, monkeypatch):
    """Than twice its own error, that is; mostly they are ten times nearer."""
    (ours, theirs), x = pair(NAME, **config), randn(*SHAPE)
    with in_float64(diffusers.PiflowScheduler):
        exact = loop(diffusers.PiflowScheduler(**config), x.double(), steps)
    expected = loop(theirs, x, steps)
    monkeypatch.setattr(f"diffusers.{NAME}.step", None)
    got = loop(ours, x, steps)
    assert error(expected, exact) < 1e-5
    assert error(got, exact) <= 2 * error(expected, exact) + 1e-7
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.step_index == theirs.step_index == steps


@pytest.mark.parametrize("begin", [None, 1, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_loops_in_float64_are_diffusers_over_the_same_tables(config, begin):
    (ours, theirs), x = pair(NAME, **config), randn(*SHAPE).double()
    got = loop(ours, x, 5, begin=begin)
    with in_float64(diffusers.PiflowScheduler):
        theirs.set_timesteps(5)
        for name in ("timesteps", "sigmas", "_piflow_raw_timesteps"):
            setattr(theirs, name, getattr(ours, name).double())
        theirs.set_timesteps = lambda steps: None
        expected = loop(theirs, x, 5, begin=begin)
    assert got[0].dtype == torch.float64
    assert error(got, expected) < 1e-12


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("model", [torch.bfloat16, torch.float32])
def test_dtypes_are_diffusers(state, model):
    ours, theirs = pair(NAME)
    got, expected = (loop(each, randn(*SHAPE).to(state), dtype=model) for each in (ours, theirs))
    assert {x.dtype for x in (*got, *expected)} == {state}
    rounded = torch.finfo(model).bits < 32 or torch.finfo(state).bits < 32
    assert error(got, [x.double() for x in expected]) < (0.02 if rounded else 5e-6)


def test_a_state_in_float32_is_nearer_to_float64():
    """diffusers rounds the sample after each step, and so does ``float32_state = False``."""
    first = randn(*SHAPE).bfloat16()
    output = [0.5 * randn(*SHAPE[:-1], 60, seed=10 + number).bfloat16() for number in range(16)]

    def run(scheduler, x):
        scheduler.set_timesteps(16)
        for t, v in zip(scheduler.timesteps, output, strict=True):
            x = scheduler.step(v.to(torch.promote_types(v.dtype, x.dtype)), t, x).prev_sample
        return x

    ours, theirs = pair(NAME)
    exact, rounded = run(fused.PiflowScheduler(), first.double()), fused.PiflowScheduler()
    rounded.float32_state = False
    errors = [error([run(each, first)], [exact]) for each in (ours, theirs, rounded)]
    assert errors[1] > 1.5 * errors[0]
    assert errors[2] > 1.5 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_one_launch_that_copies_no_prediction(dtype, monkeypatch):
    scheduler, launches = fused.PiflowScheduler(), []

    def note(table, call, sample, predictions, guidance, **to):
        launches.append([each.data_ptr() for each in predictions])
        return step(table, call, sample, predictions, guidance, **to)

    step = piflow_schedulers.guided_step
    monkeypatch.setattr(piflow_schedulers, "guided_step", note)
    scheduler.set_timesteps(4)
    x, given = randn(*SHAPE).to(dtype), []
    for t in scheduler.timesteps:
        output = velocities(x, t, 10)
        given.append([output[..., 6 * k :].data_ptr() for k in range(10)])
        x = scheduler.step(output, t, x).prev_sample
    assert launches == given


def test_samples_and_outputs_of_any_layout():
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.clone().mT):
        results = []
        for scheduler in pair(NAME, n_grid=3):
            scheduler.set_timesteps(3)
            x = layout(randn(*SHAPE))
            for t in scheduler.timesteps:
                x = scheduler.step(layout(velocities(x, t, 3)), t, x).prev_sample
            results.append([x.double()])
        assert error(*results) < 2e-6


def test_latents_that_are_edited_are_taken_as_they_are():
    """As Kandinsky 6 writes its first frame into them before each step."""
    results = []
    for scheduler in pair(NAME):
        scheduler.set_timesteps(4)
        x = randn(*SHAPE).bfloat16()
        for t in scheduler.timesteps:
            x[:, -1] = 0.5
            x = scheduler.step(velocities(x, t, 10), t, x).prev_sample
        results.append([x.double()])
    assert error(*results) < 0.01


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_in_the_middle_of_a_loop_goes_on_as_the_loop_does(how):
    scheduler, results = fused.PiflowScheduler(), []
    scheduler.set_timesteps(4)
    x = randn(*SHAPE)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(velocities(x, t, 10), t, x).prev_sample
    for each in (how(scheduler), scheduler):
        y = x.clone()
        for t in each.timesteps[2:]:
            y = each.step(velocities(y, t, 10), t, y).prev_sample
        results.append(y)
    assert torch.equal(*results)


GUIDANCE = {
    "u + s(c - u)": lambda u, c, p: u + 4.0 * (c - u),
    "of three": lambda u, c, p: u + 4.0 * (c - u) + 0.5 * (c - p),
    "negated": lambda u, c, p: -(0.5 * c),
}


def guided_loop(scheduler, formula, outputs, x, given=lambda output: output):
    """Return the samples of a loop that is guided by ``formula`` of outputs, which are those of each step."""
    scheduler.set_timesteps(len(outputs))
    seen = []
    for t, of in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(formula(*map(given, of)), t, x).prev_sample
        seen.append(x.double())
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_is_a_part_of_the_rollout(name, dtype):
    """So that it is one sum of all velocities, and no farther from float64 than diffusers' own."""
    (ours, theirs), x, formula = pair(NAME), randn(*SHAPE).to(dtype), GUIDANCE[name]
    outputs = [[velocities(k * x, torch.tensor(t), 10) for k in (1.0, 0.9, 0.8)] for t in (900.0, 600.0, 300.0)]
    with in_float64(diffusers.PiflowScheduler):
        exact = guided_loop(diffusers.PiflowScheduler(), formula, outputs, x.double(), lambda output: output.double())
    expected = guided_loop(theirs, formula, outputs, x)
    ours._fusion = fusion = Fusion()
    made = guided_loop(ours, formula, outputs, x, lambda output: traced(output, fusion))
    assert error(made, exact) <= error(expected, exact) + 2e-7
    assert fusion.counts == {f"fused with{'out' if name == 'negated' else ''} guidance": 3}
    assert not fusion.computed


@pytest.mark.parametrize(("grid", "is_fused"), [(10, True), (16, True), (17, False)])
def test_guidance_of_more_velocities_than_kernels_take_is_computed_before(grid, is_fused, monkeypatch):
    ours, theirs = pair(NAME, n_grid=grid)
    counts, step = [], piflow_schedulers.guided_step
    monkeypatch.setattr(piflow_schedulers, "guided_step", lambda *a, **k: counts.append(len(a[3])) or step(*a, **k))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    t, x = ours.timesteps[1], randn(*SHAPE)
    uncond, cond = velocities(0.9 * x, t, grid), velocities(x, t, grid)
    for scale in (3.0, 5.0, 3.0):
        for scheduler in (ours, theirs):
            scheduler._step_index = None
        got = ours.step(torch.cat([uncond, cond]), t, x, guidance_scale=scale).prev_sample
        assert error([got], [theirs.step(uncond + scale * (cond - uncond), t, x).prev_sample.double()]) < 2e-6
    assert counts == [2 * grid if is_fused else grid] * 3


def test_a_scale_for_each_sample_is_computed_before_the_rollout():
    ours, theirs = pair(NAME)
    scale = torch.tensor([2.0, 5.0])
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    t, x = ours.timesteps[1], randn(*SHAPE)
    uncond, cond = velocities(0.9 * x, t, 10), velocities(x, t, 10)
    expected = theirs.step(uncond + scale.view(-1, 1, 1, 1) * (cond - uncond), t, x).prev_sample
    got = ours.step(torch.cat([uncond, cond]), t, x, guidance_scale=scale).prev_sample
    assert error([got], [expected.double()]) < 2e-6
    with pytest.raises(ValueError, match="model_output: expected twice the sample's batch with guidance_scale="):
        ours.step(cond, t, x, guidance_scale=2.0)


@pytest.mark.parametrize("is_guided", [True, False])
def test_guidance_that_is_masked_before_the_step_is_counted_as_guidance(is_guided):
    (ours, theirs), fusion, mask = pair(NAME), Fusion(), torch.rand(*SHAPE[:-1], 1)
    ours._fusion = fusion
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(3)
        x = randn(*SHAPE)
        for t in scheduler.timesteps:
            outputs = velocities(0.9 * x, t, 10), velocities(x, t, 10)
            u, c = [traced(each, fusion) for each in outputs] if scheduler is ours else outputs
            m = (u + 3.0 * (c - u) if is_guided else c) * mask
            x = scheduler.step(m, t, x).prev_sample
        results.append([x.double()])
    assert error(*results) < 2e-6
    assert fusion.counts == {f"fused with{'' if is_guided else 'out'} guidance": 3}


def test_the_counter_is_found_without_waiting_for_the_device():
    ours, theirs = pair(NAME)
    ours.set_timesteps(6, device="meta")
    theirs.set_timesteps(6)
    for place, begin in ((0, None), (4, None), (2, 3)):
        for scheduler in (ours, theirs):
            scheduler._step_index, scheduler._begin_index = None, begin
        ours._init_step_index(ours.timesteps[place])
        assert ours.step_index == theirs._step_index_for(theirs.timesteps[place])
    assert ours.timesteps.device.type == ours.sigmas.device.type == "meta"


def test_a_number_that_is_a_timestep_is_found_as_diffusers_finds_it():
    for scheduler in pair(NAME):
        scheduler.set_timesteps(4)
        t = round(float(scheduler.timesteps[2]), 4)  # of float32, whose neighbours are further away
        scheduler.step(velocities(randn(*SHAPE), torch.tensor(t), 10), t, randn(*SHAPE))
        assert scheduler.step_index == 3


def test_what_is_left_to_diffusers_is_its_own():
    ours, theirs = pair(NAME, n_grid=33)
    assert all(map(torch.equal, loop(ours, randn(*SHAPE)), loop(theirs, randn(*SHAPE))))
    assert ours._counted.made.why_not == "a grid of more than 32 predictions"
    gradients = []
    for scheduler in pair(NAME):
        scheduler.set_timesteps(4)
        output = randn(*SHAPE[:-1], 60).requires_grad_()
        scheduler.step(output, scheduler.timesteps[0], randn(*SHAPE)).prev_sample.sum().backward()
        gradients.append(output.grad)
    assert torch.equal(*gradients)


def test_what_diffusers_refuses_is_refused():
    for scheduler in pair(NAME):
        x, output = randn(*SHAPE), randn(*SHAPE[:-1], 60)
        with pytest.raises(ValueError, match="is not in the Piflow schedule"):
            scheduler.step(output, 1000.0, x)
        scheduler.set_timesteps(2)
        with pytest.raises(ValueError, match="Passing integer indices"):
            scheduler.step(output, 3, x)
        with pytest.raises(ValueError, match="is not in the Piflow schedule"):
            scheduler.step(output, 3.5, x)
        with pytest.raises(ValueError, match="are not divisible by n_grid=10"):
            scheduler.step(output[..., 1:], scheduler.timesteps[0], x)
        with pytest.raises(ValueError, match="must match sample shape"):
            scheduler.step(output[..., 1:, :], scheduler.timesteps[0], x)
        loop(scheduler, x, 2)
        with pytest.raises(RuntimeError, match="after the schedule was exhausted"):
            scheduler.step(output, scheduler.timesteps[-1], x)


def test_its_loop_is_no_table_alone():
    with pytest.raises(ValueError, match="several predictions in one output of the model"):
        fused.step_table(diffusers.PiflowScheduler(), 4)


def test_attributes_that_are_changed_by_hand_are_noticed():
    ours, theirs = pair(NAME)
    for change in ({"num_policy_substeps": 9}, {"n_grid": 4}, {"eps": 0.1}):
        for scheduler in (ours, theirs):
            vars(scheduler).update(change)
        got, expected = (loop(each, randn(*SHAPE)) for each in (ours, theirs))
        assert error(got, [x.double() for x in expected]) < 5e-6


@pytest.mark.parametrize("in_place", [False, True])
def test_raw_times_that_are_changed_by_hand_are_noticed(in_place):
    """Before the second loop over the same steps, and in its middle."""
    results = []
    for scheduler in pair(NAME):
        loop(scheduler, randn(*SHAPE))
        scheduler.set_timesteps(4)
        x = randn(*SHAPE)
        for number, t in enumerate(scheduler.timesteps):
            if number in (0, 2) and in_place:
                scheduler._piflow_raw_timesteps.mul_(0.9)
            elif number in (0, 2):
                scheduler._piflow_raw_timesteps = scheduler._piflow_raw_timesteps * 0.9
            x = scheduler.step(velocities(x, t, 10), t, x).prev_sample
        results.append([x.double()])
    assert error(*results) < 5e-6
