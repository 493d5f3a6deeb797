"""diffusers' schedulers of EDM's preconditioning with the fused step."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..solvers import StepTable
from ..solvers._unscaled import SigmaSteps
from ..solvers.edm_dpm_solver import edm_dpm_solver_table
from ..solvers.edm_euler import edm_euler_table
from . import lazy_outputs
from .counted_step import left
from .guidance_arguments import Scale
from .host_tables import HostTables, on_host
from .noise import Generators
from .scaled_inputs import ScaledInputs
from .step_signatures import Draws, StepWithChurn, StepWithGenerator

__all__ = ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"]


class EDM(ScaledInputs):
    """What they share: the sigmas of diffusers, and what their model predicts."""

    _divides = False

    def _why_not(self) -> str | None:
        known = self.config.prediction_type in ("epsilon", "v_prediction")
        return None if known else "a configuration that rows do not express"

    def _steps(self, tables: HostTables, begin: int) -> SigmaSteps:
        return SigmaSteps(tables.sigmas_from(begin), tables.host_timesteps[begin:].double())

    def _multistep_table(self, tables: HostTables, begin: int, algorithm_type: Any) -> StepTable:
        config = self.config
        return edm_dpm_solver_table(
            self._steps(tables, begin),
            solver_order=config.solver_order,
            algorithm_type=algorithm_type,
            solver_type=config.solver_type,
            prediction_type=config.prediction_type,
            sigma_data=config.sigma_data,
            lower_order_final=config.lower_order_final,
            euler_at_final=config.euler_at_final,
            total=len(tables.host_timesteps),
        )


class EDMEulerScheduler(EDM, StepWithChurn, diffusers.EDMEulerScheduler):  # type: ignore[metaclass]
    """``diffusers.EDMEulerScheduler`` with the fused step."""

    _output = lazy_outputs.LazyEDMEulerOutput
    set_timesteps = on_host(diffusers.EDMEulerScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int, *arguments: Any) -> StepTable:
        steps, churned = self._steps(tables, begin), self._churn(tables, begin, arguments)
        return edm_euler_table(steps, churned, self.config.prediction_type, self.config.sigma_data)

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
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        churn = s_churn, s_tmin, s_tmax, s_noise
        if pred_original_sample is None:
            return super().step(
                model_output, timestep, sample, *churn, generator, return_dict, guidance_scale=guidance_scale
            )
        output, sample = left(self, model_output, sample, guidance_scale, "an x_0 that is given")
        own = diffusers.EDMEulerScheduler.step
        return own(self, output, timestep, sample, *churn, generator, return_dict, pred_original_sample)


class EDMDPMSolverMultistepScheduler(EDM, StepWithGenerator, diffusers.EDMDPMSolverMultistepScheduler):  # type: ignore[metaclass]
    """``diffusers.EDMDPMSolverMultistepScheduler`` with the fused step."""

    _plain_output = SchedulerOutput
    _noise_dtype = "original"
    set_timesteps = on_host(diffusers.EDMDPMSolverMultistepScheduler.set_timesteps)

    def _draws(self) -> Draws:
        return bool(self.config.algorithm_type == "sde-dpmsolver++")

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        return self._multistep_table(tables, begin, self.config.algorithm_type)
