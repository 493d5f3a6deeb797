"""What a step leaves in inference mode serves recorded ones: memory, and what was copied to a device."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, ClassifierFree, Momentum, Normalized, guided_step, log_prob_of
from tests.step.test_gradients import BOTH, SCHEDULE

TABLE, NOISY, CALL = fastguide.ddim(SCHEDULE, 6), fastguide.ddpm(SCHEDULE, 6), 2
META = torch.device("meta")
KINDS = {
    "free": ClassifierFree,
    "rescaled": lambda s: ClassifierFree(s, guidance_rescale=0.7),
    "projected": lambda s: AdaptiveProjected(s, norm_threshold=2.0),
    "of groups": lambda s: Normalized(s, dim=1),
    "of groups apart": lambda s: Normalized(s, dim=(1, 3)),
    "with momentum": lambda s: AdaptiveProjected(s, momentum=-0.5),
}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_there_and_then_a_recorded_one(kind, backend, generator):
    """The gradients are those of guidance that has made no step, also of its log-probability and its scale."""
    x, uncond, cond, z = torch.randn(4, 2, 3, 4, 4, generator=generator).unbind(0)
    found = []
    for first in (True, False):
        scale = torch.tensor(3.0, requires_grad=True)
        leaf, guidance = cond.clone().requires_grad_(), KINDS[kind](scale)
        options = {"backend": backend}
        if kind == "with momentum":
            options["momentum"] = Momentum(NOISY, guidance, x)
        if first:
            with torch.inference_mode():
                guided_step(NOISY, CALL, x, [uncond, cond], guidance, noise=z, return_log_prob=True, **options)
                if "momentum" in options:
                    options["momentum"].restart()
        sample = guided_step(NOISY, CALL, x, [uncond, leaf], guidance, noise=z, **options)
        if "momentum" in options:
            options["momentum"].restart()
        value = log_prob_of(NOISY, CALL, x, [uncond, leaf], guidance, z, **options)
        found.append(torch.autograd.grad(sample.square().sum() + value.sum(), [leaf, scale]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_momentum_begins_there_after_a_recorded_loop():
    x, uncond, cond = torch.randn(3, 2, 3, 4, 4).unbind(0)
    guidance = AdaptiveProjected(3.0, momentum=-0.5)
    with torch.inference_mode():
        momentum = Momentum(TABLE, guidance, x)
    guided_step(TABLE, 0, x, [uncond, cond.requires_grad_()], guidance, momentum=momentum).sum().backward()
    with torch.inference_mode():
        guided_step(TABLE, 0, x, [uncond, cond], guidance, momentum=momentum.restart())
    assert not momentum.restart().values.any()
    guided_step(TABLE, 0, x, [uncond, cond], guidance, momentum=momentum).sum().backward()


@pytest.mark.parametrize("make", [ClassifierFree, AdaptiveProjected])
def test_a_scale_made_there_is_used(make):
    """torch counts no changes of it, and so no guidance waits for one."""
    x, uncond, cond = torch.randn(3, 2, 3, 4, 4).unbind(0)
    expected = guided_step(TABLE, CALL, x, [uncond, cond], make(3.0))
    with torch.inference_mode():
        scale = torch.tensor(3.0, requires_grad=True)
        assert torch.equal(guided_step(TABLE, CALL, x, [uncond, cond], make(scale)), expected)


def test_what_is_copied_to_a_device_there_can_be_recorded():
    scale = torch.tensor(3.0, requires_grad=True)
    constants, made_by = ClassifierFree(scale), AdaptiveProjected(scale).weights_from
    with torch.inference_mode():
        constants.weights(META, torch.float32)
        made_by.on(META)
        rows = TABLE.to(META).device_rows(None, torch.float32)
    weights, (program, parameters) = constants.weights(META, torch.float32), made_by.on(META)
    assert not any(tensor.is_inference() for tensor in (weights, program, parameters, rows))
    assert weights.requires_grad
    assert parameters.requires_grad
