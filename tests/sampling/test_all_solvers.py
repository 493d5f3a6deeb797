"""The loop with every solver: where it starts, image-to-image, inpainting, and samples at their own steps."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from fastguide import FlowSchedule, NoiseSchedule, Sampler

SCHEDULE = NoiseSchedule.scaled_linear()
FLOW = FlowSchedule(shift=3.0)
TABLES = {
    "ddim": fastguide.ddim(SCHEDULE, 6),
    "flow": fastguide.flow_match_euler(FlowSchedule(shift=3.0), 6),
    "flow stochastic": fastguide.flow_match_euler(FlowSchedule(), 6, stochastic=True),
    "flow sde": fastguide.flow_match_sde(FlowSchedule(), 6),
    "flow inverted": fastguide.flow_match_euler(FlowSchedule(invert_sigmas=True), 6),
    "euler": fastguide.euler(SCHEDULE, 6, timestep_spacing="leading"),
    "euler v churn": fastguide.euler(SCHEDULE, 6, prediction_type="v_prediction", s_churn=3.0, sigma_spacing="karras"),
    "euler ancestral": fastguide.euler_ancestral(SCHEDULE, 6),
    "edm": fastguide.edm_euler(6),
    "lcm": fastguide.lcm(SCHEDULE, 6),
    "tcd": fastguide.tcd(SCHEDULE, 6),
    "cogvideox": fastguide.cogvideox_ddim(SCHEDULE, 6),
    "consistency": fastguide.consistency(6),
    "heun": fastguide.heun(SCHEDULE, 6, sigma_spacing="karras"),
    "flow heun": fastguide.flow_match_heun(FlowSchedule(), 6),
    "flow heun churn": fastguide.flow_match_heun(FlowSchedule(), 6, s_churn=2.0),
    "dpm2": fastguide.dpm2(SCHEDULE, 6),
    "dpm2 ancestral": fastguide.dpm2(SCHEDULE, 6, ancestral=True, timestep_spacing="trailing"),
    "dpm++ 2m": fastguide.dpm_solver(SCHEDULE, 6),
    "dpm++ 3m flow": fastguide.dpm_solver(FLOW, 6, solver_order=3),
    "dpm++ 2m sde": fastguide.dpm_solver(SCHEDULE, 6, algorithm_type="sde-dpmsolver++"),
    "dpm++ 2s": fastguide.dpm_solver_singlestep(SCHEDULE, 6),
    "dpm++ 2s sde": fastguide.dpm_solver_singlestep(SCHEDULE, 6, algorithm_type="sde-dpmsolver++"),
    "unipc 2 flow": fastguide.unipc(FLOW, 6),
    "unipc 3": fastguide.unipc(SCHEDULE, 6, solver_order=3),
    "deis": fastguide.deis(SCHEDULE, 6),
    "lms": fastguide.lms(SCHEDULE, 6),
    "pndm": fastguide.pndm(SCHEDULE, 6),
    "sa": fastguide.sa_solver(SCHEDULE, 6),
    "edm dpm++": fastguide.edm_dpm_solver(6),
    "cogvideox dpm": fastguide.cogvideox_dpm(SCHEDULE, 6),
}
HISTORY = [name for name, table in TABLES.items() if table.history_slots]
SHAPE = (2, 3, 4, 4)


def model(x, t, y):
    return torch.tanh(0.5 * x + y.reshape(-1, 1, 1, 1) + 0.001 * t.reshape(-1, 1, 1, 1))


def randn(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def sampler(table):
    return Sampler(model, table, fastguide.ClassifierFree(3.0), timestep_dtype=torch.float32)


CONDITIONS = {"cond": torch.ones(2), "uncond": torch.zeros(2), "seeds": [4, 5]}


def by_hand(table, x, image=None, mask=None, x_T=None):
    """The table's steps on a sample in float64 by the reference, inputs scaled here."""
    x, seeds = x.double(), torch.tensor(CONDITIONS["seeds"])
    history = fastguide.History(table, x) if table.history_slots else None
    inpainting = None if mask is None else fastguide.Inpainting(mask.expand(SHAPE).contiguous(), image, x_T)
    for call, t in enumerate(table.host_timesteps):
        given, told = (table.in_scales[call] * x).float(), torch.full((2,), t)
        predictions = [model(given, told, torch.full((2,), y)).double() for y in (0.0, 1.0)]
        noise = fastguide.portable_noise(seeds, SHAPE, step=call).double()
        x = fastguide.guided_step(
            table, call, x, predictions, fastguide.ClassifierFree(3.0), noise=noise, inpainting=inpainting,
            history=history, backend="reference",
        )  # fmt: skip
    return x


@pytest.mark.parametrize("name", TABLES)
def test_noise_begins_at_its_standard_deviation(name):
    table, x_T = TABLES[name], randn(0)
    got = sampler(table)(x_T, **CONDITIONS)
    torch.testing.assert_close(got.double(), by_hand(table, table.init_noise_sigma * x_T), rtol=1e-3, atol=1e-3)
    assert torch.equal(x_T, randn(0))


@pytest.mark.parametrize("name", TABLES)
def test_image_to_image_begins_at_the_level(name):
    table, image, x_T = TABLES[name], randn(1), randn(0)
    later = table.maker(3) if table.history_slots else table[3:]
    got = sampler(table).trajectory(x_T, image=image, strength=0.5, **CONDITIONS)
    alpha, sigma = (values[0].item() for values in later.levels)
    torch.testing.assert_close(got.samples[0], alpha * image + sigma * x_T)
    assert len(got.originals) == len(later)
    torch.testing.assert_close(got.sample.double(), by_hand(later, got.samples[0]), rtol=1e-3, atol=1e-3)
    again = sampler(table)(x_T, image=image, strength=0.5, **CONDITIONS)
    assert torch.equal(again, got.sample)


@pytest.mark.parametrize("name", TABLES)
def test_the_known_part_of_an_image_is_the_image(name):
    table, image, x_T, mask = TABLES[name], randn(1), randn(0), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    result = sampler(table).trajectory(x_T, image=image, mask=mask, **CONDITIONS)
    assert torch.equal(result.sample[..., 2:], image[..., 2:])
    begin = table.init_noise_sigma if table.init_noise_sigma != 1 else math.hypot(*(v[0].item() for v in table.levels))
    torch.testing.assert_close(result.samples[0], begin * x_T)
    expected = by_hand(table, begin * x_T, image, mask, x_T)
    torch.testing.assert_close(result.sample.double(), expected, rtol=1e-3, atol=1e-3)
    level = [values[2].item() for values in table.levels]
    if name != "consistency":  # which is noised to the square root of sigma^2 - sigma_min^2
        between = level[0] * image + level[1] * x_T
        torch.testing.assert_close(result.samples[2][..., 2:], between[..., 2:])


@pytest.mark.parametrize("name", [name for name in TABLES if name not in HISTORY])
def test_a_slice_takes_a_sample_at_its_level(name):
    table = TABLES[name]
    assert table[2:].init_noise_sigma == 1.0
    assert table[:4].init_noise_sigma == table.init_noise_sigma
    whole = sampler(table).trajectory(randn(0), **CONDITIONS)
    if not table.adds_noise_anywhere:  # seeds count from the first step of a call
        torch.testing.assert_close(sampler(table[2:])(whole.samples[2], **CONDITIONS), whole.sample)


@pytest.mark.parametrize("name", HISTORY)
def test_a_table_with_a_history_is_not_sliced_but_made_again(name):
    table = TABLES[name]
    begins = sum(table.completes_step[:4])
    with pytest.raises(ValueError, match=f"a table that its solver makes with begin={begins}"):
        table[4:]
    later = table.maker(2)
    assert (later.init_noise_sigma, later.steps) == (1.0, table.steps - 2)
    assert later.host_timesteps[-3:] == table.host_timesteps[-3:]
    assert table.maker(1).maker(1).rows.equal(later.rows)


@pytest.mark.parametrize("name", TABLES)
def test_slots_begin_as_the_sampler_does(name):
    table, x_T = TABLES[name], randn(0)
    alone = {"cond": torch.ones(1), "uncond": torch.zeros(1)}
    expected = sampler(table)(x_T, **CONDITIONS)
    slots = sampler(table).slots(2)
    places = [
        slots.admit(x_T[i : i + 1], **alone, seed=CONDITIONS["seeds"][i] if table.adds_noise_anywhere else None)
        for i in range(2)
    ]
    finished = {}
    while slots.active:
        finished |= slots.step()
    for i, place in enumerate(places):
        torch.testing.assert_close(finished[place], expected[i : i + 1], rtol=1e-4, atol=1e-4)


def test_requests_of_several_solvers_share_a_batch():
    """Samples at different rows of different tables, which read one to three slots, or none."""
    names = ["unipc 3", "dpm++ 2m", "ddim", "dpm++ 2s sde", "pndm"]
    alone = {"cond": torch.ones(1), "uncond": torch.zeros(1)}
    slots, finished, waiting, place_of = sampler(TABLES["unipc 3"]).slots(2), {}, list(names), {}
    while waiting or slots.active:
        if waiting and slots.free:
            name = waiting.pop(0)
            seed = 7 if TABLES[name].adds_noise_anywhere else None
            place_of[slots.admit(randn(1)[:1], **alone, table=TABLES[name], seed=seed)] = name
        for place, sample in slots.step().items():
            finished[place_of[place]] = sample
    for name in names:
        x_T = randn(1)[:1].expand(2, -1, -1, -1).contiguous()
        expected = sampler(TABLES[name])(x_T, cond=torch.ones(2), uncond=torch.zeros(2), seeds=[7, 7])
        torch.testing.assert_close(finished[name], expected[:1], rtol=1e-4, atol=1e-4)
