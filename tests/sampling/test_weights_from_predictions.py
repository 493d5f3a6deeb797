"""Guidance whose weights are made from each step's predictions, in the loop: beside plain torch in float64."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Guidance, Sampler, portable_noise
from tests.support.recorded_graph import recorded  # noqa: F401

SCHEDULE = fastguide.NoiseSchedule.linear()
SHAPE = (3, 2, 4, 5)
COND, UNCOND = torch.tensor([1.0, -0.5, 0.3]), torch.zeros(3)
CONDITIONS = {"cond": COND, "uncond": UNCOND}
SCALE = 6.0
TABLE, NOISY = fastguide.ddim(SCHEDULE, 6), fastguide.ddpm(SCHEDULE, 6)


def rescaled_weights(predictions):
    """Lin et al. 2024, section 3.4: the guided prediction gets the conditional one's standard deviation."""
    uncond, cond = predictions
    guided = uncond + SCALE * (cond - uncond)
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    return torch.stack([(1 - SCALE) * ratio, SCALE * ratio], 1)


RESCALED = Guidance.from_predictions(rescaled_weights, 2)


def model(x, t, y):
    return 0.3 * torch.tanh(x + torch.sin(t / 300).reshape(-1, 1, 1, 1) + y.reshape(-1, 1, 1, 1))


def randn(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def by_hand(x, conditions=(UNCOND, COND), scales=(0.0,) * 6, gradient=None):
    """DDIM in float64, with a gradient's scale for each step."""
    x = x.double()
    for i, t in enumerate(TABLE.host_timesteps):
        a = SCHEDULE.alphas_cumprod[t]
        following = TABLE.host_timesteps[i + 1 : i + 2]
        a_next = SCHEDULE.alphas_cumprod[following[0]] if following else torch.ones((), dtype=torch.float64)
        uncond, cond = (model(x, torch.full((len(x),), t), y.double()) for y in conditions)
        guided = uncond + SCALE * (cond - uncond)
        epsilon = guided * cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        if gradient is not None:
            scale = torch.as_tensor(scales[i], dtype=torch.float64).reshape(-1, 1, 1, 1)
            epsilon = epsilon - (1 - a).sqrt() * scale * gradient(x, t)
        x = a_next.sqrt() * (x - (1 - a).sqrt() * epsilon) / a.sqrt() + (1 - a_next).sqrt() * epsilon
    return x


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("cuda_graph", ["auto", "loop", False])
def test_rescaled_guidance_is_the_loop_by_hand(cuda_graph, batched, recorded):  # noqa: F811
    sampler = Sampler(model, TABLE, RESCALED, batched=batched, cuda_graph=cuda_graph)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        conditions = {name: condition.to(dtype) for name, condition in CONDITIONS.items()}
        for seed in range(2):
            x = randn(dtype) + seed
            torch.testing.assert_close(sampler(x, **conditions).double(), by_hand(x), rtol=tolerance, atol=tolerance)
    assert recorded.captured == (0 if cuda_graph is False else 2)


SCALES = {  # of a classifier's gradient
    "one": (1.5, [1.5] * 6),
    "of each sample": ([0.5, 1.0, 2.0], [[0.5, 1.0, 2.0]] * 6),
    "of each step": (torch.arange(6.0).reshape(6, 1), list(range(6))),
    "of both": (torch.arange(18.0).reshape(6, 3), torch.arange(18.0).reshape(6, 3).tolist()),
}


@pytest.mark.parametrize("cuda_graph", ["auto", False])
@pytest.mark.parametrize("scale", SCALES)
def test_a_classifier_has_the_scale_of_its_step(scale, cuda_graph, recorded):  # noqa: F811
    given, scales = SCALES[scale]
    guidance = RESCALED + Classifier(grad_fn=lambda x, t: 0.1 * torch.cos(x), guidance_scale=given)
    sampler = Sampler(model, TABLE, guidance, cuda_graph=cuda_graph)
    expected = by_hand(randn(), scales=scales, gradient=lambda x, t: 0.1 * torch.cos(x))
    for _ in range(2):
        torch.testing.assert_close(sampler(randn(), **CONDITIONS).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("with_classifier", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_slots_are_each_request_alone(captured, with_classifier, request):
    if captured:
        request.getfixturevalue("recorded")

    def guidance(number):
        if not with_classifier:
            return RESCALED
        scales = torch.arange(6.0).reshape(6, 1) + number
        return RESCALED + Classifier(grad_fn=gradient, guidance_scale=scales)

    def gradient(x, t):
        return 0.1 * torch.cos(x)

    sampler = Sampler(model, NOISY, guidance(0), cuda_graph="auto" if captured else False)
    slots, finished, numbers = sampler.slots(2), {}, {}
    waiting = list(range(4))
    while waiting or slots.active:
        while waiting and slots.free:
            number = waiting.pop(0)
            slot = slots.admit(
                portable_noise([number], (1, *SHAPE[1:])), cond=torch.tensor([number / 3]), uncond=torch.zeros(1),
                seed=number, guidance=guidance(number),
            )  # fmt: skip
            numbers[slot] = number
        for slot, x_0 in slots.step().items():
            finished[numbers[slot]] = x_0
    for number, x_0 in finished.items():
        alone = Sampler(model, NOISY, guidance(number), cuda_graph=False)
        expected = alone(
            portable_noise([number], (1, *SHAPE[1:])), cond=torch.tensor([number / 3]), uncond=torch.zeros(1),
            seeds=[number],
        )  # fmt: skip
        torch.testing.assert_close(x_0, expected, rtol=1e-5, atol=1e-5)


def test_other_functions_have_states_of_their_own(recorded):  # noqa: F811
    sampler = Sampler(model, TABLE, RESCALED)
    first = sampler(randn(), **CONDITIONS)
    sampler.guidance = ClassifierFree(SCALE)
    assert not torch.allclose(sampler(randn(), **CONDITIONS), first)
    sampler.guidance = Guidance.from_predictions(lambda p: 0.5 * rescaled_weights(p), 2)
    assert not torch.allclose(sampler(randn(), **CONDITIONS), first)
    assert recorded.captured == 3
    sampler.guidance = Guidance.from_predictions(rescaled_weights, 2)  # the same function
    assert torch.equal(sampler(randn(), **CONDITIONS), first)
    assert recorded.captured == 3


def test_the_unconditional_prediction_cannot_be_left_out():
    sampler = Sampler(model, TABLE, RESCALED, skip_unconditional=True)
    with pytest.raises(
        ValueError, match="skip_unconditional: expected constant weights, or guidance within an interval, got"
    ):
        sampler(randn(), **CONDITIONS)


def test_weights_of_another_shape_are_refused():
    sampler = Sampler(model, TABLE, Guidance.from_predictions(lambda predictions: torch.ones(3), 2))
    with pytest.raises(ValueError, match=r"weights_from: expected it to return shape \(3, 2\), got shape \(3,\)"):
        sampler(randn(), **CONDITIONS)
