"""Who is timed: fastguide, diffusers, guided-diffusion's formulas, and plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..noise import portable_noise
from ..ops import guided_step
from ..table import ROW_COLUMNS
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
    """guided-diffusion's p_sample restated: float64 tables on the host, a row of them uploaded at every use."""
    if not i.workload.solver.startswith("ddpm") or i.workload.guidance == "composed":
        raise NotRunError("its loop is DDPM, with classifier guidance or none, or classifier-free by hand")
    rows = {name: values.numpy() for name, values in i.table.coefficients(_form(i)).items()}
    t = torch.full((i.sample.shape[0],), STEP, device=i.device)
    generator = torch.Generator(i.device).manual_seed(0)

    def extract(name: str) -> Tensor:
        values = torch.from_numpy(rows[name]).to(device=i.device)[t].float()
        return values.reshape(-1, *[1] * (i.sample.dim() - 1)).expand(i.sample.shape)

    def step() -> Tensor:
        noise = torch.randn(i.sample.shape, device=i.device, generator=generator)
        return _formula(extract, i.sample, i.predictions, i.gradient, i.variance, noise)

    return step


def torch_eager(i: Inputs, compiled: str | None = None, *, out: bool = False) -> Call:
    """The formula in torch, without synchronisation, as careful users write it; or under torch.compile."""
    row = i.table.device_rows(_form(i), torch.float32)[STEP].clone()
    place = torch.empty_like(i.sample) if out else None
    generator = torch.Generator(i.device).manual_seed(0)

    def formula(noise: Tensor | None, into: Tensor | None, *tensors: Tensor) -> Tensor:
        sample, *predictions = tensors
        variance = predictions.pop() if i.variance is not None else None
        gradient = predictions.pop() if i.gradient is not None else None
        result = _formula(lambda name: row[_COLUMN[name]], sample, predictions, gradient, variance, noise)
        return result if into is None else into.copy_(result)

    function = formula
    if compiled is not None:
        mode = None if compiled == "default" else compiled
        function = torch.compile(formula, fullgraph=True, dynamic=False, mode=mode)
    extras = [tensor for tensor in (i.gradient, i.variance) if tensor is not None]

    def step() -> Tensor:
        noise = torch.randn(i.sample.shape, device=i.device, generator=generator) if i.noisy else None
        return function(noise, place, i.sample, *i.predictions, *extras)

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
    row = i.table.coefficients(_form(i))
    double = [None if t is None else t.double() for t in (i.gradient, i.variance, noise)]
    predictions = [prediction.double() for prediction in i.predictions]
    truth = _formula(lambda column: row[column][STEP].to(i.device), i.sample.double(), predictions, *double)
    return float((got.double() - truth).norm() / truth.norm())


def tolerance(i: Inputs, name: str) -> float:
    """What a contender may be off by: diffusers computes in the dtype of the model's output."""
    coarse = name == "diffusers" and i.workload.dtype != torch.float32
    return 3e-2 if coarse else 1e-4 if name in ("diffusers", "fastguide's scheduler") else 1e-5


_COLUMN = {name: place for place, name in enumerate(ROW_COLUMNS)}
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


def _formula(
    row: Callable[[str], Tensor],
    sample: Tensor,
    predictions: list[Tensor],
    gradient: Tensor | None,
    variance: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """DESIGN's algebra, of one row, in the sample's dtype."""
    result = row("out_sample") * sample
    if predictions:
        m = _combined([prediction.to(sample.dtype) for prediction in predictions])
        x0 = row("x0_sample") * sample + row("x0_pred") * m
        if gradient is not None:
            x0 = x0 + row("x0_grad") * GRADIENT_SCALE * gradient.to(sample.dtype)
        x0 = row("x0_scale") * x0
        x0 = torch.minimum(torch.maximum(x0, -row("clip")), row("clip"))
        result = row("out_x0") * x0 + result + row("out_pred") * m
    deviation = row("out_noise")
    shift = row("out_grad")
    if variance is not None:
        log_variance = row("logvar_base") + row("logvar_span") * variance.to(sample.dtype)
        deviation = deviation * torch.exp(0.5 * log_variance)
        shift = shift + row("out_var_grad") * torch.exp(log_variance)
    if gradient is not None:
        result = result + shift * GRADIENT_SCALE * gradient.to(sample.dtype)
    return result if noise is None else result + deviation * noise.to(sample.dtype)


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
