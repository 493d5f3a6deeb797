"""The flow as a stochastic differential equation of the same marginals: Liu et al. 2025 (Flow-GRPO), section 4.2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedules.flow import FlowSchedule, FlowSteps
from ..schedules.levels import Levels
from ._columns import check_range, gradient_forms, inpainting_columns, x0_columns, x0_shift
from .table import StepTable


def flow_match_sde(
    schedule: FlowSchedule,
    num_inference_steps: int | None = None,
    *,
    noise_level: float = 0.7,
    sigmas: Tensor | Sequence[float] | None = None,
    timesteps: Tensor | Sequence[float] | None = None,
    mu: float | None = None,
) -> StepTable:
    """Return stochastic steps along a flow, whose samples at each level are distributed as the flow's own.

    With dt = sigma' - sigma < 0 and ``s = noise_level * sqrt(sigma / (1 - sigma))``, a step is (Flow-GRPO, arXiv
    2505.05470, eq. 9) ``x' = x + (v + s^2 / (2 sigma) * (x + (1 - sigma) v)) dt + s sqrt(-dt) z``. Every step draws
    noise, the last one too, so that each has a log-probability: ``guided_step(..., return_log_prob=True)``. At sigma =
    1, where s has no bound, the next sigma takes the place of this one in ``1 - sigma``, as in the paper's code.

    Args:
        schedule: the flow's sigmas: shifts, spacing, terminal value.
        num_inference_steps: number of steps, if ``sigmas`` or ``timesteps`` do not say them.
        noise_level: the paper's a, above 0 and at most 1000: how much is explored.
        sigmas, timesteps, mu: as in ``FlowSchedule.steps``.

    Returns:
        The step table, its timesteps real; the model returns a velocity, ``epsilon - x_0``, or that of its own time
        where the schedule's sigmas are inverted.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import FlowSchedule
    >>> flow_match_sde(FlowSchedule(shift=3.0), 10)
    StepTable(flow_match_sde, 10 steps, timesteps 1000.0 .. 8.92857142857143, device=cpu)
    """
    if not isinstance(schedule, FlowSchedule):
        raise TypeError(f"schedule: expected a FlowSchedule, got {type(schedule).__name__}")
    check_range("noise_level", noise_level, 0, 1e3, above=True)
    steps = schedule.steps(num_inference_steps, sigmas=sigmas, timesteps=timesteps, mu=mu)
    return flow_match_sde_table(steps, noise_level, inverted=schedule.invert_sigmas)


def flow_match_sde_table(steps: FlowSteps, noise_level: float, *, inverted: bool) -> StepTable:
    """Return ``flow_match_sde`` over any sigmas and timesteps; ``inverted``: the sigmas rise."""
    path = 1 - steps.sigmas if inverted else steps.sigmas  # falls from noise to 0
    now, after = path[:-1], path[1:]
    dt = after - now
    variance = noise_level**2 * now / (1 - torch.where(now == 1, after, now))  # s^2
    velocity = (1 + variance * (1 - now) / (2 * now)) * dt
    levels = Levels.flow_matching(now)
    columns = x0_columns("flow_prediction", levels, None, steps.timesteps, None)
    columns |= {"out_sample": 1 + variance / (2 * now) * dt, "out_pred": velocity, "out_noise": (-variance * dt).sqrt()}
    if inverted:  # of the time 1 - sigma
        columns |= {"x0_pred": -columns["x0_pred"], "out_pred": -velocity}
    direct = -velocity * now / levels.alpha  # velocity = (epsilon - x) / alpha moves with epsilon
    return StepTable.from_columns(
        steps.timesteps,
        columns | inpainting_columns(Levels.flow_matching(after)),
        gradients=gradient_forms(columns, x0_shift(levels), direct, steps.timesteps, -variance * dt),
        levels=levels,
        name="flow_match_sde",
    )
