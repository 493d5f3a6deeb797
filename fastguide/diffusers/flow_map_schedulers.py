"""diffusers' scheduler of flow maps with the fused step, whose timesteps say where a step begins and ends."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteSchedulerOutput
from torch import Tensor

from ..solvers import StepTable
from ..solvers.flow_match_euler import flow_match_euler_table
from .counted_step import counted_step, left
from .flow_schedulers import Flow
from .guidance_arguments import Scale
from .host_tables import HostTables, host_tables, on_host
from .timesteps import place_of

__all__ = ["FlowMapEulerDiscreteScheduler"]


class FlowMapEulerDiscreteScheduler(Flow, diffusers.FlowMapEulerDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.FlowMapEulerDiscreteScheduler`` with the fused step.

    The timestep says where a step begins, and the counter only counts; a step leads to the next timestep.
    """

    _plain_output = FlowMapEulerDiscreteSchedulerOutput
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
