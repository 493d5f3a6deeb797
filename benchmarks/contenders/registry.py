"""Who is timed: fastguide, diffusers, guided-diffusion's formulas, and plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastguide.step.guided_step import guided_step
from fastguide.step.noise import portable_noise

from .. import papers
from ..workloads import GUIDANCE_SCALE, NUM_STEPS, STEP, Inputs, NotRunError
from . import plain_torch as formula
from .the_field import Call, diffusers, guided_diffusion, scheduler


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


def drop_in(i: Inputs) -> Call:
    """fastguide's scheduler in the place of diffusers', with the doubled output as a model returns it."""
    if i.workload.guidance != "classifier-free" or i.variance is not None or i.workload.solver == "add_noise":
        raise NotRunError("timed with classifier-free guidance and a fixed variance")
    ours = scheduler(i.workload.solver, NUM_STEPS, i.device, ours=True)
    output = torch.cat(i.predictions)
    timestep, generator = ours.timesteps[STEP], torch.Generator(i.device).manual_seed(0)

    def step() -> Tensor:
        result: Tensor = ours.step(
            output, timestep, i.sample, generator=generator, guidance_scale=GUIDANCE_SCALE
        ).prev_sample
        return result

    return step


def torch_eager(i: Inputs, compiled: str | None = None, *, out: bool = False) -> Call:
    """The formula in torch, of the terms that the step has and no others, without synchronisation.

    Eager, with numbers; under torch.compile, with the coefficients in a tensor, as numbers would compile each step
    anew. With ``out``, into the same memory each time; the noise, too.
    """
    extras = {"gradient": i.gradient is not None, "variance": i.variance is not None, "noise": i.noisy, "out": out}
    in_a_tensor = compiled is not None
    function, row = formula.step_function(_row(i), i.workload.count, in_a_tensor=in_a_tensor, **extras)
    if compiled is not None:
        mode = None if compiled == "default" else compiled
        function = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
    generator = torch.Generator(i.device).manual_seed(0)
    place, drawn = torch.empty_like(i.sample), torch.empty_like(i.sample)
    before = [torch.tensor(row, device=i.device, dtype=torch.float32)] if in_a_tensor else []
    before += [i.sample, *i.predictions, *(tensor for tensor in (i.gradient, i.variance) if tensor is not None)]
    after = [place] if out else []

    def step() -> Tensor:
        if not i.noisy:
            return function(*before, *after)
        if out:
            return function(*before, drawn.normal_(generator=generator), *after)
        noise = torch.randn(i.sample.shape, device=i.device, dtype=i.sample.dtype, generator=generator)
        return function(*before, noise, *after)

    return step


def _on_a_gpu(i: Inputs, mode: str, *, out: bool = False) -> Call:
    """torch.compile in a mode that differs from the default on a GPU alone."""
    if i.device.type != "cuda":
        raise NotRunError("this mode is of CUDA graphs")
    return torch_eager(i, mode, out=out)


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
    "torch.compile max-autotune": lambda i: torch_eager(i, "max-autotune"),
    "torch.compile max-autotune out=": lambda i: torch_eager(i, "max-autotune", out=True),
    "torch.compile reduce-overhead": lambda i: _on_a_gpu(i, "reduce-overhead"),
}


def is_ours(name: str) -> bool:
    """Whether a contender is fastguide, or runs on it: then a failure is one of the run."""
    return name.startswith("Sampler") or "fastguide" in name


COMPILED = ("torch.compile", "torch.compile max-autotune", "torch.compile reduce-overhead")
"""The modes of the same rival, of which the fastest counts."""
CEILINGS = {"copy_ of the same bytes": copy, "torch's noise alone": noise_alone}


def relative_error(i: Inputs, name: str, got: Tensor) -> float:
    """Of a contender's result, against the papers' step in float64 with the noise that it draws."""
    noise = None
    if i.noisy:
        # diffusers' step draws in the output's dtype, and so does its drop-in
        outputs = name in ("diffusers", "fastguide's scheduler") and i.workload.solver != "add_noise"
        if name.endswith("seeds="):
            noise = portable_noise(_seeds(i), i.sample.shape, step=STEP)
        else:
            generator = torch.Generator(i.device).manual_seed(0)
            dtype = i.workload.dtype if outputs else i.sample.dtype
            noise = torch.randn(i.sample.shape, device=i.device, dtype=dtype, generator=generator)
    truth = papers.step(i, noise)
    return float((got.double() - truth).norm() / truth.norm())


def tolerance(i: Inputs, name: str) -> float:
    """What a contender may be off by: diffusers computes in the dtype of the model's output, and of the sample."""
    state = i.sample.dtype
    if name == "diffusers" and i.workload.dtype != torch.float32:
        return 3e-2 if state == torch.float32 else 6e-2
    rounding = 0.0 if state == torch.float32 else torch.finfo(state).eps / 2
    return rounding + (1e-4 if name in ("diffusers", "fastguide's scheduler") else 1e-5)


def _form(i: Inputs) -> Any:
    return None if i.guidance is None else i.guidance.form


def _seeds(i: Inputs) -> Tensor:
    return torch.arange(i.sample.shape[0], device=i.device)


def _row(i: Inputs) -> dict[str, float]:
    """The step's coefficients."""
    return {name: float(values[STEP]) for name, values in i.table.coefficients(_form(i)).items()}
