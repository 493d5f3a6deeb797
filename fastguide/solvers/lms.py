"""Linear multistep over sigma: k-diffusion's ``sample_lms``, the Adams and Bashforth methods for uneven steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import PredictionType
from ..schedules.sigmas import SigmaSpacing
from ._options import check_order
from ._quadrature import lagrange_integrals
from ._unscaled_calls import UnscaledCalls, unscaled_calls, unscaled_table
from .begin import begins_anywhere
from .entries import Entry, Form
from .table import StepTable


@begins_anywhere
def lms(
    schedule: NoiseSchedule,
    num_inference_steps: int | None = None,
    *,
    order: int = 4,
    prediction_type: PredictionType = "epsilon",
    sigma_spacing: SigmaSpacing | None = None,
    timestep_spacing: TimestepSpacing = "linspace",
    steps_offset: int = 0,
    timesteps: Tensor | Sequence[float] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    begin: int = 0,
) -> StepTable:
    """Return the steps of the linear multistep method.

    The slope (x - x_0) / sigma is extrapolated by a polynomial through the last ones:
    ``x' = x + sum_j slope_j * integral from sigma to sigma' of l_j`` (Hairer et al. 1993, section III.1).

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        order: how many slopes, 1 to 4.
        prediction_type: what the model returns: any but ``flow_prediction``.
        sigma_spacing, timestep_spacing, steps_offset, timesteps: as in ``euler``.
        sigmas: where the steps begin and where the last one ends, strictly falling to 0, instead of all that.
        begin: the first step; those before it are left out, as image-to-image does. The first steps have fewer slopes.
            (diffusers takes the weights of the full order there, with slopes missing.)

    Returns:
        The step table, its timesteps real. Its calls go on from earlier ones: it has ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import NoiseSchedule
    >>> table = lms(NoiseSchedule.scaled_linear(), 30)
    >>> table, table.history_slots
    (StepTable(lms, 30 steps, timesteps 999.0 .. 0.0, device=cpu), 3)
    """
    check_order("order", order, 4)
    calls = unscaled_calls(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        timesteps=timesteps,
        sigmas=sigmas,
        sigma_spacing=sigma_spacing,
        begin=begin,
    )
    return lms_table(calls, order, prediction_type)


def lms_table(
    calls: UnscaledCalls, order: int, prediction_type: PredictionType, before: Sequence[float] = ()
) -> StepTable:
    """Return ``lms`` over any calls.

    ``before``: sigmas before the first call, falling, as diffusers has them where it begins later: their slopes are
    missing, and the weights are those of the polynomials through them as well.
    """
    sigma, missing = calls.sigmas.tolist(), len(before)
    forms = []
    for call, (now, after) in enumerate(pairwise(sigma)):
        used = range(call, max(call - order, -1 - missing), -1)
        nodes = [sigma[earlier] if earlier >= 0 else before[earlier] for earlier in used]
        weights = dict(zip(used, lagrange_integrals(nodes, now, after), strict=True))
        forms.append(Form(sample=1.0).add({earlier: weights[earlier] for earlier in used if earlier >= 0}))
    return unscaled_table("lms", calls, forms, Entry.slope(calls.levels), prediction_type=prediction_type)
