"""Make step tables of a diffusers scheduler's transitions, and cache them until the scheduler changes.

A table has a row for every training timestep, and the row's number is the timestep.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..solvers import StepTable
from ..solvers.ddim import ddim_table
from ..solvers.ddpm import ddpm_table
from .thresholding import thresholded, why_not_thresholded
from .timesteps import host_timesteps
from .written_tables import state_of

UNDEFINED = "it leads nowhere, or the schedule has no signal at that timestep"


# ---- Cache ----


class TableCache(NamedTuple):
    """The tables of one state of a scheduler; replaced as a whole, so that copies of a scheduler may share it."""

    state: tuple[Any, ...]
    """What the rows depend on besides the arguments of ``step``, compared by identity."""
    versions: tuple[Any, Any] | None
    """Of ``alphas_cumprod`` and ``timesteps``; ``None`` if made while torch.compile traced."""
    refusal: str | None
    """Why rows cannot express the scheduler's configuration; ``None``: they can."""
    tables: dict[tuple[Any, ...], StepTable]
    """By device and the arguments of ``step`` that rows depend on."""


def current_tables(scheduler: Any) -> TableCache:
    """Return the scheduler's cache, a new one if its state has changed since."""
    state, cache = scheduler._table_state(), scheduler._table_cache
    compiling = torch.compiler.is_compiling()
    versions = None if compiling else (state_of(scheduler.alphas_cumprod), state_of(scheduler.timesteps))
    if cache is None or not all(map(operator.is_, state, cache.state)) or not (compiling or cache.versions == versions):
        cache = scheduler._table_cache = TableCache(state, versions, _refusal(scheduler), {})
    found: TableCache = cache
    return found


def table_of(scheduler: Any, cache: TableCache, device: torch.device, arguments: tuple[Any, ...]) -> StepTable:
    """Return the table for a step's device and arguments; make it if the cache has none.

    Raises:
        RuntimeError: the cache has none while torch.compile is tracing, which cannot make it.
    """
    key = (device, *arguments)
    table = cache.tables.get(key)
    if table is None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"step: torch.compile does not make the table for these arguments, {arguments}; make one step with "
                "them before it is compiled"
            )
        made = thresholded(scheduler._transitions(*arguments), scheduler.config)
        table = cache.tables[key] = made.to(device)
    return table


def prepare_tables(scheduler: Any, arguments: tuple[Any, ...]) -> None:
    """Make the tables now, where the timesteps are: for these arguments, and those of steps made before."""
    before = scheduler._table_cache
    used = set() if before is None else {key[1:] for key in before.tables}
    cache = current_tables(scheduler)
    if cache.refusal is None:
        for each in {arguments, *used}:
            table_of(scheduler, cache, scheduler.timesteps.device, each)


def _refusal(scheduler: Any) -> str | None:
    """Return why rows cannot express the configuration; diffusers reports what is wrong with it, if something is."""
    config, steps, variance_type = scheduler.config, scheduler.num_inference_steps, scheduler.variance_type
    why_not = why_not_thresholded(config)
    if why_not is not None:
        return why_not
    if not (scheduler._steps_before_set_timesteps if steps is None else isinstance(steps, int) and steps > 0):
        return "timesteps that are not set"
    known = (
        config.get("prediction_type", "epsilon") in scheduler._prediction_types
        and (not config.clip_sample or config.get("clip_sample_range", 1.0) > 0)
        and variance_type in scheduler._variance_types
        and config.get("variance_type", variance_type) == variance_type
        and all(0 <= timestep < len(scheduler.alphas_cumprod) for timestep in host_timesteps(scheduler))
    )
    return None if known else "a configuration that rows do not express"


def is_defined(scheduler: Any, table: StepTable, row: int | Tensor) -> bool:
    """Tell whether the table has this row, as far as the host knows.

    Raises:
        IndexError: it has none because the scheduler leads only from one of ``timesteps`` to the next.
    """
    if isinstance(row, Tensor):
        return True
    if row not in table.undefined_rows:
        return 0 <= row < len(table)
    chosen = scheduler._linked_timesteps()
    if chosen is not None and row not in chosen:
        raise IndexError(f"timestep: expected one of the {len(chosen)} that are set, {_ends(chosen)}, got {row}")
    return False


def _ends(timesteps: tuple[int, ...]) -> str:
    if len(timesteps) < 8:
        return ", ".join(map(str, timesteps))
    return f"{timesteps[0]}, {timesteps[1]} .. {timesteps[-1]}"


# ---- Transitions ----


def host_alphas(scheduler: Any) -> Tensor:
    """Return abar of every training timestep, on the host, in float32.

    diffusers takes 1 - abar and the like in float32, which loses four digits where abar is near 1. Rows that are to
    give the same picture have to lose them too; ``fastguide.ddpm`` and ``fastguide.ddim`` do not.
    """
    alphas: Tensor = scheduler.alphas_cumprod.detach().to("cpu", torch.float32)
    return alphas


def ddim_transitions(
    scheduler: Any,
    eta: float,
    use_clipped_model_output: bool,
    inverse: bool = False,
    *,
    at: Tensor | None = None,
    undefined: str | None = UNDEFINED,
) -> StepTable:
    """Make the rows from every timestep t to t - num_train_timesteps // num_inference_steps, as ``DDIMScheduler``'s.

    ``inverse``: to t from that one, as ``DDIMInverseScheduler.step``; ``at``: only from these timesteps, in this order.
    """
    config, alphas = scheduler.config, host_alphas(scheduler)
    final = float(scheduler.initial_alpha_cumprod if inverse else scheduler.final_alpha_cumprod)
    steps = torch.arange(len(alphas), device="cpu") if at is None else at
    previous = steps - config.num_train_timesteps // scheduler.num_inference_steps
    a, a_prev = alphas[steps], torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
    if inverse:
        a, a_prev = a_prev, a
    a_known = a_prev.clone()
    if at is not None:  # a loop, which ends with its last step
        a_known[-1] = 1.0
    return ddim_table(
        steps,
        a,
        a_prev,
        inpainting_levels=Levels.from_alphas_cumprod(a_known),
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
        prediction_type=config.prediction_type,
        clip_sample_range=config.clip_sample_range if config.clip_sample else None,
        undefined=undefined,
    )


def ddpm_transitions(
    scheduler: Any,
    timesteps: tuple[int, ...] | None,
    *,
    at: Tensor | None = None,
    undefined: str | None = UNDEFINED,
) -> StepTable:
    """Make the rows from every one of ``timesteps`` to the next, as ``DDPMScheduler``'s; ``None``: from t to t - 1.

    Noise is added at every timestep but 0, also where a trailing spacing ends at another. ``at``: only from these.
    """
    config, alphas = scheduler.config, host_alphas(scheduler)
    every = torch.arange(len(alphas), device="cpu")
    previous = every - 1
    if timesteps is not None:
        previous = torch.full_like(every, len(alphas))  # nowhere
        for timestep, following in reversed(list(zip(timesteps, (*timesteps[1:], -1), strict=True))):
            previous[timestep] = following  # of one that comes twice, from its first place
    padded = torch.cat([alphas, alphas.new_tensor([torch.nan, 1.0])])  # nowhere, and -1
    steps = every if at is None else at
    return ddpm_table(
        steps,
        alphas[steps],
        padded[previous[steps]],
        steps > 0,
        prediction_type=config.prediction_type,
        variance_type=scheduler.variance_type,
        clip_sample_range=config.clip_sample_range if config.clip_sample else None,
        undefined=undefined,
    )


def mean_transitions(scheduler: Any, of_ddim: bool, use_clipped_model_output: bool = False) -> StepTable:
    """Make the rows of ``batch_step_no_noise``: from t to t - num_train_timesteps // num_inference_steps, or to x_0."""
    config, alphas = scheduler.config, host_alphas(scheduler)
    trained = config.num_train_timesteps
    steps = torch.arange(len(alphas), device="cpu")
    previous = steps - trained // (scheduler.num_inference_steps or trained)
    after = torch.where(previous >= 0, alphas[previous.clamp(min=0)], 1.0)
    clip = config.clip_sample_range if config.clip_sample else None
    shared: dict[str, Any] = {"prediction_type": config.prediction_type, "clip_sample_range": clip}
    shared["undefined"] = UNDEFINED
    if of_ddim:
        clipped = use_clipped_model_output
        return ddim_table(steps, alphas, after, eta=0.0, use_clipped_model_output=clipped, **shared)
    no_noise = torch.zeros_like(steps, dtype=torch.bool)
    return ddpm_table(steps, alphas, after, no_noise, variance_type="fixed_small", **shared)


def ddim_loop(scheduler: Any, eta: float) -> StepTable:
    """Make the table of a DDIM scheduler's whole loop over its ``timesteps``."""
    _check_eta(eta, 1)
    loop = ddim_transitions(scheduler, eta, False, at=scheduler.timesteps, undefined=None)
    return thresholded(loop, scheduler.config)


def ddpm_loop(scheduler: Any, eta: float) -> StepTable:
    """Make the table of a DDPM scheduler's whole loop over its ``timesteps``; ``eta`` has to be 0."""
    _check_eta(eta, 0)
    timesteps = scheduler.timesteps
    loop = ddpm_transitions(scheduler, tuple(timesteps.tolist()), at=timesteps, undefined=None)
    return thresholded(loop, scheduler.config)


def _check_eta(eta: float, largest: int) -> None:
    if isinstance(eta, bool) or not isinstance(eta, (int, float)):
        raise TypeError(f"eta: expected a number from 0 to 1, got {eta!r}")
    if not 0 <= eta <= largest:
        raise ValueError(f"eta: expected 0 to 1 with DDIM, and 0 with DDPM, got {eta}")
