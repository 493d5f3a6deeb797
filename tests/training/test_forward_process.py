"""Forward noising and conversions of predictions, against formulas written out here."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastguide
from tests.support.cases import PREDICTION_TYPES, SCHEDULE


@pytest.fixture
def data(generator):
    return torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("timestep", [0, 500, 999, torch.tensor(7), torch.tensor([0, 3, 998, 999])])
def test_add_noise_is_the_forward_process(timestep, data, backend):
    original, noise = data
    before = original.clone()
    got = fastguide.add_noise(SCHEDULE, original, timestep, noise, backend=backend)
    a = SCHEDULE.alphas_cumprod[timestep].reshape(-1, 1, 1)
    torch.testing.assert_close(got, a.sqrt() * original + (1 - a).sqrt() * noise, rtol=1e-13, atol=1e-13)
    assert torch.equal(original, before)


def test_add_noise_draws_torch_randn(data):
    original = data[0].float()
    ours, theirs = (torch.Generator().manual_seed(4) for _ in range(2))
    got = fastguide.add_noise(SCHEDULE, original, torch.tensor([1, 2, 3, 4]), generator=ours)
    noise = torch.randn(original.shape, generator=theirs)
    assert torch.equal(got, fastguide.add_noise(SCHEDULE, original, torch.tensor([1, 2, 3, 4]), noise))


def all_predictions(x, original, epsilon, a):
    return {
        "epsilon": epsilon,
        "sample": original,
        "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * original,
        "score": -epsilon / (1 - a).sqrt(),
    }


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTION_TYPES, repeat=2)))
def test_every_conversion_at_every_timestep(source, target, data, backend):
    original, epsilon = data
    timesteps = torch.tensor([0, 20, 500, 999])
    a = SCHEDULE.alphas_cumprod[timesteps].reshape(-1, 1, 1)
    x = a.sqrt() * original + (1 - a).sqrt() * epsilon
    predictions = all_predictions(x, original, epsilon, a)
    got = fastguide.convert_prediction(SCHEDULE, x, timesteps, predictions[source], source, target, backend=backend)
    torch.testing.assert_close(got, predictions[target], rtol=1e-9, atol=1e-9)


def test_conversions_at_zero_signal_that_are_defined(data):
    """At abar = 0 the sample is noise: v says x_0 and epsilon, and x_0 says epsilon."""
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    original, x = data
    v = -original
    for source, prediction in (("v_prediction", v), ("sample", original)):
        for target, expected in (("epsilon", x), ("sample", original), ("v_prediction", v), ("score", -x)):
            got = fastguide.convert_prediction(schedule, x, 999, prediction, source, target)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_conversions_of_a_schedule_with_zero_signal_work_where_there_is_signal(data):
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    original, noise = data
    x = fastguide.add_noise(schedule, original, 500, noise)
    back = fastguide.convert_prediction(schedule, x, 500, noise, "epsilon", "sample")
    torch.testing.assert_close(back, original, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="got 999: the schedule has zero signal there, where epsilon does not"):
        fastguide.convert_prediction(schedule, x, torch.tensor([0, 1, 2, 999]), noise, "epsilon", "sample")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", [SCHEDULE, SCHEDULE.rescale_zero_terminal_snr()])
def test_training_target_is_the_prediction_of_a_perfect_model(schedule, prediction_type, data, backend):
    original, noise = data
    timesteps = torch.tensor([0, 20, 500, 999])
    a = schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1)
    got = fastguide.training_target(schedule, original, timesteps, noise, prediction_type, backend=backend)
    expected = all_predictions(None, original, noise, a)[prediction_type]
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_training_target_loses_nothing_in_low_precision(data):
    """x_0 is x_0: not what is left of it after noising and dividing by sqrt(abar)."""
    original, noise = (d.bfloat16() for d in data)
    timesteps = torch.tensor([0, 20, 500, 999])
    assert torch.equal(fastguide.training_target(SCHEDULE, original, timesteps, noise, "sample"), original)
    assert torch.equal(fastguide.training_target(SCHEDULE, original, timesteps, noise, "epsilon"), noise)


def test_noising_a_prediction_of_the_noise_gives_the_original_back(data):
    original, noise = data
    for t in (0, 400, 999):
        x = fastguide.add_noise(SCHEDULE, original, t, noise)
        back = fastguide.convert_prediction(SCHEDULE, x, t, noise, "epsilon", "sample")
        torch.testing.assert_close(back, original, rtol=1e-9, atol=1e-9)


def test_add_noise_compiles_once_its_table_is_there():
    schedule = fastguide.NoiseSchedule.linear()

    def noised(x, t, z):
        return fastguide.add_noise(schedule, x, t, z)

    x = torch.randn(2, 3)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="call the function once, with any sample, before compiling"):
        torch.compile(noised, fullgraph=True, backend="eager")(x, torch.tensor([1, 2]), x)
    torch._dynamo.reset()
    expected = noised(x, torch.tensor([1, 2]), x)
    got = torch.compile(noised, fullgraph=True, backend="eager")(x, torch.tensor([1, 2]), x)
    assert torch.equal(got, expected)
    torch._dynamo.reset()
