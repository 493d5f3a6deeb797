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


def alpha_bar(t):
    """abar at the one timestep of all samples, which may lie between two: log(sigma / alpha) is linear there."""
    log_ratio, low = SCHEDULE.sigmas.log(), int(t[0])
    part = float(t[0]) - low
    between = log_ratio[low] if part == 0 else log_ratio[low] + part * (log_ratio[low + 1] - log_ratio[low])
    return 1 / (1 + (2 * between).exp())


def component_scores(x, t):
    """log density (with its prior) and score of each noised component, at x of shape (n, 2): (n, 3), (n, 3, 2)."""
    a = alpha_bar(t)
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
    root = (1 - alpha_bar(t)).sqrt()
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
GOES_ON = {  # from earlier calls
    "dpm++ 2m": fastguide.dpm_solver(SCHEDULE, 100),
    "dpm++ 3m": fastguide.dpm_solver(SCHEDULE, 100, solver_order=3),
    "dpm++ 2m sde": fastguide.dpm_solver(SCHEDULE, 200, algorithm_type="sde-dpmsolver++"),
    "dpm 2m sde": fastguide.dpm_solver(SCHEDULE, 200, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
    "dpm++ 2s": fastguide.dpm_solver_singlestep(SCHEDULE, 100),
    "dpm++ 2s sde": fastguide.dpm_solver_singlestep(
        SCHEDULE, 800, algorithm_type="sde-dpmsolver++"
    ),  # slow to converge
    "unipc": fastguide.unipc(SCHEDULE, 100),
    "deis": fastguide.deis(SCHEDULE, 100),
    "sa": fastguide.sa_solver(SCHEDULE, 200),
    "sa with all its noise": fastguide.sa_solver(SCHEDULE, 200, tau_func=lambda timestep: 1.0),
    "sa over the noise": fastguide.sa_solver(SCHEDULE, 200, algorithm_type="noise_prediction"),
    "pndm": fastguide.pndm(SCHEDULE, 100),
    "heun": fastguide.heun(SCHEDULE, 100),
    "dpm2": fastguide.dpm2(SCHEDULE, 100),
    "dpm2 ancestral": fastguide.dpm2(SCHEDULE, 200, ancestral=True),
    "lms": fastguide.lms(SCHEDULE, 100),
    "cogvideox dpm": fastguide.cogvideox_dpm(SCHEDULE, 200, prediction_type="epsilon"),
}
LIMIT = 5.0


@pytest.mark.parametrize("name", GOES_ON)
def test_solvers_with_a_history_reach_the_conditional(name):
    table = GOES_ON[name]
    assert moments_in_standard_errors(sample(table, ClassifierFree(1.0), conditional=True)) < LIMIT
    if not table.scales_inputs:  # or the classifier is given the unscaled sample
        guidance = Classifier(grad_fn=classifier_gradient)
        assert moments_in_standard_errors(sample(table, guidance)) < LIMIT


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
