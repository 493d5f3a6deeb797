"""The list of contenders: fastguide, diffusers, guided-diffusion's formulas, and plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastguide import guided_step

from ..workloads import GUIDANCE_SCALE, NUM_STEPS, STEP, Inputs, NotRunError, abar_at
from .plain_torch import coefficients, straight_lines
from .the_field import Call, diffusers, guided_diffusion, scheduler


def fastguide(i: Inputs, backend: str | None = None, *, out: bool = False, seeds: bool = False) -> Call:
    """Return the fused step: with ``out`` into the caller's output, with ``seeds`` with the portable stream's noise."""
    output = torch.empty_like(i.sample) if out else None
    source: dict[str, Any] = {}
    if i.noisy:
        source = {"seeds": sample_seeds(i)} if seeds else {"generator": torch.Generator(i.device).manual_seed(0)}
    elif seeds:
        raise NotRunError("the step adds no noise")
    options: dict[str, Any] = {"gradient": i.gradient, "variance": i.variance, "out": output, "backend": backend}
    return lambda: guided_step(i.table, STEP, i.sample, i.predictions, i.guidance, **options, **source)


def sample_seeds(i: Inputs) -> Tensor:
    """Return the seeds that ``fastguide`` is given: 0, 1, ... along the batch."""
    return torch.arange(i.sample.shape[0], device=i.device)


def drop_in(i: Inputs) -> Call:
    """Return the step of fastguide's scheduler in diffusers' place; it takes the doubled output as models return it."""
    if i.workload.guidance != "classifier-free" or i.variance is not None or i.workload.solver == "add_noise":
        raise NotRunError("this scheduler is timed with classifier-free guidance and a fixed variance only")
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
    """Return the formula in plain torch: the terms that the step has and no others, without synchronisation.

    Eager torch is given the coefficients as numbers; torch.compile (in the mode ``compiled``) as a tensor, as numbers
    would compile each step anew. With ``out``, output and noise have the same memory in each call.
    """
    w, terms = i.workload, i.terms
    row = coefficients(*abar_at(NUM_STEPS, STEP))
    numbers = row if compiled is None else None
    names = [*terms, "noise"] if i.noisy else list(terms)
    function = straight_lines(w.solver, w.count, names, numbers=numbers, out=out)
    arguments = [i.sample, *i.predictions, *terms.values()]
    if compiled is not None:
        mode = None if compiled == "default" else compiled
        function = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
        arguments.insert(0, torch.tensor(row, device=i.device, dtype=torch.float32))
    generator = torch.Generator(i.device).manual_seed(0)
    output, noise_buffer = torch.empty_like(i.sample), torch.empty_like(i.sample)
    last = [output] if out else []

    def step() -> Tensor:
        if not i.noisy:
            return function(*arguments, *last)
        if out:
            return function(*arguments, noise_buffer.normal_(generator=generator), *last)
        noise = torch.randn(i.sample.shape, device=i.device, dtype=i.sample.dtype, generator=generator)
        return function(*arguments, noise, *last)

    return step


def _on_a_gpu(i: Inputs, mode: str, *, out: bool = False) -> Call:
    """Return torch.compile in a mode that differs from the default mode on a GPU only."""
    if i.device.type != "cuda":
        raise NotRunError("this mode of torch.compile uses CUDA graphs")
    return torch_eager(i, mode, out=out)


def copy(i: Inputs) -> Call:
    """Return ``copy_`` of the same number of bytes, half of them read and half written: the limit."""
    source = torch.ones(max(i.bytes // 2, 1), dtype=torch.uint8, device=i.device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def noise_alone(i: Inputs) -> Call:
    """Return torch's own noise into existing memory: the limit of everyone who uses its stream."""
    if not i.noisy:
        raise NotRunError("the step adds no noise")
    buffer, generator = torch.empty_like(i.sample), torch.Generator(i.device).manual_seed(0)
    return lambda: buffer.normal_(generator=generator)


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

CEILINGS = {"copy_ of the same bytes": copy, "torch's noise alone": noise_alone}

COMPILED = ("torch.compile", "torch.compile max-autotune", "torch.compile reduce-overhead")
"""The modes of one rival; the fastest counts."""


def is_ours(name: str) -> bool:
    """Return whether a contender is fastguide or uses it: its failure is then a failure of the run."""
    return name.startswith("Sampler") or "fastguide" in name
