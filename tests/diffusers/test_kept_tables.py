"""A loop's table is kept for later loops over the same steps, and made anew where what it depends on differs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.support.scheduler_pair import COUNTED, SHAPE, fused, pair, randn, set_steps, steps_of


def made(name):
    """Return the drop-in and diffusers' own, which make steps by rows."""
    config = {"PNDMScheduler": {"skip_prk_steps": True}, "DPMSolverSDEScheduler": {"noise_sampler_seed": 3}}
    config["HeliosScheduler"] = {"stages": 1}
    return pair(name, **config.get(name, {}))


def run(scheduler, steps=8, **how):
    """Return the last sample of a loop, and the loop's table."""
    set_steps(scheduler, steps, **how)
    return loop(scheduler)


def loop(scheduler):
    x, generator = randn(*SHAPE), torch.Generator().manual_seed(0)
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    scheduler.is_scale_input_called = True
    for t in steps_of(scheduler):
        x = scheduler.step(torch.tanh(x), t, x, return_dict=False, **options)[0]
    counted = getattr(scheduler, "_counted", None)
    return x, None if counted is None else counted.table


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_a_second_loop_over_the_same_steps_has_the_first_one_s_table(name):
    scheduler, _ = made(name)
    (first, table), (second, same) = run(scheduler), run(scheduler)
    assert table is not None
    assert same is table
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_other_steps_have_another_table_and_both_are_kept(name):
    scheduler, theirs = made(name)
    _, table = run(scheduler)
    got, other = run(scheduler, 5)
    assert len(other) != len(table)
    torch.testing.assert_close(got, run(theirs, 5)[0], rtol=1e-4, atol=1e-4)
    assert run(scheduler)[1] is table


def test_a_flow_shifted_otherwise_has_another_table():
    """set_timesteps writes mu into the configuration, where the loop after finds it."""
    config = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    scheduler, theirs = pair("DPMSolverMultistepScheduler", **config)
    tables = []
    for mu in (0.5, 1.5):
        got, table = run(scheduler, mu=mu)
        torch.testing.assert_close(got, run(theirs, mu=mu)[0], rtol=1e-5, atol=1e-5)
        tables.append(table)
    assert run(scheduler, mu=1.5)[1] is tables[1] is not tables[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("EulerDiscreteScheduler", lambda s: s.sigmas.mul_(0.9)),
        ("EulerDiscreteScheduler", lambda s: s.register_to_config(prediction_type="v_prediction")),
        ("UniPCMultistepScheduler", lambda s: setattr(s, "disable_corrector", [3])),
        ("KDPM2DiscreteScheduler", lambda s: s.sigmas_interpol.mul_(0.9)),
        ("KDPM2AncestralDiscreteScheduler", lambda s: s.sigmas_down.mul_(0.9)),
        ("DPMSolverSinglestepScheduler", lambda s: s.order_list.__setitem__(1, 1)),
        ("SASolverScheduler", lambda s: setattr(s, "tau_func", lambda t: 0.5)),
        ("PNDMScheduler", lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.5))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_rows_depend_on_is_noticed(name, change):
    """Changed between set_timesteps and the first step of the second loop, as a table kept by mistake would miss it."""
    scheduler, theirs = made(name)
    first, table = run(scheduler)
    for each in (scheduler, theirs):
        each.set_timesteps(8)
        change(each)
    (got, another), (expected, _) = loop(scheduler), loop(theirs)
    assert another is not table
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, first, rtol=1e-3, atol=1e-3)


def test_copies_and_pickles_go_on_without_the_tables():
    scheduler, _ = pair("UniPCMultistepScheduler")
    first, table = run(scheduler)
    for other in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        again, another = run(other)
        assert another is not table
        assert torch.equal(again, first)


def test_a_scheduler_keeps_few_tables():
    scheduler, _ = pair("EulerDiscreteScheduler")
    for steps in range(2, 40):
        run(scheduler, steps)
    assert len(scheduler._kept_tables) <= 16


def test_stochastic_steps_are_repeated_with_the_same_noise(monkeypatch):
    """In a later loop, steps are made without a plan, with the generator's next values."""
    from fastguide.diffusers import counted_step

    planned = []
    runs = counted_step.run_counted
    monkeypatch.setattr(counted_step, "run_counted", lambda *a, **k: planned.append(1) or runs(*a, **k))
    scheduler, theirs = pair("EulerAncestralDiscreteScheduler")
    run(scheduler)
    run(scheduler)
    planned.clear()
    got, _ = run(scheduler)
    assert not planned  # nor is the last, whose noise is drawn but not used
    torch.testing.assert_close(got, run(theirs)[0], rtol=1e-5, atol=1e-5)


def test_a_later_loop_begins_without_a_plan(monkeypatch):
    from fastguide.diffusers import counted_step

    planned = []
    runs = counted_step.run_counted
    monkeypatch.setattr(counted_step, "run_counted", lambda *a, **k: planned.append(1) or runs(*a, **k))
    scheduler, theirs = made("EulerDiscreteScheduler")
    for _ in range(2):
        run(scheduler)
    planned.clear()
    got, _ = run(scheduler)
    assert not planned
    torch.testing.assert_close(got, run(theirs)[0], rtol=1e-5, atol=1e-5)
    scheduler.set_timesteps(8)  # but not one with another output
    with pytest.raises(ValueError, match="model_output: expected the sample's batch"):
        scheduler.step(randn(4, 3, 8, 8), scheduler.timesteps[0], randn(*SHAPE))
    got = scheduler.step(randn(*SHAPE).bfloat16(), scheduler.timesteps[0], randn(*SHAPE).bfloat16()).prev_sample
    assert got.dtype == torch.bfloat16
    assert scheduler._counted.state.dtype == torch.float32


def test_a_configuration_in_another_order_is_compared_by_name():
    from fastguide.diffusers.loop_tables import _have_same

    config = dict(fused.EulerDiscreteScheduler().config)
    swapped = {**config, "beta_start": config["beta_end"], "beta_end": config["beta_start"]}
    names = list(config)
    first, second = names.index("beta_start"), names.index("beta_end")
    names[first], names[second] = names[second], names[first]
    assert not _have_same(config, {name: swapped[name] for name in names})
    assert _have_same(config, dict(config))
