"""DPM2, with a second call halfway in log(sigma), and its ancestral form: Lu et al. 2022, and k-diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ..schedules.sigmas import SigmaSpacing, timesteps_at
from ._begin import begins_anywhere
from ._unscaled_calls import unscaled_calls, unscaled_table
from .entries import Entry, Form
from .table import StepTable


@begins_anywhere
def dpm2(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    ancestral: bool = False,
    prediction_type: PredictionType = "epsilon",
    sigma_spacing: SigmaSpacing | None = None,
    timestep_spacing: TimestepSpacing = "linspace",
    steps_offset: int = 0,
    timesteps: Tensor | Sequence[float] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    begin: int = 0,
) -> StepTable:
    """Return the steps of DPM2, which follow the slope halfway to the next sigma (k-diffusion's ``sample_dpm_2``).

    A step makes two model calls: at sigma, and at the geometric mean of sigma and sigma', where Euler's method leads.
    The last step, to sigma 0, has one. The sample is unscaled, as in ``euler``. It is DPM-Solver-2 of Lu et al. 2022
    (algorithm 1) as Karras et al. 2022 step, over sigma.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        ancestral: whether a step leads to a smaller sigma, and noise to the next one, as in ``euler_ancestral``.
        prediction_type: what the model returns: any but ``flow_prediction``.
        sigma_spacing: as in ``euler``; with ``"karras"``, the model is told the nearest timesteps where a step begins.
        timestep_spacing, steps_offset, timesteps: as in ``euler``.
        sigmas: where the steps begin and where the last one ends, strictly falling to 0, instead of all that.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table of ``2 * steps - 1`` calls, its timesteps real. Its calls go on from earlier ones: it has
        ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import NoiseSchedule
    >>> dpm2(NoiseSchedule.scaled_linear(), 10, ancestral=True, timestep_spacing="trailing")
    StepTable(dpm2_ancestral, 10 steps in 19 calls, timesteps 999.0 .. 99.0, device=cpu)
    """
    if not isinstance(ancestral, bool):
        raise TypeError(f"ancestral: expected True or False, got {ancestral!r}")
    steps = unscaled_calls(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        timesteps=timesteps,
        sigmas=sigmas,
        sigma_spacing=sigma_spacing,
        begin=begin,
    )
    if sigma_spacing == "karras":  # as diffusers does
        steps = steps._replace(timesteps=steps.timesteps.round())
    forms, middles = [], []
    for step, (now, after) in enumerate(pairwise(steps.sigmas.tolist())):
        down = after * after / now if ancestral else after  # the root of after^2 - up^2
        middle, first = math.sqrt(now * down), 2 * step
        ratio = middle / now  # x1 = x + (middle - sigma) * (x - x_0) / sigma
        forms.append(Form(sample=ratio).add({first: 1 - ratio}))
        if after == 0:
            break
        middles.append(middle)
        slope = (down - now) / middle  # x' = x + (down - sigma) * (x1 - x_0') / middle, x = (x1 - (1-ratio)*x_0)/ratio
        noise = after * math.sqrt(now**2 - after**2) / now if ancestral else 0.0
        second = Form(anchor=1 / ratio, sample=slope, noise=noise)
        forms.append(second.add({first: 1 - 1 / ratio, first + 1: -slope}))
    between = torch.tensor(middles, dtype=torch.float64, device="cpu")
    calls = steps.with_second_calls(between, timesteps_at(schedule.sigmas, between))
    name = "dpm2_ancestral" if ancestral else "dpm2"
    return unscaled_table(name, calls, forms, Entry.original(calls.levels), prediction_type=prediction_type)
