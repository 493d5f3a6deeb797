"""diffusers' schedulers of flow matching with the fused step."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete as theirs_euler
from diffusers.schedulers import scheduling_flow_match_heun_discrete as theirs_heun
from diffusers.schedulers import scheduling_flow_match_lcm as theirs_lcm
from torch import Tensor

from ..schedules.flow import FlowSteps
from ..solvers import StepTable
from ..solvers.flow_match_euler import flow_match_euler_table
from ..solvers.flow_match_heun import flow_match_heun_table
from .counted_step import CountedStep, counted_step, left
from .drawing import Drawing
from .dtypes import Dtypes, of_the_model
from .guidance_arguments import Scale
from .host_tables import HostTables, on_host
from .noise import Generators
from .noising import noised_by_count
from .per_token import per_token_step
from .step_signatures import StepWithChurn, StepWithGenerator
from .two_calls import TwoCalls

__all__ = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
]


class Flow(CountedStep):
    """What they share: the sigmas of diffusers, on the device, and samples that it casts to the model's dtype."""

    _sigmas_on_device = True
    _refuses_integers = True

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_model(sample, model)

    def _why_not(self) -> str | None:
        return None

    def _flow_steps(self, tables: HostTables, begin: int) -> FlowSteps:
        return FlowSteps(tables.sigmas_from(begin), tables.host_timesteps[begin:])


class FlowMatchEulerDiscreteScheduler(Flow, diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMatchEulerDiscreteScheduler`` with the fused step."""

    _plain_output = theirs_euler.FlowMatchEulerDiscreteSchedulerOutput
    set_timesteps = on_host(diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps)
    scale_noise = noised_by_count(diffusers.FlowMatchEulerDiscreteScheduler.scale_noise)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample: pipelines ask for this of any class but diffusers' own, which has no such method."""
        return sample

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        stochastic = bool(self.config.stochastic_sampling)
        inverted = bool(self.config.invert_sigmas) and not stochastic  # diffusers inverts the drift alone
        return flow_match_euler_table(self._flow_steps(tables, begin), stochastic=stochastic, inverted=inverted)

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
        if per_token_timesteps is None:
            stochastic = self._internal_dict["stochastic_sampling"]
            drawing = Drawing(generator, dtype=torch.float32) if stochastic else None
            done = counted_step(self, (), model_output, timestep, sample, return_dict, guidance_scale, drawing)
        else:
            result = per_token_step(self, model_output, timestep, sample, per_token_timesteps, guidance_scale)
            done = None if result is None else self._result(result, None, result.dtype, return_dict)
        if done is not None:
            return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(  # type: ignore[misc]
            output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, per_token_timesteps, return_dict
        )


class FlowMatchHeunDiscreteScheduler(TwoCalls, Flow, StepWithChurn, diffusers.FlowMatchHeunDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMatchHeunDiscreteScheduler`` with the fused step."""

    _plain_output = theirs_heun.FlowMatchHeunDiscreteSchedulerOutput
    _sigmas_fall = False
    set_timesteps = on_host(diffusers.FlowMatchHeunDiscreteScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int, *arguments: Any) -> StepTable:
        return flow_match_heun_table(self._flow_steps(tables, begin), self._churn(tables, begin, arguments))

    def _churns_at(self, call: int, begin: int) -> int:
        return begin + call - call % 2  # the second call draws as well, and does not use it


class FlowMatchLCMScheduler(Flow, StepWithGenerator, diffusers.FlowMatchLCMScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMatchLCMScheduler`` with the fused step."""

    _plain_output = theirs_lcm.FlowMatchLCMSchedulerOutput
    _noise_dtype = "original"
    _state = ("_scale_factors", "_upscale_mode")
    _scale_factors: list[float] | None
    _upscale_mode: str | None
    set_timesteps = on_host(diffusers.FlowMatchLCMScheduler.set_timesteps)
    scale_noise = noised_by_count(diffusers.FlowMatchLCMScheduler.scale_noise)

    def _why_not(self) -> str | None:
        return "sizes that change from step to step" if self._scale_factors and self._upscale_mode else None

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        return flow_match_euler_table(self._flow_steps(tables, begin), stochastic=True, inverted=False)
