"""Time every solver's calls: small ones beside diffusers' schedulers, large ones beside copy_ of what they move."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastguide
from fastguide import ClassifierFree, FlowSchedule, History, StepTable, guided_step

from ..workloads import GUIDANCE_SCALE, SCHEDULE, SHAPES, NotRunError
from .caches import cold_caches
from .loops import compared
from .timing import in_turns

STEPS = 30
DROP_IN, DOUBLED = "fastguide's scheduler", "diffusers, of the doubled output"
"""The contenders whose model returns both predictions in one tensor, as a scheduler's step and a pipeline get it."""
WHOLE = ", with set_timesteps"
"""What follows their names if their loop begins with that."""
_FLOW = FlowSchedule(shift=3.0)
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_FLOWS = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


class Solver(NamedTuple):
    """A table, and diffusers' scheduler that makes the same steps."""

    table: Callable[[], StepTable] | None
    """``None``: only the schedulers are compared, as their noise is drawn otherwise than a table's."""
    scheduler: str
    config: dict[str, Any]
    noisy: bool = False


SOLVERS = {
    "flow Euler": Solver(
        lambda: fastguide.flow_match_euler(_FLOW, STEPS), "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}
    ),
    "Euler": Solver(lambda: fastguide.euler(SCHEDULE, STEPS), "EulerDiscreteScheduler", _BETAS),
    "DDIM": Solver(lambda: fastguide.ddim(SCHEDULE, STEPS), "DDIMScheduler", {**_BETAS, "clip_sample": False}),
    "Heun": Solver(lambda: fastguide.heun(SCHEDULE, STEPS), "HeunDiscreteScheduler", _BETAS),
    "DPM2": Solver(lambda: fastguide.dpm2(SCHEDULE, STEPS), "KDPM2DiscreteScheduler", _BETAS),
    "DPM++ 2M": Solver(lambda: fastguide.dpm_solver(SCHEDULE, STEPS), "DPMSolverMultistepScheduler", _BETAS),
    "DPM++ 2M, flow": Solver(lambda: fastguide.dpm_solver(_FLOW, STEPS), "DPMSolverMultistepScheduler", _FLOWS),
    "DPM++ 3M": Solver(
        lambda: fastguide.dpm_solver(SCHEDULE, STEPS, solver_order=3),
        "DPMSolverMultistepScheduler",
        {**_BETAS, "solver_order": 3},
    ),
    "UniPC 2": Solver(
        lambda: fastguide.unipc(SCHEDULE, STEPS), "UniPCMultistepScheduler", {**_BETAS, "final_sigmas_type": "zero"}
    ),
    "UniPC 2, flow": Solver(
        lambda: fastguide.unipc(_FLOW, STEPS), "UniPCMultistepScheduler", {**_FLOWS, "final_sigmas_type": "zero"}
    ),
    "DEIS 3": Solver(
        lambda: fastguide.deis(SCHEDULE, STEPS, solver_order=3),
        "DEISMultistepScheduler",
        {**_BETAS, "solver_order": 3},
    ),
    "DEIS 2": Solver(lambda: fastguide.deis(SCHEDULE, STEPS), "DEISMultistepScheduler", _BETAS),
    "PNDM": Solver(lambda: fastguide.pndm(SCHEDULE, STEPS), "PNDMScheduler", {**_BETAS, "skip_prk_steps": True}),
    "LMS 4": Solver(lambda: fastguide.lms(SCHEDULE, STEPS), "LMSDiscreteScheduler", _BETAS),
}

SOLVERS |= {
    name: Solver(None, scheduler, config, noisy)
    for name, scheduler, config, noisy in (
        ("SA-Solver", "SASolverScheduler", _BETAS, True),
        ("Euler ancestral", "EulerAncestralDiscreteScheduler", _BETAS, True),
        ("DPM2 ancestral", "KDPM2AncestralDiscreteScheduler", _BETAS, True),
        ("DPM++ 2S", "DPMSolverSinglestepScheduler", {**_BETAS, "lower_order_final": True}, False),
        ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {**_BETAS, "algorithm_type": "sde-dpmsolver++"}, True),
        ("flow Heun", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, False),
        ("flow LCM", "FlowMatchLCMScheduler", {"shift": 3.0}, True),
        ("EDM Euler", "EDMEulerScheduler", {}, False),
        ("EDM DPM++ 2M", "EDMDPMSolverMultistepScheduler", {}, False),
        ("IPNDM", "IPNDMScheduler", {}, False),
        ("LCM", "LCMScheduler", {}, True),
        ("TCD", "TCDScheduler", {}, True),
        ("consistency", "CMStochasticIterativeScheduler", {}, True),
        ("CogVideoX DDIM", "CogVideoXDDIMScheduler", {}, False),
    )
}  # those whose schedulers alone are compared


def small_title(name: str) -> str:
    """Return the name of a small workload: a loop whose model costs nothing."""
    return f"{name}, {STEPS} steps, classifier-free, {SHAPES['SD 512']}"


def large_title(name: str) -> str:
    """Return the name of a large workload: one call."""
    return f"{name}, one call, classifier-free, {SHAPES['pixels']}"


def titles() -> list[str]:
    """Return the names of all workloads."""
    small = [small_title(name) for name in SOLVERS]
    return small + [large_title(name) for name, solver in SOLVERS.items() if solver.table is not None]


def measure(title: str, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender of a workload."""
    row = {"suite": "solvers", "workload": title}
    for name, solver in SOLVERS.items():
        if title == small_title(name):
            yield from _small(row, solver, device, seconds)
        elif title == large_title(name) and solver.table is not None:
            yield from _large(row, solver.table(), device, seconds)


def _draw(shape: tuple[int, ...], count: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(count)]


def _small(row: dict[str, Any], solver: Solver, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    x_T, *predictions = _draw(SHAPES["SD 512"], 3, device)
    try:
        theirs = _diffusers(solver, x_T, predictions)
    except NotRunError as reason:
        yield row | {"contender": "diffusers, and all beside it", "status": "not run", "reason": str(reason)}
        return
    calls = {"diffusers": theirs}
    if solver.table is not None:
        calls["fastguide"] = _table_loop(solver.table().to(device), x_T, predictions)
    for name, package in ((DOUBLED, "diffusers"), (DROP_IN, "fastguide.diffusers")):
        calls[name] = _scheduler_loop(package, solver, x_T, predictions, whole=False)
        calls[name + WHOLE] = _scheduler_loop(package, solver, x_T, predictions, whole=True)
    pairs = ("diffusers", "fastguide"), (DOUBLED, DROP_IN), (DOUBLED + WHOLE, DROP_IN + WHOLE)
    yield from compared(row, calls, device, seconds, [tuple(n for n in pair if n in calls) for pair in pairs])


def _table_loop(table: StepTable, x_T: Tensor, predictions: list[Tensor]) -> Callable[[], Tensor]:
    """Return the loop over a table, which writes the model's input as well, where that is not the sample."""
    history, guidance = History(table, x_T), ClassifierFree(GUIDANCE_SCALE)
    staged = torch.empty_like(x_T) if table.scales_inputs else None

    def loop() -> Tensor:
        x = x_T
        for call in range(len(table)):
            x = guided_step(table, call, x, predictions, guidance, history=history, staged=staged)
        return x

    return loop


def _scheduler_loop(
    package: str, solver: Solver, x_T: Tensor, predictions: list[Tensor], *, whole: bool
) -> Callable[[], Tensor]:
    """Return the loop of a package's scheduler, whose model returns both predictions in one tensor.

    Args:
        whole: whether the loop begins with ``set_timesteps``.
    """
    scheduler: Any = getattr(importlib.import_module(package), solver.scheduler)(**solver.config)
    output, fused = torch.cat(predictions), package != "diffusers"
    scheduler.set_timesteps(STEPS, device=x_T.device)
    reset, scales = _resetter(scheduler), _scales(solver)
    timesteps = list(scheduler.timesteps)  # torch's work, which takes as long as two of our steps, and is no step's

    def loop() -> Tensor:
        if whole:
            scheduler.set_timesteps(STEPS, device=x_T.device)
        else:
            reset()
        if solver.noisy:
            torch.default_generator.manual_seed(0)  # torch.manual_seed takes as long as two draws, for other devices
        x = x_T
        for t in scheduler.timesteps if whole else timesteps:
            if scales:
                scheduler.scale_model_input(x, t)
            if fused:
                x = scheduler.step(output, t, x, return_dict=False, guidance_scale=GUIDANCE_SCALE)[0]
            else:
                uncond, cond = output.chunk(2)
                x = scheduler.step(uncond + GUIDANCE_SCALE * (cond - uncond), t, x, return_dict=False)[0]
        return x

    return loop


def _scales(solver: Solver) -> bool:
    """Tell whether the model's inputs have to be scaled: where diffusers' scheduler has a method for it."""
    import diffusers

    return hasattr(getattr(diffusers, solver.scheduler), "scale_model_input")


def _resetter(scheduler: Any) -> Callable[[], None]:
    """Return what puts a scheduler back to what ``set_timesteps`` left, with empty histories, as fast as can be."""
    own = scheduler.__dict__
    unused = dict(own)
    histories = [(name, kept) for name, kept in own.items() if type(kept) is list]

    def reset() -> None:
        own.update(unused)
        for name, kept in histories:
            own[name] = list(kept)

    return reset


def _diffusers(solver: Solver, x_T: Tensor, predictions: list[Tensor]) -> Callable[[], Tensor]:
    """Return diffusers' loop over two predictions, without a model."""
    try:
        import diffusers
    except ImportError:
        raise NotRunError("diffusers is not installed") from None
    scheduler: Any = getattr(diffusers, solver.scheduler)(**solver.config)
    scheduler.set_timesteps(STEPS, device=x_T.device)
    timesteps, uncond, cond = list(scheduler.timesteps), predictions[0], predictions[1]
    reset, scales = _resetter(scheduler), _scales(solver)

    def loop() -> Tensor:
        reset()
        if solver.noisy:
            torch.default_generator.manual_seed(0)  # torch.manual_seed takes as long as two draws, for other devices
        x = x_T
        for t in timesteps:
            if scales:
                scheduler.scale_model_input(x, t)
            guided = uncond + GUIDANCE_SCALE * (cond - uncond)
            x = scheduler.step(guided, t, x, return_dict=False)[0]
        return x

    return loop


def moved_bytes(table: StepTable, call: int, element: int = 4) -> int:
    """Return what a call with two predictions moves for each element: inputs, slots that it reads or writes, output."""
    row = {name: float(values[call]) for name, values in table.coefficients().items()}
    read = sum(row[f"out_hist_{slot}"] != 0 for slot in range(3))
    return element * (4 + read + (row["hist_slot"] >= 0))


def _large(row: dict[str, Any], table: StepTable, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Time the call of the middle, which reads all of its history, into an output."""
    sample, *predictions = _draw(SHAPES["pixels"], 3, device)
    table, guidance = table.to(device), ClassifierFree(GUIDANCE_SCALE)
    call = max(range(len(table)), key=lambda each: moved_bytes(table, each))
    history, out = History(table, sample), torch.empty_like(sample)
    history.entries.zero_()
    total = sample.numel() * moved_bytes(table, call)
    copy = _copy([sample, *predictions], [out, *(history.entries.split(len(sample)) if history.slots else [])], total)

    def step() -> Tensor:
        history.note(call - 1)
        return guided_step(table, call, sample, predictions, guidance, history=history, out=out)

    calls: dict[str, Callable[[], Tensor]] = {
        "fastguide out=": step,
        "copy_ of the same bytes": copy,
    }
    times, failures = in_turns(calls, seconds, device, before=cold_caches(total, sample.nbytes))
    for name, error in failures.items():
        yield row | {"contender": name, "status": "failed", "reason": str(error)}
    limit = times.get("copy_ of the same bytes")
    for name, found in times.items():
        share = {} if limit is None else {"share_of_copy": limit.median / found.median}
        yield row | {"contender": name, "status": "ok", **found.fields, "bytes": total, "adds_noise": False, **share}


def _copy(sources: list[Tensor], targets: list[Tensor], total: int) -> Callable[[], Tensor]:
    """Return ``copy_`` of as many bytes in the step's own memory, as other memory may lie where it is half as fast."""
    halves = total // sources[0].nbytes
    pairs = [(sources[k % len(sources)], targets[k % len(targets)]) for k in range(halves // 2)]
    if halves % 2:
        half = sources[0].shape[0] // 2
        pairs.append((sources[len(pairs) % len(sources)][:half], targets[len(pairs) % len(targets)][:half]))

    def copy() -> Tensor:
        for source, target in pairs:
            target.copy_(source)
        return target

    return copy
