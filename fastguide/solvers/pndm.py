"""PNDM, pseudo linear multistep: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds"."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ._columns import NO_VARIANCE, check_schedule, inpainting_columns, visited_timesteps, x0_columns
from ._options import check_flags
from .begin import begins_anywhere, check_begin
from .entries import Entry, Form, history_columns, history_gradients
from .table import StepTable

ADAMS_BASHFORTH = (  # Adams and Bashforth's, of the newest prediction first (eq. 12)
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@begins_anywhere
def pndm(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    prediction_type: PredictionType = "epsilon",
    timestep_spacing: TimestepSpacing = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
    timesteps: Tensor | Sequence[int] | None = None,
    begin: int = 0,
) -> StepTable:
    """Return the steps of the pseudo linear multistep method, PLMS, the default of Stable Diffusion 1.

    A step is DDIM's (Liu et al. 2022, eq. 11), with the last four predictions in the proportions of Adams and
    Bashforth. The first step makes two model calls, and takes the mean of both; the warm-up by Runge and Kutta of the
    paper (``skip_prk_steps=False`` in diffusers) needs more than three tensors of history and is left out.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` does not say them.
        prediction_type: what the model returns. v is combined as v, all others as epsilon.
        timestep_spacing, steps_offset, timesteps: as in ``ddim``.
        set_alpha_to_one: the last step leads to abar = 1; otherwise to the abar of timestep 0.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table, of one call more than steps. Its calls go on from earlier ones: it has ``history_slots``. A step
        leads to the next timestep of the table; diffusers subtracts the same number at every step.

    Raises:
        TypeError, ValueError: an argument is not as described; epsilon at a timestep without signal.

    >>> from fastguide import NoiseSchedule
    >>> table = pndm(NoiseSchedule.scaled_linear(), 50, steps_offset=1)
    >>> table, table.history_slots
    (StepTable(pndm, 50 steps in 51 calls, timesteps 981 .. 1, device=cpu), 3)
    """
    check_schedule(schedule)
    check_flags(set_alpha_to_one=set_alpha_to_one)
    every = visited_timesteps(schedule, num_inference_steps, timestep_spacing, steps_offset, timesteps)
    check_begin(begin, len(every))
    visited = every[begin:]
    final = visited.new_tensor([1.0], dtype=torch.float64) if set_alpha_to_one else schedule.alphas_cumprod[:1]
    abar = torch.cat([schedule.alphas_cumprod[visited], final])
    calls = _called_twice(visited)
    after = torch.cat([abar[1:2], abar[1:]]) if len(visited) > 1 else abar[1:]
    before = torch.cat([abar[:1], abar[:-1]]) if len(visited) > 1 else abar[:1]
    return pndm_table(calls, schedule.alphas_cumprod[calls], before, after, prediction_type)


def pndm_table(
    timesteps: Tensor, here: Tensor, before: Tensor, after: Tensor, prediction_type: PredictionType
) -> StepTable:
    """Return ``pndm`` over any calls, of which the second repeats the first one's step.

    Args:
        timesteps: what the model is told, shape (calls,).
        here: abar of the calls' samples.
        before, after: abar where the calls' steps begin and end.
        prediction_type: as in ``pndm``.
    """
    levels = Levels.from_alphas_cumprod(here)
    velocity = prediction_type == "v_prediction"
    columns = x0_columns(prediction_type, levels, None, timesteps, None)
    if bool((before == 0).any()):
        raise ValueError(
            f"timesteps: expected some signal where a step begins, which divides by it; got {int(timesteps[0])}, where "
            "the schedule has none"
        )
    forms = _forms(list(zip(before.tolist(), after.tolist(), strict=True)), velocity)
    columns |= history_columns(forms, Entry.velocity(levels) if velocity else Entry.epsilon(levels))
    known = after.clone()
    known[-1] = 1.0  # a known image is clean after the last step
    return StepTable.from_columns(
        timesteps,
        columns | inpainting_columns(Levels.from_alphas_cumprod(known)),
        gradients=history_gradients(columns, levels, timesteps, NO_VARIANCE),
        levels=levels,
        completes_step=[call > 0 or len(timesteps) == 1 for call in range(len(timesteps))],
        name="pndm",
    )


def _called_twice(values: Tensor) -> Tensor:
    """Return the values of the calls: the second step's twice, as the first step's second call is made there."""
    return torch.cat([values[:2], values[1:]]) if len(values) > 1 else values


def _forms(steps: Sequence[tuple[float, float]], velocity: bool) -> list[Form]:
    """Return the forms of calls whose steps lead from one abar to another."""
    forms, kept = [], list[int]()
    factors = [_transfer(a, a_next, velocity) for a, a_next in steps]
    for call, (sample, prediction) in enumerate(factors):
        if call == 1:  # again from the first one's sample, which is (x1 - prediction * m) / sample with its factors
            before, prediction_before = factors[0]
            again = sample / before
            first = prediction / 2 - again * prediction_before
            forms.append(Form(anchor=again).add({0: first, 1: prediction / 2}))
            continue
        kept = [call, *kept][:4]
        weights = dict(zip(kept, ADAMS_BASHFORTH[len(kept) - 1], strict=True))
        forms.append(Form(sample=sample).add(weights, prediction))
    return forms


def _transfer(a: float, a_next: float, velocity: bool) -> tuple[float, float]:
    """Return the factors of the sample and of the prediction (Liu et al. 2022, eq. 11)."""
    noise = 1 - a
    sample = math.sqrt(a_next / a)
    epsilon = -(a_next - a) / (a * math.sqrt(1 - a_next) + math.sqrt(a * noise * a_next))
    if not velocity:
        return sample, epsilon
    return sample + epsilon * math.sqrt(noise), epsilon * math.sqrt(a)  # epsilon is sqrt(a) * v + sqrt(1 - a) * x
