"""diffusers' schedulers of flow matching with the fused step."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers import scheduling_flow_map_euler_discrete as theirs_map
from diffusers.schedulers import scheduling_flow_match_euler_discrete as theirs_euler
from diffusers.schedulers import scheduling_flow_match_heun_discrete as theirs_heun
from diffusers.schedulers import scheduling_flow_match_lcm as theirs_lcm
from diffusers.schedulers import scheduling_ltx_euler_ancestral_rf as theirs_ancestral
from torch import Tensor

from ..schedules.flow import FlowSteps
from ..solvers import StepTable
from ..solvers._flow_ancestral import flow_ancestral_table
from ..solvers.flow_match_euler import flow_match_euler_table
from ..solvers.flow_match_heun import flow_match_heun_table
from .counted_step import CountedStep, counted_step, left
from .drawing import Drawing
from .dtypes import Dtypes, of_the_model, of_the_sample
from .guidance_arguments import Scale
from .host_tables import HostTables, host_tables, on_host
from .noise import Generators
from .per_token import per_token_step
from .step_signatures import Draws, StepWithChurn, StepWithGenerator
from .timesteps import place_of
from .two_calls import TwoCalls

__all__ = [
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
]


class _Flow(CountedStep):
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


class FlowMatchEulerDiscreteScheduler(_Flow, diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMatchEulerDiscreteScheduler`` with the fused step."""

    _plain_output = theirs_euler.FlowMatchEulerDiscreteSchedulerOutput
    set_timesteps = on_host(diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps)

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


class FlowMatchHeunDiscreteScheduler(TwoCalls, _Flow, StepWithChurn, diffusers.FlowMatchHeunDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMatchHeunDiscreteScheduler`` with the fused step."""

    _plain_output = theirs_heun.FlowMatchHeunDiscreteSchedulerOutput
    _sigmas_fall = False
    set_timesteps = on_host(diffusers.FlowMatchHeunDiscreteScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int, *arguments: Any) -> StepTable:
        return flow_match_heun_table(self._flow_steps(tables, begin), self._churn(tables, begin, arguments))

    def _churns_at(self, call: int, begin: int) -> int:
        return begin + call - call % 2  # the second call draws as well, and does not use it


class FlowMatchLCMScheduler(_Flow, StepWithGenerator, diffusers.FlowMatchLCMScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMatchLCMScheduler`` with the fused step."""

    _plain_output = theirs_lcm.FlowMatchLCMSchedulerOutput
    _noise_dtype = "original"
    _state = ("_scale_factors", "_upscale_mode")
    _scale_factors: list[float] | None
    _upscale_mode: str | None
    set_timesteps = on_host(diffusers.FlowMatchLCMScheduler.set_timesteps)

    def _why_not(self) -> str | None:
        return "sizes that change from step to step" if self._scale_factors and self._upscale_mode else None

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        return flow_match_euler_table(self._flow_steps(tables, begin), stochastic=True, inverted=False)


class FlowMapEulerDiscreteScheduler(_Flow, diffusers.FlowMapEulerDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMapEulerDiscreteScheduler`` with the fused step.

    The timestep says where a step begins, and the counter only counts; a step leads to the next timestep.
    """

    _plain_output = theirs_map.FlowMapEulerDiscreteSchedulerOutput
    _refuses_integers = False
    _sigmas_fall = False
    set_timesteps = on_host(diffusers.FlowMapEulerDiscreteScheduler.set_timesteps)

    def _tables_are_set(self, device: str | torch.device | None) -> None:
        if device is not None and torch.device(device).type in ("mps", "npu"):  # which have no float64
            self.sigmas, self.timesteps = self.sigmas.float(), self.timesteps.float()
        super()._tables_are_set(device)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        return flow_match_euler_table(self._flow_steps(tables, begin), stochastic=False, inverted=False)

    def _place_of(self, timestep: Any) -> int | None:
        """Return the first of its timesteps with a value, as far as the host knows that; ``None``: there is none."""
        told = host_tables(self).timestep_values
        place = place_of(self.timesteps, told, timestep)
        return None if place is None else told.index(told[place])

    def _sigma_of(self, timestep: Any) -> float | None:
        """Return the sigma that diffusers takes for a timestep; ``None``: the host does not know it."""
        tables, place = host_tables(self), self._place_of(timestep)
        if place is not None:
            return tables.sigma_values[place]
        if isinstance(timestep, Tensor) and (timestep.numel() != 1 or not timestep.is_cpu):
            return None
        value = float(timestep)
        is_near = min(abs(each - value) for each in tables.timestep_values) <= 2e-3  # diffusers takes that one's
        return None if is_near else value / float(self._internal_dict["num_train_timesteps"])

    def _init_step_index(self, timestep: Any) -> None:
        place = self._place_of(timestep) if self._begin_index is None else self._begin_index
        if place is None:
            diffusers.FlowMapEulerDiscreteScheduler._init_step_index(self, timestep)
        else:
            self._step_index = place

    def _why_not_between(self, place: int | None, r_timestep: Any) -> str | None:
        """Say why a step from one of its timesteps is left to diffusers; ``None``: it is not."""
        if place is None:
            return "a timestep that is not one of its own"
        leads_on = r_timestep is None or self._sigma_of(r_timestep) == host_tables(self).sigma_values[place + 1]
        return None if leads_on else "an r_timestep that is not the next one"

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        r_timestep: float | Tensor | None = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        place = self._place_of(timestep)
        reason = self._why_not_between(place, r_timestep)
        if reason is None:
            if self._step_index is None:
                self._init_step_index(timestep)
            counter, done = self._step_index, None
            assert counter is not None
            self._step_index = place
            try:
                done = counted_step(self, (), model_output, timestep, sample, return_dict, guidance_scale)
            finally:
                self._step_index = counter if done is None else counter + 1
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale, reason)
        return super().step(output, timestep, sample, r_timestep, return_dict)  # type: ignore[misc]


class LTXEulerAncestralRFScheduler(_Flow, StepWithGenerator, diffusers.LTXEulerAncestralRFScheduler):  # type: ignore[metaclass]
    """``diffusers.LTXEulerAncestralRFScheduler`` with the fused step.

    Where it is given sigmas, its last timestep is where the last step ends.
    """

    _plain_output = theirs_ancestral.LTXEulerAncestralRFSchedulerOutput
    _noise_dtype = torch.float32
    set_timesteps = on_host(diffusers.LTXEulerAncestralRFScheduler.set_timesteps)

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_sample(sample, model)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        sigmas = tables.host_sigmas
        steps = FlowSteps(sigmas[begin:], tables.host_timesteps[begin : len(sigmas) - 1])
        return flow_ancestral_table(steps, self.config.eta, self.config.s_noise)

    def _draws(self) -> Draws:
        if not (self._internal_dict["eta"] > 0 and self._internal_dict["s_noise"] > 0):
            return False

        def draws(table: StepTable, call: int) -> bool:
            assert self._counted is not None
            return abs(host_tables(self).sigma_values[self._counted.begin + call + 1]) >= 1e-8

        return draws

    def _why_not_at(self, timestep: Any) -> str | None:
        return None if self._step_index is None else self._why_not_from(self._step_index)

    def _why_not_from(self, begin: int) -> str | None:
        over = begin >= len(self.sigmas) - 1
        return "a step after the last, which gives back its sample" if over else None
