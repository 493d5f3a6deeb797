"""Who is timed: fastguide, diffusers, guided-diffusion's formulas, and plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..noise import portable_noise
from ..ops import guided_step
from .workloads import GRADIENT_SCALE, GUIDANCE_SCALE, NUM_STEPS, SCHEDULE, STEP, Inputs

Call = Callable[[], Tensor]


class NotRunError(Exception):
    """Why a contender does not serve a workload here."""


def fastguide(i: Inputs, backend: str | None = None, *, out: bool = False, seeds: bool = False) -> Call:
    """The fused step; into the caller's output, or with the portable stream's noise, where asked."""
    place = torch.empty_like(i.sample) if out else None
    source: dict[str, Any] = {}
    if i.noisy:
        source = {"seeds": _seeds(i)} if seeds else {"generator": torch.Generator(i.device).manual_seed(0)}
    elif seeds:
        raise NotRunError("the step adds no noise")
    options: dict[str, Any] = {"gradient": i.gradient, "variance": i.variance, "out": place, "backend": backend}
    return lambda: guided_step(i.table, STEP, i.sample, i.predictions, i.guidance, **options, **source)


def diffusers(i: Inputs) -> Call:
    """The pipelines' guidance and ``scheduler.step``."""
    scheduler = _scheduler(i, "diffusers")
    timestep, generator = scheduler.timesteps[STEP], torch.Generator(i.device).manual_seed(0)

    def step() -> Tensor:
        output = _combined(i.predictions)
        if i.variance is not None:
            output = torch.cat([output, i.variance], 1)
        result: Tensor = scheduler.step(output, timestep, i.sample, generator=generator).prev_sample
        return result

    return step


def drop_in(i: Inputs) -> Call:
    """fastguide's scheduler in the place of diffusers', with the doubled output as a model returns it."""
    if i.workload.guidance != "classifier-free" or i.variance is not None:
        raise NotRunError("timed with classifier-free guidance and a fixed variance")
    scheduler = _scheduler(i, "fastguide")
    output = torch.cat(i.predictions)
    timestep, generator = scheduler.timesteps[STEP], torch.Generator(i.device).manual_seed(0)

    def step() -> Tensor:
        result: Tensor = scheduler.step(
            output, timestep, i.sample, generator=generator, guidance_scale=GUIDANCE_SCALE
        ).prev_sample
        return result

    return step


def guided_diffusion(i: Inputs) -> Call:
    """guided-diffusion's p_sample restated: float64 tables on the host, of which each use uploads a row."""
    w = i.workload
    if not w.solver.startswith("ddpm") or w.guidance in ("composed", "epsilon gradient"):
        raise NotRunError("its loop is DDPM, unguided, by a classifier's mean form, or classifier-free by hand")
    abar = i.table.alphas_cumprod
    assert abar is not None
    before = torch.cat([abar[1:], torch.ones(1, dtype=abar.dtype)])  # its steps are in falling order here
    beta = 1 - abar / before
    posterior = (1 - before) / (1 - abar) * beta
    tables = {
        "sqrt_recip": (1 / abar).sqrt(),
        "sqrt_recipm1": (1 / abar - 1).sqrt(),
        "mean_coef1": beta * before.sqrt() / (1 - abar),
        "mean_coef2": (1 - before) * (abar / before).sqrt() / (1 - abar),
        "variance": posterior,
        "log_variance": posterior.clamp(min=1e-20).log(),
        "log_beta": beta.log(),
    }
    host = {name: values.numpy() for name, values in tables.items()}
    t = torch.full((i.sample.shape[0],), STEP, device=i.device)
    generator = torch.Generator(i.device).manual_seed(0)

    def extract(name: str) -> Tensor:
        values = torch.from_numpy(host[name]).to(device=i.device)[t].float()
        return values.reshape(-1, *[1] * (i.sample.dim() - 1)).expand(i.sample.shape)

    def step() -> Tensor:
        output = _combined([prediction.float() for prediction in i.predictions])
        if i.variance is not None:
            fraction = (i.variance.float() + 1) / 2
            log_variance = fraction * extract("log_beta") + (1 - fraction) * extract("log_variance")
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = extract("variance"), extract("log_variance")
        x0 = extract("sqrt_recip") * i.sample - extract("sqrt_recipm1") * output
        if w.solver.endswith("clipped"):
            x0 = x0.clamp(-1, 1)
        mean = extract("mean_coef1") * x0 + extract("mean_coef2") * i.sample
        if i.gradient is not None:
            mean = mean.float() + variance * GRADIENT_SCALE * i.gradient.float()
        noise = torch.randn(i.sample.shape, device=i.device, generator=generator)
        nonzero_mask = (t != NUM_STEPS - 1).float().view(-1, *[1] * (i.sample.dim() - 1))
        return mean + nonzero_mask * torch.exp(0.5 * log_variance) * noise

    return step


def torch_eager(i: Inputs, compiled: str | None = None, *, out: bool = False) -> Call:
    """The formula in torch, of the terms that the step has and no others, without synchronisation.

    Eager, with numbers; under torch.compile, with the coefficients in tensors, as numbers would compile each step anew.
    """
    numbers = _row(i)
    row: dict[str, Any] = dict(numbers)
    if compiled is not None:
        row = {name: torch.tensor(value, device=i.device, dtype=torch.float32) for name, value in numbers.items()}
    place = torch.empty_like(i.sample) if out else None
    generator = torch.Generator(i.device).manual_seed(0)

    def formula(noise: Tensor | None, into: Tensor | None, row: dict[str, Any], *tensors: Tensor) -> Tensor:
        sample, *predictions = tensors
        variance = predictions.pop() if i.variance is not None else None
        gradient = predictions.pop() if i.gradient is not None else None
        result = _formula(numbers, row, sample, predictions, gradient, variance, noise)
        return result if into is None else into.copy_(result)

    function = formula
    if compiled is not None:
        mode = None if compiled == "default" else compiled
        function = torch.compile(formula, fullgraph=True, dynamic=False, mode=mode)
    extras = [tensor for tensor in (i.gradient, i.variance) if tensor is not None]

    def step() -> Tensor:
        noise = torch.randn(i.sample.shape, device=i.device, generator=generator) if i.noisy else None
        return function(noise, place, row, i.sample, *i.predictions, *extras)

    return step


def copy(i: Inputs) -> Call:
    """``copy_`` that moves the same bytes: half read, half written. The limit."""
    source = torch.ones(max(i.bytes // 2, 1), dtype=torch.uint8, device=i.device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def noise_alone(i: Inputs) -> Call:
    """torch's own noise, into memory that is there: the limit of whoever keeps its stream."""
    if not i.noisy:
        raise NotRunError("the step adds no noise")
    place, generator = torch.empty_like(i.sample), torch.Generator(i.device).manual_seed(0)
    return lambda: place.normal_(generator=generator)


COMPILE = "default"
CONTENDERS: dict[str, Callable[[Inputs], Call]] = {
    "fastguide": fastguide,
    "fastguide out=": lambda i: fastguide(i, out=True),
    "fastguide out=, seeds=": lambda i: fastguide(i, out=True, seeds=True),
    "fastguide's scheduler": drop_in,
    "diffusers": diffusers,
    "guided-diffusion": guided_diffusion,
    "torch eager": torch_eager,
    "torch.compile": lambda i: torch_eager(i, "default"),
    "torch.compile out=": lambda i: torch_eager(i, "default", out=True),
}


def is_ours(name: str) -> bool:
    """Whether a contender is fastguide, or runs on it: then a failure is one of the run."""
    return name.startswith("Sampler") or "fastguide" in name


SLOW = {"torch.compile max-autotune": lambda i: torch_eager(i, "max-autotune")}
"""In ``--full`` only: a minute of compilation each."""
CEILINGS = {"copy_ of the same bytes": copy, "torch's noise alone": noise_alone}


def relative_error(i: Inputs, name: str, got: Tensor) -> float:
    """Of a contender's result, against the formula in float64 with the noise that it draws."""
    noise = None
    if i.noisy:
        # diffusers draws in the output's dtype, and so does its drop-in
        dtype = i.workload.dtype if name in ("diffusers", "fastguide's scheduler") else torch.float32
        if name.endswith("seeds="):
            noise = portable_noise(_seeds(i), i.sample.shape, step=STEP)
        else:
            generator = torch.Generator(i.device).manual_seed(0)
            noise = torch.randn(i.sample.shape, device=i.device, dtype=dtype, generator=generator)
    row = _row(i)
    double = [None if t is None else t.double() for t in (i.gradient, i.variance, noise)]
    predictions = [prediction.double() for prediction in i.predictions]
    truth = _formula(row, row, i.sample.double(), predictions, *double)
    return float((got.double() - truth).norm() / truth.norm())


def tolerance(i: Inputs, name: str) -> float:
    """What a contender may be off by: diffusers computes in the dtype of the model's output."""
    coarse = name == "diffusers" and i.workload.dtype != torch.float32
    return 3e-2 if coarse else 1e-4 if name in ("diffusers", "fastguide's scheduler") else 1e-5


_COMPOSED = (GUIDANCE_SCALE, 2.0, -1.0)


def _form(i: Inputs) -> Any:
    return None if i.guidance is None else i.guidance.form


def _seeds(i: Inputs) -> Tensor:
    return torch.arange(i.sample.shape[0], device=i.device)


def _combined(predictions: list[Tensor]) -> Tensor:
    guided = predictions[0]
    for scale, prediction in zip(_COMPOSED, predictions[1:], strict=False):
        guided = guided + scale * (prediction - predictions[0])
    return guided


def _row(i: Inputs) -> dict[str, float]:
    """The step's coefficients."""
    return {name: float(values[STEP]) for name, values in i.table.coefficients(_form(i)).items()}


def _formula(
    has: dict[str, float],
    row: dict[str, Any],
    sample: Tensor,
    predictions: list[Tensor],
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """One step in the sample's dtype: the terms whose coefficients ``has`` says are not 0 (or 1), with ``row``'s."""
    terms: list[Tensor] = []

    def add(column: str, values: Tensor) -> None:
        if has[column] != 0:
            terms.append(values if has[column] == 1 else row[column] * values)

    def total() -> Tensor:
        result = terms[0]
        for term in terms[1:]:
            result = result + term
        terms.clear()
        return result

    g = None if gradient is None else GRADIENT_SCALE * gradient.to(sample.dtype)
    m = _combined([prediction.to(sample.dtype) for prediction in predictions]) if predictions else None
    if m is not None:
        add("x0_sample", sample)
        add("x0_pred", m)
        if g is not None:
            add("x0_grad", g)
        x0 = row["x0_scale"] * total()
        if has["clip"] < float("inf"):
            x0 = x0.clamp(-has["clip"], has["clip"])
        add("out_x0", x0)
        add("out_pred", m)
    add("out_sample", sample)
    log_variance = None
    if variance is not None:
        log_variance = row["logvar_base"] + row["logvar_span"] * variance.to(sample.dtype)
    if g is not None:
        add("out_grad", g)
        if log_variance is not None:
            add("out_var_grad", torch.exp(log_variance) * g)
    if noise is not None:
        z = noise.to(sample.dtype)
        add("out_noise", z if log_variance is None else torch.exp(0.5 * log_variance) * z)
    return total()


def _scheduler(i: Inputs, whose: str) -> Any:
    try:
        import diffusers as theirs
    except ImportError:
        raise NotRunError("diffusers is not installed") from None
    w = i.workload
    if w.solver == "add_noise" or w.form is not None:
        raise NotRunError("its step has no such thing")
    config: dict[str, Any] = {
        "trained_betas": _betas(),
        "clip_sample": w.solver.endswith("clipped"),
    }
    library: Any = theirs
    if whose == "fastguide":
        from .. import diffusers as ours

        library = ours
    if w.solver == "ddim":
        scheduler = library.DDIMScheduler(**config)
    else:
        variance = "learned_range" if w.solver.endswith("learned") else "fixed_small"
        scheduler = library.DDPMScheduler(**config, variance_type=variance)
    scheduler.set_timesteps(NUM_STEPS, device=i.device)
    return scheduler


def _betas() -> Any:
    abar = SCHEDULE.alphas_cumprod
    return (1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])).float().numpy()
