"""Who is timed: fastguide, diffusers, and the same formula in plain torch, eager and compiled; with their ceilings.

Each contender is made for a workload and returns the next sample; ``check`` compares it with float64 first.
"""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor

import fastguide

from .formula import formula_of
from .workloads import GUIDANCE_SCALE, NUM_STEPS, SCHEDULE, STEP, Workload

Call = Callable[[], Tensor]


def fastguide_step(w: Workload) -> Call:
    """As a user calls it: a new output each time, noise from a generator."""
    guidance, generator = fastguide.ClassifierFree(GUIDANCE_SCALE), torch.Generator().manual_seed(0)
    return lambda: fastguide.guided_step(
        w.table, STEP, w.sample, [w.uncond, w.cond], guidance, generator=generator, backend="native"
    )


def fastguide_out(w: Workload) -> Call:
    """Into the caller's output: what a loop that keeps two buffers does."""
    guidance, generator = fastguide.ClassifierFree(GUIDANCE_SCALE), torch.Generator().manual_seed(0)
    out = torch.empty_like(w.sample)
    return lambda: fastguide.guided_step(
        w.table, STEP, w.sample, [w.uncond, w.cond], guidance, generator=generator, out=out, backend="native"
    )


def fastguide_seeds(w: Workload) -> Call:
    """The same, with the portable stream's noise: made inside of the kernel, one seed a sample."""
    guidance, seeds = fastguide.ClassifierFree(GUIDANCE_SCALE), torch.arange(w.shape[0])
    out = torch.empty_like(w.sample)
    return lambda: fastguide.guided_step(
        w.table, STEP, w.sample, [w.uncond, w.cond], guidance, seeds=seeds, out=out, backend="native"
    )


def diffusers_step(w: Workload) -> Call:
    """diffusers' scheduler.step behind the pipelines' guidance."""
    betas = 1 - SCHEDULE.alphas_cumprod / torch.cat([torch.ones(1).double(), SCHEDULE.alphas_cumprod[:-1]])
    kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[w.solver]
    scheduler = kind(trained_betas=betas.float().numpy(), clip_sample=False)
    scheduler.set_timesteps(NUM_STEPS)
    timestep, generator = scheduler.timesteps[STEP], torch.Generator().manual_seed(0)

    def step() -> Tensor:
        prediction = w.uncond + GUIDANCE_SCALE * (w.cond - w.uncond)
        return scheduler.step(prediction, timestep, w.sample, generator=generator).prev_sample

    return step


def _formula_step(w: Workload, formula: Callable[..., Tensor]) -> Call:
    generator = torch.Generator().manual_seed(0)
    noisy = w.table.adds_noise[STEP]
    row = w.table.device_rows(None, torch.float32)[STEP].clone()
    scale = torch.tensor(GUIDANCE_SCALE)

    def step() -> Tensor:
        noise = torch.randn(w.shape, generator=generator) if noisy else None
        return formula(row, scale, w.sample, w.uncond, w.cond, noise)

    return step


def torch_eager(w: Workload) -> Call:
    """Plain torch, an operation at a time."""
    return _formula_step(w, formula_of(w.table.adds_noise[STEP]))


def torch_compiled(w: Workload) -> Call:
    """Plain torch under torch.compile: the competitor that fuses too. The noise is drawn outside, as it must be."""
    return _formula_step(w, torch.compile(formula_of(w.table.adds_noise[STEP]), fullgraph=True, dynamic=False))


def torch_compiled_out(w: Workload) -> Call:
    """The same, written into the caller's output, which the compiler does in place."""
    formula = formula_of(w.table.adds_noise[STEP])
    out = torch.empty_like(w.sample)

    @torch.compile(fullgraph=True, dynamic=False)
    def into(out: Tensor, *arguments: Tensor | None) -> None:
        out.copy_(formula(*arguments))

    def step(*arguments: Tensor | None) -> Tensor:
        into(out, *arguments)
        return out

    return _formula_step(w, step)


CONTENDERS = {
    "fastguide": fastguide_step,
    "fastguide out": fastguide_out,
    "fastguide out, seeds": fastguide_seeds,
    "diffusers": diffusers_step,
    "torch eager": torch_eager,
    "torch.compile": torch_compiled,
    "torch.compile out": torch_compiled_out,
}


def contenders(w: Workload) -> list[str]:
    """Those that differ on a workload: seeds do where noise is drawn."""
    return [name for name in CONTENDERS if w.table.adds_noise[STEP] or not name.endswith("seeds")]


def copy_ceiling(w: Workload) -> Call:
    """``copy_`` that moves the same bytes: half of them read, half written."""
    source = torch.ones(w.bytes // 2, dtype=torch.uint8)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def randn_ceiling(w: Workload) -> Call:
    """What torch needs to draw the noise alone, into memory that is there."""
    generator, noise = torch.Generator().manual_seed(0), torch.empty(w.shape)
    return lambda: noise.normal_(generator=generator)


def check(w: Workload, name: str) -> None:
    """Refuse to time what is wrong: against the formula in float64, with the noise of the same seed."""
    got = CONTENDERS[name](w)()
    x, uncond, cond = w.sample.double(), w.uncond.double(), w.cond.double()
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).double()
    if w.table.adds_noise[STEP] and name == "diffusers":
        # diffusers draws in the dtype of the model's output
        noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype).double()
    if name.endswith("seeds"):
        noise = fastguide.portable_noise(torch.arange(w.shape[0]), w.shape, step=STEP).double()
    c = {key: values[STEP] for key, values in w.table.coefficients().items()}
    m = uncond + GUIDANCE_SCALE * (cond - uncond)
    x0 = c["x0_scale"] * (c["x0_sample"] * x + c["x0_pred"] * m)
    truth = c["out_x0"] * x0 + c["out_sample"] * x + c["out_pred"] * m + c["out_noise"] * noise
    error = (got.double() - truth).norm() / truth.norm()
    limit = 1e-5 if w.dtype == torch.float32 or name != "diffusers" else 2e-2  # diffusers computes in bfloat16
    if not error < limit:
        raise AssertionError(f"{name} on {w.name}: relative error {error:.1e}, expected less than {limit:.0e}")
