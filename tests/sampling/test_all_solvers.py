"""The loop with every solver: where it starts, image-to-image, inpainting, and samples at their own steps."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from fastguide import FlowSchedule, NoiseSchedule, Sampler

SCHEDULE = NoiseSchedule.scaled_linear()
TABLES = {
    "ddim": fastguide.ddim(SCHEDULE, 6),
    "flow": fastguide.flow_match_euler(FlowSchedule(shift=3.0), 6),
    "flow stochastic": fastguide.flow_match_euler(FlowSchedule(), 6, stochastic=True),
    "flow inverted": fastguide.flow_match_euler(FlowSchedule(invert_sigmas=True), 6),
    "euler": fastguide.euler(SCHEDULE, 6, timestep_spacing="leading"),
    "euler v churn": fastguide.euler(SCHEDULE, 6, prediction_type="v_prediction", s_churn=3.0, sigma_spacing="karras"),
    "euler ancestral": fastguide.euler_ancestral(SCHEDULE, 6),
    "edm": fastguide.edm_euler(6),
    "lcm": fastguide.lcm(SCHEDULE, 6),
    "tcd": fastguide.tcd(SCHEDULE, 6),
    "cogvideox": fastguide.cogvideox_ddim(SCHEDULE, 6),
    "consistency": fastguide.consistency(6),
}
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
    inpainting = None if mask is None else fastguide.Inpainting(mask.expand(SHAPE).contiguous(), image, x_T)
    for call, t in enumerate(table.host_timesteps):
        given, told = (table.in_scales[call] * x).float(), torch.full((2,), t)
        predictions = [model(given, told, torch.full((2,), y)).double() for y in (0.0, 1.0)]
        noise = fastguide.portable_noise(seeds, SHAPE, step=call).double()
        x = fastguide.guided_step(
            table, call, x, predictions, fastguide.ClassifierFree(3.0), noise=noise, inpainting=inpainting,
            backend="reference",
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
    got = sampler(table).trajectory(x_T, image=image, strength=0.5, **CONDITIONS)
    alpha, sigma = (values[3].item() for values in table.levels)
    torch.testing.assert_close(got.samples[0], alpha * image + sigma * x_T)
    assert len(got.originals) == 3


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


@pytest.mark.parametrize("name", TABLES)
def test_a_slice_takes_a_sample_at_its_level(name):
    table = TABLES[name]
    assert table[2:].init_noise_sigma == 1.0
    assert table[:4].init_noise_sigma == table.init_noise_sigma
    whole = sampler(table).trajectory(randn(0), **CONDITIONS)
    if not table.adds_noise_anywhere:  # seeds count from the first step of a call
        torch.testing.assert_close(sampler(table[2:])(whole.samples[2], **CONDITIONS), whole.sample)


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
