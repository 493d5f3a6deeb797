"""The field's own steps: diffusers' guidance and scheduler, and guided-diffusion's formulas, restated here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..workloads import GRADIENT_SCALE, NUM_STEPS, SCHEDULE, STEP, Inputs, NotRunError
from .plain_torch import guided

Call = Callable[[], Tensor]


def scheduler(solver: str, steps: int, device: torch.device, *, ours: bool = False) -> Any:
    """Build diffusers' scheduler for the benchmarks' schedule; with ``ours``, fastguide's in its place."""
    try:
        import diffusers as theirs
    except ImportError:
        raise NotRunError("diffusers is not installed") from None
    library: Any = theirs
    if ours:
        from fastguide import diffusers as fastguides

        library = fastguides
    abar = SCHEDULE.alphas_cumprod
    betas = (1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])).float().numpy()
    config: dict[str, Any] = {"trained_betas": betas, "clip_sample": solver.endswith("clipped")}
    if solver == "ddim":
        found = library.DDIMScheduler(**config)
    else:
        variance = "learned_range" if solver.endswith("learned") else "fixed_small"
        found = library.DDPMScheduler(**config, variance_type=variance)
    found.set_timesteps(steps, device=device)
    return found


def diffusers(i: Inputs) -> Call:
    """Return guidance as pipelines write it and ``scheduler.step``; a gradient is added by hand, as users do."""
    w = i.workload
    theirs = scheduler(w.solver, NUM_STEPS, i.device)
    timestep, generator = theirs.timesteps[STEP], torch.Generator(i.device).manual_seed(0)
    if w.solver == "add_noise":
        return _diffusers_add_noise(theirs, i, timestep, generator)

    # A model returns prediction and variance in one tensor: guidance splits it, and the step takes it whole again
    whole = None if i.variance is None else torch.cat([i.predictions[0], i.variance], 1)

    def step() -> Tensor:
        output = guided(i.predictions)
        if w.form == "epsilon":
            output = output - (1 - theirs.alphas_cumprod[timestep]) ** 0.5 * GRADIENT_SCALE * i.gradient
        if i.variance is not None and whole is not None:
            output = torch.cat([output, i.variance], 1) if w.count > 1 or w.form == "epsilon" else whole
        result: Tensor = theirs.step(output, timestep, i.sample, generator=generator).prev_sample
        if w.form == "mean":
            variance = theirs._get_variance(timestep, predicted_variance=i.variance)
            if i.variance is not None:
                variance = torch.exp(variance)  # diffusers returns the logarithm of a learned variance
            result = result + variance * GRADIENT_SCALE * i.gradient
        return result

    return step


def _diffusers_add_noise(theirs: Any, i: Inputs, timestep: Tensor, generator: torch.Generator) -> Call:
    timesteps = timestep.to(i.device).expand(i.sample.shape[0])

    def noised() -> Tensor:
        noise = torch.randn(i.sample.shape, device=i.device, dtype=i.sample.dtype, generator=generator)
        result: Tensor = theirs.add_noise(i.sample, noise, timesteps)
        return result

    return noised


class GuidedDiffusion:
    """guided-diffusion's ``p_sample``, ``ddim_sample`` and ``q_sample``, less what they compute and do not use.

    Its tables are float64 arrays on the host, and each use uploads one, as there.

    Args:
        abar: the cumulative products at the visited timesteps, in the order of sampling.
        device: where the samples are.
    """

    def __init__(self, abar: Tensor, device: torch.device) -> None:
        before = torch.cat([abar[1:], torch.ones(1, dtype=abar.dtype)])
        beta = 1 - abar / before
        posterior = (1 - before) / (1 - abar) * beta
        tables = {
            "abar": abar,
            "abar_before": before,
            "sqrt_abar": abar.sqrt(),
            "sqrt_one_minus_abar": (1 - abar).sqrt(),
            "sqrt_recip": (1 / abar).sqrt(),
            "sqrt_recipm1": (1 / abar - 1).sqrt(),
            "mean_coef1": beta * before.sqrt() / (1 - abar),
            "mean_coef2": (1 - before) * (abar / before).sqrt() / (1 - abar),
            "variance": posterior,
            "log_variance": posterior.clamp(min=1e-20).log(),
            "log_beta": beta.log(),
        }
        if importlib.util.find_spec("numpy") is None:
            raise NotRunError("numpy is not installed")
        self.device, self.last = device, len(abar) - 1
        self._host = {name: values.numpy() for name, values in tables.items()}

    def _extract(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        values = torch.from_numpy(self._host[name]).to(device=self.device)[t].float()
        return values.reshape(-1, *[1] * (like.dim() - 1)).expand(like.shape)

    def _nonzero(self, t: Tensor, like: Tensor) -> Tensor:
        return (t != self.last).float().view(-1, *[1] * (like.dim() - 1))

    def _original(self, x: Tensor, t: Tensor, epsilon: Tensor, clip: bool) -> Tensor:
        x0 = self._extract("sqrt_recip", t, x) * x - self._extract("sqrt_recipm1", t, x) * epsilon
        return x0.clamp(-1, 1) if clip else x0

    def p_sample(
        self,
        x: Tensor,
        t: Tensor,
        epsilon: Tensor,
        noise: Tensor,
        *,
        variance: Tensor | None = None,
        gradient: Tensor | None = None,
        clip: bool = False,
    ) -> Tensor:
        """Compute a DDPM step, with a classifier's gradient in the mean form."""
        if variance is not None:
            fraction = (variance.float() + 1) / 2
            low, high = self._extract("log_variance", t, x), self._extract("log_beta", t, x)
            log_variance = fraction * high + (1 - fraction) * low
            model_variance = torch.exp(log_variance)
        else:
            model_variance, log_variance = self._extract("variance", t, x), self._extract("log_variance", t, x)
        x0 = self._original(x, t, epsilon, clip)
        mean = self._extract("mean_coef1", t, x) * x0 + self._extract("mean_coef2", t, x) * x
        if gradient is not None:
            mean = mean.float() + model_variance * GRADIENT_SCALE * gradient.float()
        return mean + self._nonzero(t, x) * torch.exp(0.5 * log_variance) * noise

    def ddim_sample(
        self, x: Tensor, t: Tensor, epsilon: Tensor, noise: Tensor, *, gradient: Tensor | None = None
    ) -> Tensor:
        """Compute a DDIM step, with a classifier's gradient in the epsilon form; the noise is multiplied by 0."""
        x0 = self._original(x, t, epsilon, False)
        if gradient is not None:
            epsilon = (self._extract("sqrt_recip", t, x) * x - x0) / self._extract("sqrt_recipm1", t, x)
            epsilon = epsilon - (1 - self._extract("abar", t, x)).sqrt() * GRADIENT_SCALE * gradient.float()
            x0 = self._original(x, t, epsilon, False)
        epsilon = (self._extract("sqrt_recip", t, x) * x - x0) / self._extract("sqrt_recipm1", t, x)
        abar, before = self._extract("abar", t, x), self._extract("abar_before", t, x)
        sigma = 0.0 * torch.sqrt((1 - before) / (1 - abar)) * torch.sqrt(1 - abar / before)
        mean = x0 * torch.sqrt(before) + torch.sqrt(1 - before - sigma**2) * epsilon
        return mean + self._nonzero(t, x) * sigma * noise

    def q_sample(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Add noise to an original sample."""
        return self._extract("sqrt_abar", t, x) * x + self._extract("sqrt_one_minus_abar", t, x) * noise


def guided_diffusion(i: Inputs) -> Call:
    """Return a step of guided-diffusion's loops; classifier-free guidance by hand, as its notebooks do."""
    w = i.workload
    if (w.solver == "ddim" and w.form == "mean") or (w.solver != "ddim" and w.form == "epsilon"):
        raise NotRunError("guided-diffusion adds a gradient to DDPM's mean and to DDIM's epsilon only")
    abar = SCHEDULE.alphas_cumprod[SCHEDULE.timesteps(NUM_STEPS)]
    theirs, generator = GuidedDiffusion(abar, i.device), torch.Generator(i.device).manual_seed(0)
    t = torch.full((i.sample.shape[0],), STEP, device=i.device)

    def step() -> Tensor:
        epsilon = guided([prediction.float() for prediction in i.predictions]) if i.predictions else i.sample
        noise = torch.randn(i.sample.shape, device=i.device, dtype=i.sample.dtype, generator=generator)
        if w.solver == "add_noise":
            return theirs.q_sample(i.sample, t, noise)
        if w.solver == "ddim":
            return theirs.ddim_sample(i.sample, t, epsilon, noise, gradient=i.gradient)
        clip = w.solver.endswith("clipped")
        return theirs.p_sample(i.sample, t, epsilon, noise, variance=i.variance, gradient=i.gradient, clip=clip)

    return step
