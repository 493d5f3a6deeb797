"""Time steps that need numbers of whole samples: beside the plain step, and beside diffusers' guider and scheduler.

Guidance that is made from moments, and dynamic thresholding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguide import (
    AdaptiveProjected,
    ClassifierFree,
    Guidance,
    StepTable,
    Tangential,
    ZeroStar,
    ddim,
    guided_step,
)

from ..workloads import SCHEDULE
from .caches import cold_caches
from .loops import compared
from .timing import describe, in_turns

STEPS, CALL = 30, 10
PLAIN, COMPILED = "fastguide, classifier-free", "plain torch, compiled"
RATIO = "of_the_plain_step"
SHAPES = ((2, 4, 64, 64), (8, 4, 128, 128), (64, 3, 256, 256))
_LARGEST = 1 << 20
"""Elements up to which the formula in plain torch is compiled and measured too."""
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


class Kind(NamedTuple):
    """A guidance, and diffusers' guider of the same numbers."""

    guidance: Callable[[], Guidance]
    guider: str
    config: dict[str, Any]
    threshold: tuple[float, float] | None = None
    """The ratio and the largest value of dynamic thresholding."""


KINDS = {
    "rescaled": Kind(
        lambda: ClassifierFree(7.5, guidance_rescale=0.7), "ClassifierFreeGuidance", {"guidance_rescale": 0.7}
    ),
    "zero star": Kind(
        lambda: ZeroStar(7.5, zero_init_steps=0), "ClassifierFreeZeroStarGuidance", {"zero_init_steps": 0}
    ),
    "projected": Kind(
        lambda: AdaptiveProjected(7.5, norm_threshold=15.0),
        "AdaptiveProjectedGuidance",
        {"eta": 0.0, "adaptive_projected_guidance_rescale": 15.0},
    ),
    "tangential": Kind(lambda: Tangential(7.5), "TangentialClassifierFreeGuidance", {}),
    "thresholded": Kind(lambda: ClassifierFree(7.5), "ClassifierFreeGuidance", {}, (0.995, 1.5)),
}


def title(name: str, shape: tuple[int, ...]) -> str:
    """Return the name of a workload."""
    return f"{name}, one call, {shape}, float32"


def titles() -> list[str]:
    """Return the names of all workloads."""
    return [title(name, shape) for shape in SHAPES for name in KINDS]


def measure(which: str, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender of a workload."""
    for shape in SHAPES:
        for name, kind in KINDS.items():
            if title(name, shape) == which:
                yield from _measured({"suite": "moments", "workload": which}, kind, shape, device, seconds)


def _measured(
    row: dict[str, Any], kind: Kind, shape: tuple[int, ...], device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    uncond = torch.randn(shape, generator=generator)
    cond = uncond + 0.3 * torch.randn(shape, generator=generator)
    x, uncond, cond = (values.to(device) for values in (torch.randn(shape, generator=generator), uncond, cond))
    plain_table, out, small = ddim(SCHEDULE, STEPS).to(device), torch.empty_like(x), x.numel() <= _LARGEST
    table = plain_table if kind.threshold is None else plain_table.with_dynamic_thresholding(*kind.threshold)
    guidance = kind.guidance()
    calls: dict[str, Callable[[], Tensor]] = {}
    try:
        theirs = _diffusers(kind, x, uncond, cond)
        calls["diffusers"] = theirs
    except ImportError as error:
        yield row | {"contender": "diffusers, and all beside it", "status": "not run", "reason": describe(error)}
        return
    calls["fastguide"] = lambda: guided_step(table, CALL, x, [uncond, cond], guidance, out=out)
    if "guidance_rescale" in kind.config and small:
        calls[COMPILED] = _compiled(table, x, uncond, cond)
    rows = list(compared(row, calls, device, seconds))
    plain, mine = ClassifierFree(7.5), calls["fastguide"]
    beside = {
        "fastguide": mine,
        PLAIN: lambda: guided_step(plain_table, CALL, x, [uncond, cond], plain, out=out),
    }
    yield from rows
    yield from _beside_the_plain_step(row, beside, 4 * x.nbytes, device, seconds)


def _beside_the_plain_step(
    row: dict[str, Any], calls: dict[str, Callable[[], Tensor]], moved: int, device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield the time of the plain step, and how many times as long the other one takes, in turns with it alone.

    Twice on a CPU: from cold caches, as all steps are timed; and back to back, where its caches hold what fits.
    """
    before = cold_caches(moved, output_bytes=0)  # the output's memory is there already
    found = in_turns(calls, seconds, device, wall=True, before=before)
    again = in_turns(calls, seconds, device, wall=True) if device.type == "cpu" else found
    for failure in (found.failures | again.failures).values():
        yield row | {"contender": PLAIN, "status": "failed", "reason": describe(failure)}
        return
    plain = found.times[PLAIN]
    ratios = {RATIO: found.times["fastguide"].median / plain.median}
    if device.type == "cpu":
        ratios[f"{RATIO}_back_to_back"] = again.times["fastguide"].median / again.times[PLAIN].median
    yield row | {"contender": PLAIN, "status": "ok", **plain.fields, **ratios}


def _diffusers(kind: Kind, x: Tensor, uncond: Tensor, cond: Tensor) -> Callable[[], Tensor]:
    """Return the guider's combination and the scheduler's step."""
    import diffusers
    import diffusers.guiders

    guider: Any = getattr(diffusers.guiders, kind.guider)(guidance_scale=7.5, start=0.0, stop=1.0, **kind.config)
    scheduler_class: Any = diffusers.DDIMScheduler
    limits: dict[str, Any] = {}
    if kind.threshold is not None:
        limits = dict(zip(("dynamic_thresholding_ratio", "sample_max_value"), kind.threshold, strict=True))
        limits["thresholding"] = True
    scheduler = scheduler_class(**_BETAS, **limits)
    scheduler.set_timesteps(STEPS, device=x.device)
    timestep = scheduler.timesteps[CALL]
    guider.set_state(step=CALL, num_inference_steps=STEPS, timestep=timestep)

    def step() -> Tensor:
        guided = guider.forward(cond, uncond).pred
        following: Tensor = scheduler.step(guided, timestep, x, return_dict=False)[0]
        return following

    return step


def _compiled(table: StepTable, x: Tensor, uncond: Tensor, cond: Tensor) -> Callable[[], Tensor]:
    """Return the rescaled step's formula in plain torch, compiled."""
    row = {name: float(values[CALL]) for name, values in table.coefficients().items()}
    dims = tuple(range(1, x.dim()))

    @torch.compile
    def step(x: Tensor, uncond: Tensor, cond: Tensor) -> Tensor:
        m = uncond + 7.5 * (cond - uncond)
        ratio = cond.std(dims, keepdim=True) / m.std(dims, keepdim=True)
        m = 0.7 * ratio * m + 0.3 * m
        x_0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m)
        return row["out_x0"] * x_0 + row["out_sample"] * x + row["out_pred"] * m

    step(x, uncond, cond)
    return lambda: step(x, uncond, cond)
