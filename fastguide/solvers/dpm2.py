"""DPM2, with a second call halfway in log(sigma), and its ancestral form: Lu et al. 2022, and k-diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ..schedules.sigmas import SigmaSpacing, timesteps_at
from ._unscaled_calls import UnscaledCalls, unscaled_calls, unscaled_table
from .begin import begins_anywhere
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
    begins = steps.sigmas[:-1]
    down = begins[1:].square() / begins[:-1] if ancestral else begins[1:]  # the root of after^2 - up^2
    middles = (begins[:-1] * down).sqrt()
    calls = steps.with_second_calls(middles, timesteps_at(schedule.sigmas, middles))
    return dpm2_table(calls, down, prediction_type, ancestral=ancestral)


def dpm2_table(
    calls: UnscaledCalls,
    downs: Tensor,
    prediction_type: PredictionType,
    *,
    ancestral: bool,
    ups: Tensor | None = None,
) -> StepTable:
    """Return ``dpm2`` over any calls, and the sigmas that the steps but the last lead to before their noise.

    ``ups``: the deviations of that noise; ``None``: those that lead from ``downs`` to where the steps end.
    """
    forms, sigma, down_to = [], calls.sigmas.tolist(), downs.tolist()
    for first in range(0, len(sigma) - 1, 2):
        now, last = sigma[first], first == len(sigma) - 2
        middle, after = sigma[first + 1], 0.0 if last else sigma[first + 2]
        ratio = middle / now  # x1 = x + (middle - sigma) * (x - x_0) / sigma
        forms.append(Form(sample=ratio).add({first: 1 - ratio}))
        if last:
            break
        down = down_to[first // 2]
        slope = (down - now) / middle  # x' = x + (down - sigma) * (x1 - x_0') / middle, x = (x1 - (1-ratio)*x_0)/ratio
        if ups is not None:
            noise = float(ups[first // 2])
        else:
            noise = after * math.sqrt(now**2 - after**2) / now if ancestral else 0.0
        second = Form(anchor=1 / ratio, sample=slope, noise=noise)
        forms.append(second.add({first: 1 - 1 / ratio, first + 1: -slope}))
    name = "dpm2_ancestral" if ancestral else "dpm2"
    return unscaled_table(name, calls, forms, Entry.original(calls.levels), prediction_type=prediction_type)
