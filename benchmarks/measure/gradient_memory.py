"""Measure the memory of recorded steps and runs, beside autograd through the same formula in torch.

Each is told in parts: what is kept between the passes, what a pass has for itself, and all at the peak. The caller's
tensors, the outputs and the gradients are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastguide import (
    AdaptiveProjected,
    ClassifierFree,
    Guidance,
    History,
    Normalized,
    Sampler,
    StepTable,
    Tangential,
    ddim,
    dpm_solver,
    guided_step,
)

from ..workloads import SCHEDULE
from .allocations import Memory, memory_of

CALL, SCALE = 10, 7.5
SHAPE = (64, 3, 256, 256)
RUN_SHAPE, RUN_CALLS = (4, 4, 64, 64), 20
STEP, RUN = "memory of a step", f"memory of {RUN_CALLS} calls"
OURS, PLAIN = "fastguide", "autograd of the formula in torch"

Row = dict[str, Any]
Coefficients = dict[str, float]
Combination = Callable[[Tensor, Tensor], Tensor]


def step_title(name: str) -> str:
    """Return the name of a step's workload."""
    return f"{STEP}, {name}, {SHAPE}"


def run_title(name: str) -> str:
    """Return the name of a run's workload."""
    return f"{RUN}, {name}, {RUN_SHAPE}"


# ---- The formulas in torch ----


def classifier_free(uncond: Tensor, cond: Tensor) -> Tensor:
    """Return ``u + s * (c - u)``."""
    return uncond + SCALE * (cond - uncond)


def rescaled(uncond: Tensor, cond: Tensor) -> Tensor:
    """Return it with a part of the conditional prediction's deviation (Lin et al. 2023, section 3.4)."""
    m, dims = classifier_free(uncond, cond), tuple(range(1, cond.dim()))
    ratio = cond.std(dims, keepdim=True) / m.std(dims, keepdim=True)
    return 0.7 * (ratio * m) + 0.3 * m


def norm(values: Tensor) -> Tensor:
    """Return the norm of each sample."""
    found: Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), keepdim=True)
    return found


def projected(uncond: Tensor, cond: Tensor) -> Tensor:
    """Return ``u + s * r``, r being what of ``c - u`` is not along c (arXiv 2410.02416)."""
    dims = tuple(range(1, cond.dim()))
    shift = cond - uncond
    shift = shift * (15.0 / norm(shift)).clamp(max=1.0)
    along = cond / norm(cond)
    return uncond + SCALE * (shift - (shift * along).sum(dims, keepdim=True) * along)


def tangential(uncond: Tensor, cond: Tensor) -> Tensor:
    """Return ``u' + s * (c - u')``, u' being u along the first singular vector of both (arXiv 2503.18137)."""
    dims = tuple(range(1, cond.dim()))
    inner = (cond * uncond).sum(dims, keepdim=True)
    difference = uncond.square().sum(dims, keepdim=True) - cond.square().sum(dims, keepdim=True)
    height = (difference.square() + 4 * inner.square()).sqrt()
    damped = inner / height * cond + (1 + difference / height) / 2 * uncond
    return damped + SCALE * (cond - damped)


def normalized(uncond: Tensor, cond: Tensor) -> Tensor:
    """Return ``u + s * (c - u)``, each place's channels as long as those of c."""
    m = classifier_free(uncond, cond)
    length, own = (torch.linalg.vector_norm(values, dim=1, keepdim=True) for values in (cond, m))
    guided: Tensor = length / own * m
    return guided


def original(row: Coefficients, x: Tensor, m: Tensor) -> Tensor:
    """Return x_0, clipped if the row says so."""
    x0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m)
    return x0 if row["clip"] == float("inf") else x0.clamp(-row["clip"], row["clip"])


def stepped(row: Coefficients, x: Tensor, m: Tensor, entries: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Return the next sample and x_0; what has a coefficient of 0 is left out."""
    x0 = original(row, x, m)
    parts = [("out_x0", x0), ("out_sample", x), ("out_pred", m)]
    parts += [(f"out_hist_{slot}", entry) for slot, entry in enumerate(entries)]
    first, *others = [row[name] * tensor for name, tensor in parts if row[name]]
    return sum(others, first), x0


def row_of(table: StepTable, call: int) -> Coefficients:
    """Return the coefficients of a call."""
    return {name: float(values[call]) for name, values in table.coefficients().items()}


# ---- Steps ----


class Step(NamedTuple):
    """A step that is recorded, and its formula."""

    table: StepTable
    guidance: Guidance
    combination: Combination
    dtype: torch.dtype = torch.float32
    """Of the predictions."""


def steps() -> dict[str, Step]:
    """Return the steps by name."""
    plain, free = ddim(SCHEDULE, 50), ClassifierFree(SCALE)
    return {
        "ddim": Step(plain, free, classifier_free),
        "ddim, clipped": Step(ddim(SCHEDULE, 50, clip_sample_range=1.0), free, classifier_free),
        "ddim, clipped, bfloat16 predictions": Step(
            ddim(SCHEDULE, 50, clip_sample_range=1.0), free, classifier_free, torch.bfloat16
        ),
        "dpm++ 2m, with a history": Step(dpm_solver(SCHEDULE, 50), free, classifier_free),
        "ddim, rescaled": Step(plain, ClassifierFree(SCALE, guidance_rescale=0.7), rescaled),
        "ddim, projected": Step(plain, AdaptiveProjected(SCALE, norm_threshold=15.0), projected),
        "ddim, normalized over channels": Step(plain, Normalized(SCALE, dim=1), normalized),
        "ddim, tangential": Step(plain, Tangential(SCALE), tangential),
        "ddim, projected, bfloat16 predictions": Step(
            plain, AdaptiveProjected(SCALE, norm_threshold=15.0), projected, torch.bfloat16
        ),
    }


Forward = Callable[[], tuple[Tensor, ...]]


class Recorded(NamedTuple):
    """What contenders compute, what gets gradients, and those that come in."""

    contenders: dict[str, Forward]
    inputs: list[Tensor]
    came: list[Tensor]

    def memory(self) -> dict[str, Memory]:
        """Return the memory of each contender."""
        return {name: memory_of(forward, self.inputs, self.came) for name, forward in self.contenders.items()}


def recorded_step(step: Step, shape: tuple[int, ...] = SHAPE) -> Recorded:
    """Return a step that is recorded, ours and the formula's."""
    table, slots, batch = step.table, step.table.history_slots, shape[0]
    x, first, shift, came = (torch.randn(shape) for _ in range(4))
    uncond, cond = (tensor.to(step.dtype) for tensor in (first, first + 0.3 * shift))
    earlier, later = torch.randn(2, slots * batch, *shape[1:])
    inputs = [x, uncond, cond, *([earlier] if slots else [])]
    for tensor in inputs:
        tensor.requires_grad_()
    row, begun = row_of(table, CALL), History(table, x.detach()[:0])

    def ours() -> tuple[Tensor, ...]:
        if not slots:
            return (guided_step(table, CALL, x, [uncond, cond], step.guidance),)
        history = begun.continued(earlier, CALL)
        return guided_step(table, CALL, x, [uncond, cond], step.guidance, history=history), history.entries

    def plain() -> tuple[Tensor, ...]:
        entries = earlier.split(batch) if slots else ()
        m = step.combination(uncond.to(x.dtype), cond.to(x.dtype))
        new, x0 = stepped(row, x, m, entries)
        left = list(entries)
        if slots:
            left[int(row["hist_slot"])] = row["hist_x0"] * x0 + row["hist_sample"] * x if row["hist_sample"] else x0
        return (new, torch.cat(left) if slots > 1 else left[0]) if slots else (new,)

    return Recorded({OURS: ours, PLAIN: plain}, inputs, [came, later] if slots else [came])


# ---- Runs ----


class Loop(NamedTuple):
    """A run of a sampler that is recorded, and the same loop by its formula."""

    table: StepTable
    model: Callable[..., Tensor]
    parameters: list[Tensor]


def runs() -> dict[str, Loop]:
    """Return the runs by name."""
    clipped, multistep = ddim(SCHEDULE, RUN_CALLS, clip_sample_range=1.0), dpm_solver(SCHEDULE, RUN_CALLS)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 4, 3, padding=1)
    )
    factor = torch.full((1,), 0.1, requires_grad=True)

    def convolutions(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        predicted: Tensor = net(x) + label.reshape(-1, 1, 1, 1)
        return predicted

    def multiplication(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return factor * x + label.reshape(-1, 1, 1, 1)

    return {
        "ddim, clipped, a model of two convolutions": Loop(clipped, convolutions, list(net.parameters())),
        "dpm++ 2m, a model of two convolutions": Loop(multistep, convolutions, list(net.parameters())),
        "ddim, clipped, a model of one multiplication": Loop(clipped, multiplication, [factor]),
        "dpm++ 2m, a model of one multiplication": Loop(multistep, multiplication, [factor]),
    }


def recorded_run(run: Loop, shape: tuple[int, ...] = RUN_SHAPE) -> Recorded:
    """Return a whole run, ours and loops by the formula, with and without checkpoints."""
    table, batch = run.table, shape[0]
    x_T, came = torch.randn(shape).requires_grad_(), torch.randn(shape)
    cond, uncond = torch.ones(batch), torch.zeros(batch)
    both = torch.cat([uncond, cond])
    sampler = Sampler(run.model, table, ClassifierFree(SCALE))
    rows = [row_of(table, call) for call in range(len(table))]

    def step(call: int, x: Tensor, *entries: Tensor) -> tuple[Tensor, ...]:
        predictions = run.model(torch.cat([x] * 2), table.timesteps[call].expand(2 * batch), both)
        new, x0 = stepped(rows[call], x, classifier_free(*predictions.chunk(2)), entries)
        slot, left = int(rows[call]["hist_slot"]), list(entries)
        if slot >= 0:
            left[slot] = x0
        return new, *left

    def loop(checkpointed: bool) -> tuple[Tensor, ...]:
        state: tuple[Tensor, ...] = (x_T, *[torch.zeros(shape) for _ in range(table.history_slots)])
        for call in range(len(table)):
            state = checkpoint(step, call, *state, use_reentrant=False) if checkpointed else step(call, *state)
        return state[:1]

    def ours(checkpointed: bool) -> tuple[Tensor, ...]:
        return (sampler.differentiable(x_T, checkpoint=checkpointed, cond=cond, uncond=uncond),)

    contenders: dict[str, Forward] = {
        f"{OURS}, checkpoint=True": partial(ours, True),
        f"{OURS}, checkpoint=False": partial(ours, False),
        PLAIN: partial(loop, False),
        f"{PLAIN}, with checkpoints": partial(loop, True),
    }
    return Recorded(contenders, [x_T, *run.parameters], [came])
