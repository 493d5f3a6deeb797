"""diffusers' schedulers of flow matching with the fused step."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from ..schedules.flow import FlowSteps
from ..solvers import StepTable
from ..solvers.flow_match_euler import flow_match_euler_table
from .counted_step import CountedStep, counted_step, left
from .guidance_arguments import Scale
from .host_tables import HostTables, on_host
from .noise import Generators

__all__ = ["FlowMatchEulerDiscreteScheduler"]


class FlowMatchEulerDiscreteScheduler(CountedStep, diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMatchEulerDiscreteScheduler`` with the fused step."""

    _plain_output = FlowMatchEulerDiscreteSchedulerOutput
    _casts_back = True
    _sigmas_on_device = True
    set_timesteps = on_host(diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps)

    def _why_not(self) -> str | None:
        return None

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        steps = FlowSteps(tables.sigmas_from(begin), tables.host_timesteps[begin:])
        return flow_match_euler_table(
            steps, stochastic=self.config.stochastic_sampling, inverted=bool(self.config.invert_sigmas)
        )

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        if per_token_timesteps is None and not is_integer_timestep(timestep):
            done = counted_step(
                self, (), model_output, timestep, sample, generator, return_dict, guidance_scale,
                draws=bool(self.config.stochastic_sampling), noise_dtype=torch.float32,
            )  # fmt: skip
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(  # type: ignore[misc]
            output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, per_token_timesteps, return_dict
        )


def is_integer_timestep(timestep: Any) -> bool:
    """Tell whether a timestep is one of those that diffusers refuses where its own are real."""
    if type(timestep) is Tensor:
        return timestep.dtype in (torch.int32, torch.int64) and timestep.is_cpu
    return isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))
