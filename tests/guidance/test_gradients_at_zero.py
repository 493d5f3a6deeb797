"""Gradients where norms are zero, of predictions that agree or are zero: what is not divided by them passes nothing."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, ClassifierFree, MagnitudeAware, Normalized, Tangential, ZeroStar
from tests.step.test_gradients import BOTH, SCHEDULE

TABLE, CALL = fastguide.ddim(SCHEDULE, 6), 2
KINDS = {
    "a threshold": AdaptiveProjected(7.5, norm_threshold=2.0),
    "a threshold of groups": AdaptiveProjected(7.5, norm_threshold=2.0, norm_dim=1),
    "magnitudes": MagnitudeAware(7.5),
    "rescaled": ClassifierFree(7.5, guidance_rescale=0.7),
    "tangential": Tangential(7.5),
    "normalized": Normalized(7.5, at_most=2.0),
    "zero star": ZeroStar(7.5),
}


def draw(generator):
    """The sample, two predictions, and the gradient that comes."""
    return torch.randn(4, 2, 3, 4, 4, dtype=torch.float64, generator=generator).unbind(0)


def gradients(made, predictions, came):
    leaves = [tensor.requires_grad_() for tensor in predictions]
    return torch.autograd.grad(made(*leaves), leaves, came)


@pytest.mark.parametrize("agree", ["both", "u is 0", "c is 0", "both are 0"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_finite_and_other_samples_have_theirs(kind, agree, generator):
    x, uncond, cond, came = draw(generator)

    def step(u, c):
        return fastguide.guided_step(TABLE, CALL, x, [u, c], KINDS[kind])

    expected = gradients(step, (uncond.clone(), cond.clone()), came)
    first = {"both": cond[1], "c is 0": uncond[1]}.get(agree, torch.zeros_like(cond[1]))
    second = torch.zeros_like(first) if agree in ("c is 0", "both are 0") else cond[1]
    uncond, cond = uncond.clone(), cond.clone()
    uncond[1], cond[1] = first.clone(), second.clone()
    for ours, theirs in zip(gradients(step, (uncond, cond), came), expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dim", [None, (1, 2, 3)])
def test_where_predictions_agree_they_are_those_of_the_formula(dim, backend, generator):
    """Algorithm 1 of APG without the projection that it leaves out, in float64 and by torch's own norm."""
    x, uncond, cond, came = draw(generator)
    cond = cond.clone()
    cond[1] = uncond[1]
    guidance = AdaptiveProjected(7.5, eta=0.0, norm_threshold=2.0, norm_dim=dim)

    def by_hand(u, c):
        shift = c - u
        norm = torch.linalg.vector_norm(shift, dim=(1, 2, 3), keepdim=True)
        shift = shift * torch.where(norm > 2.0, 2.0 / norm.clamp(min=2.0), 1.0)
        axis = c / torch.linalg.vector_norm(c, dim=(1, 2, 3), keepdim=True)
        m = u + 7.5 * (shift - (shift * axis).sum((1, 2, 3), keepdim=True) * axis)
        return fastguide.guided_step(TABLE, CALL, x, m)

    def step(u, c):
        return fastguide.guided_step(TABLE, CALL, x, [u, c], guidance, backend=backend)

    expected = gradients(by_hand, (uncond.clone(), cond.clone()), came)
    for ours, theirs in zip(gradients(step, (uncond.clone(), cond), came), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-12)
