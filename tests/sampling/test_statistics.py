"""Guided sampling reaches the exact conditional distribution, where that is known in closed form.

Data: a mixture of Gaussians with a label for each component. Noised, it stays a mixture, so the noise prediction (with
and without the label) and the classifier's gradient are exact; with scale 1 guided sampling must end at the labelled
component. Mean and covariance are compared within five standard errors; a scale wrong by a tenth is more than ten away.
"""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Sampler

SCHEDULE = fastguide.NoiseSchedule.linear()
MEANS = torch.tensor([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.0]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.20, 0.05], [0.05, 0.10]], [[0.10, -0.04], [-0.04, 0.30]], [[0.15, 0.0], [0.0, 0.15]]], dtype=torch.float64
)
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SAMPLES = 8_000
LABEL = 1


def component_scores(x, t):
    """log density (with its prior) and score of each noised component, at x of shape (n, 2): (n, 3), (n, 3, 2)."""
    a = SCHEDULE.alphas_cumprod[t[0]]  # the sampler calls with one timestep for all
    covariance = a * COVARIANCES + (1 - a) * torch.eye(2, dtype=torch.float64)
    centred = x[:, None, :] - a.sqrt() * MEANS
    solved = torch.einsum("kij,nkj->nki", covariance.inverse(), centred)
    log_density = PRIOR.log() - 0.5 * (centred * solved).sum(-1) - 0.5 * covariance.logdet()
    return log_density, -solved


def unconditional_score(x, t):
    log_density, scores = component_scores(x, t)
    return (log_density.softmax(-1)[..., None] * scores).sum(1)


def noise_prediction(x, t, label=None):
    """epsilon = -sqrt(1 - abar) * score; ``label`` -1 is the null condition, one per row."""
    root = (1 - SCHEDULE.alphas_cumprod[t[0]]).sqrt()
    score = unconditional_score(x, t)
    if label is not None:
        conditional = component_scores(x, t)[1][torch.arange(len(x)), label.clamp(min=0)]
        score = torch.where(label[:, None] >= 0, conditional, score)
    return -root * score


def classifier_gradient(x, t):
    """grad_x log p(LABEL | x_t) = score of the component - score of the mixture."""
    return component_scores(x, t)[1][:, LABEL] - unconditional_score(x, t)


def moments_in_standard_errors(samples):
    """Largest deviation of mean and covariance from the labelled component's, in standard errors."""
    mean, covariance = MEANS[LABEL], COVARIANCES[LABEL]
    n = len(samples)
    variances = covariance.diagonal()
    mean_error = (samples.mean(0) - mean) / (variances / n).sqrt()
    covariance_error = (samples.T.cov() - covariance) / (
        (variances[:, None] * variances + covariance.square()) / n
    ).sqrt()
    return max(mean_error.abs().max().item(), covariance_error.abs().max().item())


def sample(table, guidance, *, seed=0, conditional=False):
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(SAMPLES, 2, dtype=torch.float64, generator=generator)
    conditions = {}
    if conditional:
        conditions["cond"] = torch.full((SAMPLES,), LABEL)
        conditions["uncond"] = torch.full((SAMPLES,), -1)
    return Sampler(noise_prediction, table, guidance)(x_T, **conditions, generator=generator)


TABLES = {
    "ddpm": fastguide.ddpm(SCHEDULE, variance_type="fixed_large"),
    "ddim": fastguide.ddim(SCHEDULE, 333, timestep_spacing="trailing"),
    "ddim eta 1": fastguide.ddim(SCHEDULE, 1000, eta=1.0),
}
LIMIT = 5.0


@pytest.mark.parametrize("name", TABLES)
def test_classifier_free_guidance_of_scale_1_reaches_the_conditional(name):
    assert moments_in_standard_errors(sample(TABLES[name], ClassifierFree(1.0), conditional=True)) < LIMIT


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("ddpm", "epsilon"),
        ("ddpm", "mean"),
        ("ddim", "epsilon"),
        ("ddim", "epsilon_after_clip"),
        ("ddim eta 1", "mean"),
    ],
)
def test_classifier_guidance_of_scale_1_reaches_the_conditional(name, form):
    guidance = Classifier(grad_fn=classifier_gradient, form=form)
    assert moments_in_standard_errors(sample(TABLES[name], guidance)) < LIMIT


@pytest.mark.parametrize("scale", [0.0, 0.9, 1.1])
def test_teeth_any_other_scale_is_told_apart(scale):
    assert moments_in_standard_errors(sample(TABLES["ddim"], ClassifierFree(scale), conditional=True)) > LIMIT
    guidance = Classifier(grad_fn=classifier_gradient, guidance_scale=scale)
    assert moments_in_standard_errors(sample(TABLES["ddim"], guidance)) > LIMIT
