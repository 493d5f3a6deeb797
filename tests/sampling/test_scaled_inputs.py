"""Tables whose model input is another tensor than the sample: Euler's method on EDM's levels, beside a loop by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastguide import ClassifierFree, Sampler, StepTable
from fastguide.schedules.levels import Levels
from tests.support.recorded_graph import recorded  # noqa: F401

SIGMAS = (20.0, 9.0, 4.0, 1.5, 0.6, 0.2, 0.0)
SHAPE = (3, 2, 4, 5)
COND, UNCOND = torch.tensor([1.0, -0.5, 0.3]), torch.zeros(3)


def in_scale(sigma):
    """Karras et al. 2022, table 1: c_in of data with the variance 1."""
    return 1 / math.sqrt(sigma**2 + 1)


def euler_table(**options):
    """x' = x + (sigma' - sigma) * epsilon, in the sample's own scale: x = x_0 + sigma * z; timesteps are log sigma."""
    now, after = torch.tensor([SIGMAS[:-1], SIGMAS[1:]], dtype=torch.float64)
    columns = {
        "out_sample": torch.ones_like(now),
        "out_pred": after - now,
        "x0_sample": torch.ones_like(now),
        "x0_scale": torch.ones_like(now),
        "x0_pred": -now,
        "in_scale": (after.square() + 1).rsqrt(),
        "known_sample": torch.ones_like(now),
        "known_noise": after,
    }
    return StepTable.from_columns(
        now.log(), columns, levels=Levels(torch.ones_like(now), now), first_in_scale=in_scale(SIGMAS[0]), **options
    )


EULER = euler_table(name="euler")


def model(x, t, y=None):
    shift = torch.sin(t).reshape(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x + shift + (0.0 if y is None else y.reshape(-1, *[1] * (x.dim() - 1))))


def randn(seed=0, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(x, begin=0, scale=None, after=None):
    """From the sample of call ``begin`` on, in float64: the samples after each call."""
    x, samples = x.double(), []
    for sigma, lower in zip(SIGMAS[begin:-1], SIGMAS[begin + 1 :], strict=True):
        t = torch.full((len(x),), math.log(sigma), dtype=torch.float64)
        if scale is None:
            prediction = model(in_scale(sigma) * x, t)
        else:
            uncond, cond = (model(in_scale(sigma) * x, t, y.double()) for y in (UNCOND, COND))
            prediction = uncond + scale * (cond - uncond)
        x = x + (lower - sigma) * prediction
        x = x if after is None else after(x, lower)
        samples.append(x)
    return samples


def close(got, expected, tolerance=2e-5):
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def sampler(guidance=None, table=EULER, **options):
    return Sampler(model, table, guidance, **options)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("cuda_graph", ["auto", "loop", False])
def test_euler_is_the_loop_by_hand(cuda_graph, scale, batched, recorded):  # noqa: F811
    x_T = SIGMAS[0] * randn()
    guided = None if scale is None else ClassifierFree(scale)
    options = {} if scale is None else {"cond": COND, "uncond": UNCOND}
    sample = sampler(guided, batched=batched, cuda_graph=cuda_graph)
    for _ in range(2):
        close(sample(x_T, **options), by_hand(x_T, scale=scale)[-1])
    if cuda_graph != "loop":
        _, samples, originals = sample.trajectory(x_T, **options)
        expected = torch.stack([x_T.double(), *by_hand(x_T, scale=scale)])
        close(samples, expected)
        assert originals.shape == (len(EULER), *SHAPE)
        close(originals[-1], expected[-1])  # down to sigma = 0


def test_the_model_s_input_is_rounded_once():
    seen = []

    def spy(x, t):
        seen.append(x.clone())
        return 0.1 * x

    x_T = SIGMAS[0] * randn()
    _, samples, _ = Sampler(spy, EULER, dtype=torch.bfloat16).trajectory(x_T)
    for x, sample, sigma in zip(seen, samples, SIGMAS, strict=False):
        assert torch.equal(x, (sample * in_scale(sigma)).bfloat16())


@pytest.mark.parametrize("strength", [0.0, 0.34, 0.5, 1.0])
def test_image_to_image_noises_to_the_level(strength):
    image, noise = randn(1), randn(2)
    got = sampler()(noise, image=image, strength=strength)
    begin = 6 - int(6 * strength)
    if begin == 6:
        assert torch.equal(got, image)
    else:
        close(got, by_hand(image + SIGMAS[begin] * noise, begin)[-1])


def test_inpainting_knows_the_image_at_every_level():
    image, noise, mask = randn(1), randn(2), (randn(3) > 0).float()

    def known(x, sigma):
        return mask * x + (1 - mask) * (image.double() + sigma * noise)

    got = sampler()(noise, image=image, mask=mask)
    close(got, by_hand(math.hypot(1.0, SIGMAS[0]) * noise, after=known)[-1])
    assert torch.equal(got[mask == 0], image[mask == 0])


@pytest.mark.parametrize("guidance", [None, ClassifierFree(2.0)])
def test_a_callback_s_sample_is_scaled_for_the_model(guidance):
    def clamp(call, timestep, sample):
        sample.clamp_(-2.0, 2.0)

    x_T = SIGMAS[0] * randn()
    options = {} if guidance is None else {"cond": COND, "uncond": UNCOND}
    expected = by_hand(x_T, scale=None if guidance is None else 2.0, after=lambda x, sigma: x.clamp(-2.0, 2.0))
    close(sampler(guidance)(x_T, **options, callback=clamp), expected[-1])


@pytest.mark.parametrize("guidance", [None, ClassifierFree(2.0)])
def test_slots_scale_each_sample_at_its_own_call(guidance):
    scale = None if guidance is None else 2.0
    slots = sampler(guidance).slots(3)
    expected, finished = {}, {}
    for number in range(3):
        x = SIGMAS[number] * randn()[number : number + 1]
        alone = {} if guidance is None else {"cond": COND[:1], "uncond": UNCOND[:1]}
        expected[slots.admit(x, **alone, table=EULER[number:])] = (
            sampler(guidance, EULER[number:])(x, **alone),
            None if scale else by_hand(x, number)[-1],
        )
        finished |= slots.step()
    while slots.active:
        finished |= slots.step()
    for slot, (alone, hand) in expected.items():
        torch.testing.assert_close(finished[slot], alone)
        if hand is not None:
            close(finished[slot], hand)


def test_scaled_and_unscaled_tables_have_states_of_their_own():
    plain = StepTable.from_columns(EULER.timesteps, {"out_sample": torch.full((6,), 0.5, dtype=torch.float64)})
    both = sampler(table=plain)
    x_T = randn()
    first = both(x_T)
    both.table = EULER
    close(both(x_T), by_hand(x_T)[-1])
    both.table = plain
    assert torch.equal(both(x_T), first)


def test_real_timesteps_are_refused_for_a_model_of_whole_ones():
    whole = Sampler(model, EULER, timestep_dtype=torch.int64)
    for use in (whole, whole.slots(2).admit):
        with pytest.raises(ValueError, match=r"timestep_dtype: expected torch\.float32 for a table of real timesteps"):
            use(randn()[:1])


def test_trajectories_and_progress_count_calls_and_strength_counts_steps(capsys):
    """Of a solver that calls the model twice a step."""
    twice = euler_table(name="two calls a step", completes_step=[False, True] * 3)
    assert (len(twice), twice.steps) == (6, 3)
    calls = []
    result = sampler(table=twice).trajectory(
        randn(), progress=True, callback=lambda call, timestep, x: calls.append(call)
    )
    assert calls == list(range(6))
    assert result.samples.shape[0] == 7
    assert result.originals.shape[0] == 6
    assert "6/6" in capsys.readouterr().err
    image, noise = randn(1), randn(2)
    for strength, begin in ((0.3, 6), (0.34, 4), (0.5, 4), (0.67, 2), (1.0, 0)):
        got = sampler(table=twice).trajectory(noise, image=image, strength=strength)
        assert len(got.originals) == 6 - begin, strength
        if begin < 6:
            close(got.samples[0], (image + SIGMAS[begin] * noise).double())


def test_a_table_without_levels_has_no_image_to_image():
    plain = StepTable.from_columns(torch.tensor([1, 0]), {"out_sample": torch.ones(2, dtype=torch.float64)})
    with pytest.raises(ValueError, match="table: expected one whose levels are known, such as ddim's, with image="):
        Sampler(model, plain)(randn(), image=randn(1), strength=0.5)
