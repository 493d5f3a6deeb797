"""diffusers' schedulers of pseudo linear multistep methods with the fused step, where they begin with them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..solvers import StepTable
from ..solvers._ipndm import ipndm_table
from ..solvers.pndm import pndm_table
from .counted_step import CountedStep, counted_step, left
from .guidance_arguments import Scale
from .host_alphas import HostAlphas
from .host_tables import HostTables, host_tables, on_host
from .step_signatures import StepWithoutNoise
from .timesteps import place_in, place_of

__all__ = ["IPNDMScheduler", "PNDMScheduler"]

_TWICE = "a loop that begins at a copy of a timestep that is there twice"


class PNDMScheduler(HostAlphas, CountedStep, diffusers.PNDMScheduler):  # type: ignore[metaclass]
    """``diffusers.PNDMScheduler`` with the fused step.

    diffusers counts its calls from 0, wherever they begin, and takes levels from the timestep that it is given.
    """

    _plain_output = SchedulerOutput
    _state = ("final_alpha_cumprod", "num_inference_steps")
    _levels_in = "alphas_cumprod"
    _sigmas_fall = False
    _first_call: int = 0
    counter: int
    final_alpha_cumprod: Tensor
    set_timesteps = on_host(diffusers.PNDMScheduler.set_timesteps)

    @property
    def _step_index(self) -> int:
        """The place in ``timesteps`` of the call that comes next."""
        return self._first_call + self.counter

    @_step_index.setter
    def _step_index(self, index: int | None) -> None:
        if index is None:  # set back
            self.counter, self._counted = 0, None
        else:
            self.counter = index - self._first_call

    def _why_not(self) -> str | None:
        if not self.config.skip_prk_steps:
            return "a warm-up by Runge and Kutta's method"
        known = self.config.prediction_type in ("epsilon", "v_prediction")
        return None if known else "a configuration that rows do not express"

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        told, abar = tables.host_timesteps[begin:], tables.host_sigmas
        ratio = self.config.num_train_timesteps // self.num_inference_steps
        starts = told.clone()
        starts[1:2] += ratio  # the second call repeats the step before
        ends = starts - ratio
        after = torch.where(ends >= 0, abar[ends.clamp(min=0)], float(self.final_alpha_cumprod))
        return pndm_table(told, abar[told], abar[starts.clamp(max=len(abar) - 1)], after, self.config.prediction_type)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        place = None
        if self.num_inference_steps:
            place = place_of(self.timesteps, host_tables(self).timestep_values, timestep)
        if self.counter == 0 and place is not None:
            self._first_call = place
            self._leave_if_it_may_be_another(place, timestep)
        is_over = self.counter > 0 and self._counted is not None and self._counted.is_over
        if is_over or (place is not None and (self.counter == 0 or self._is_told(place))):
            done = counted_step(self, (), model_output, timestep, sample, return_dict, guidance_scale)
            if done is not None:
                return done
        elif self._counted is not None and self._counted.history is not None and self.counter:
            told = host_tables(self).timestep_values
            expected = told[self._step_index] if self._step_index < len(told) else "none, as there are no more"
            raise RuntimeError(
                f"timestep: expected that of call {self.counter} of the loop, {expected}, got {timestep}"
            )
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, return_dict)  # type: ignore[misc]

    def _leave_if_it_may_be_another(self, place: int, timestep: Any) -> None:
        """Leave a loop that begins at a copy of a timestep that is there twice, of which it may be either."""
        told = host_tables(self).timestep_values
        is_view = isinstance(timestep, Tensor) and place_in(self.timesteps, timestep) is not None
        if not is_view and told.count(told[place]) > 1:
            self._counted, self._handed_over = None, _TWICE
        elif self._handed_over == _TWICE:
            self._handed_over = ""

    def _is_told(self, place: int) -> bool:
        """Tell whether a timestep at this place is the one of the next call."""
        told, index = host_tables(self).timestep_values, self._step_index
        return index < len(told) and told[place] == told[index]


class IPNDMScheduler(StepWithoutNoise, diffusers.IPNDMScheduler):  # type: ignore[metaclass]
    """``diffusers.IPNDMScheduler`` with the fused step."""

    _plain_output = SchedulerOutput
    _levels_in = "betas"
    _sigmas_fall = False
    _state = ("alphas",)
    alphas: Tensor
    betas: Tensor
    set_timesteps = on_host(diffusers.IPNDMScheduler.set_timesteps)

    def _why_not(self) -> str | None:
        longer = len(self.betas) > len(self.timesteps)
        return None if longer and len(self.alphas) == len(self.betas) else "a configuration that rows do not express"

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        alpha = self.alphas.detach().to("cpu", torch.float64)[begin:]
        return ipndm_table(alpha, tables.host_sigmas[begin:], tables.host_timesteps[begin:].double())
