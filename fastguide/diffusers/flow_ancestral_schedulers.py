"""diffusers' ancestral scheduler of LTX's flow with the fused step."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ltx_euler_ancestral_rf import LTXEulerAncestralRFSchedulerOutput

from ..schedules.flow import FlowSteps
from ..solvers import StepTable
from ..solvers._flow_ancestral import flow_ancestral_table
from .dtypes import Dtypes, of_the_sample
from .flow_schedulers import Flow
from .host_tables import HostTables, host_tables, on_host
from .step_signatures import Draws, StepWithGenerator

__all__ = ["LTXEulerAncestralRFScheduler"]


class LTXEulerAncestralRFScheduler(Flow, StepWithGenerator, diffusers.LTXEulerAncestralRFScheduler):  # type: ignore[metaclass]
    """``diffusers.LTXEulerAncestralRFScheduler`` with the fused step.

    Where it is given sigmas, its last timestep is where the last step ends.
    """

    _plain_output = LTXEulerAncestralRFSchedulerOutput
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
