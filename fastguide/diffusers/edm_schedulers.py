"""diffusers' schedulers of EDM's preconditioning with the fused step."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..solvers import StepTable
from ..solvers._unscaled import SigmaSteps
from ..solvers.edm_dpm_solver import edm_dpm_solver_table
from ..solvers.edm_euler import edm_euler_table
from ..step.guided_step import guided_step
from ..step.memory import empty_like
from . import lazy_outputs
from .counted_anew import warn_of_unscaled_inputs
from .counted_step import is_integer, left
from .fitted import SHAPES, fitted_predictions, refusal_of
from .guidance_arguments import Scale, guidance_of
from .host_tables import HostTables, host_tables, on_host
from .lazy_guidance import resolved
from .lazy_outputs import LazyOriginal
from .lazy_tensor import plain
from .noise import Generators
from .noising import noised_by_count
from .scaled_inputs import ScaledInputs
from .scheduler_step import LEFT, count, count_fused
from .step_signatures import Draws, StepWithChurn, StepWithGenerator
from .traced import Fusion, traced

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
    """``diffusers.EDMEulerScheduler`` with the fused step.

    Cosmos' pipelines ask it for x_0 first, guide that, and give it to a second step: they get it traced, and the
    second step does guidance and the update.
    """

    _output = lazy_outputs.LazyEDMEulerOutput
    _given: tuple[HostTables, StepTable] | None = None
    """The rows of steps that are given their x_0, and the tables that they are of."""
    set_timesteps = on_host(diffusers.EDMEulerScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.EDMEulerScheduler.add_noise)

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
            fusion = None if return_dict else _tracing(self._fusion, sys._getframe(1).f_code)
            done = super().step(
                model_output, timestep, sample, *churn, generator, return_dict, guidance_scale=guidance_scale
            )
            return done if fusion is None else (done[0], traced(LazyOriginal._computed(done[1]), fusion))
        reason = None if s_churn == 0 else "an x_0 that is given, and churn"
        reason = "guidance of an x_0 that is given" if guidance_scale is not None else reason
        if reason is None and not is_integer(timestep) and self.num_inference_steps is not None:
            result = self._from_original(model_output.dtype, timestep, plain(sample), pred_original_sample)
            if result is not None:
                if not return_dict:
                    return result, pred_original_sample
                return self._output.plain(result, plain(pred_original_sample))
        output, sample = left(self, model_output, sample, guidance_scale, reason)
        own, given = diffusers.EDMEulerScheduler.step, plain(pred_original_sample)
        return own(self, output, timestep, sample, *churn, generator, return_dict, given)

    def _from_original(self, dtype: torch.dtype, timestep: Any, sample: Tensor, given: Any) -> Tensor | None:
        """Return the next sample of a step that is given its x_0; ``None``: it is left to diffusers."""
        original, scale = resolved(given, sample, None)
        guidance = guidance_of(original, sample, scale, None, 1.0, "epsilon")
        refusal = "torch.compile" if is_dynamo_compiling() else refusal_of(sample, original, None, None)
        fitted = None if refusal else fitted_predictions(original, sample.contiguous(), guidance, False)
        begins = self._step_index is None
        if begins:
            self._init_step_index(timestep)
        index = self._step_index
        if fitted is None or index is None or index >= len(self.timesteps):
            count(self, LEFT + (refusal or SHAPES))
            return None
        if begins:
            warn_of_unscaled_inputs(self)
        x = sample.contiguous()
        x = x.double() if torch.float64 in (dtype, original.dtype) else x
        result = guided_step(self._originals(x.device), index, x, fitted[0], guidance, out=empty_like(x, dtype))
        self._step_index = index + 1
        count_fused(self, guidance, is_last=index + 1 == len(self.timesteps))
        return result

    def _originals(self, device: torch.device) -> StepTable:
        """Return the rows of ``x' = sigma' / sigma * x + (1 - sigma' / sigma) * x_0``, with x_0 as the prediction."""
        tables = host_tables(self)
        if self._given is None or self._given[0] is not tables or self._given[1].device != device:
            sigmas = tables.sigmas_from(0)
            kept = sigmas[1:] / sigmas[:-1]
            columns = {"out_sample": kept, "out_pred": 1 - kept}
            made = StepTable.from_columns(tables.host_timesteps, columns, name="edm_euler of x_0")
            self._given = tables, made.to(device)
        return self._given[1]


def _tracing(fusion: Fusion | None, caller: CodeType) -> Fusion | None:
    """Return what traces for a pipeline whose own code asks for a step; ``None``: nothing does, or others ask."""
    traces = fusion is not None and fusion.tries and id(caller) in fusion.callers
    return fusion if traces and not torch.is_grad_enabled() and not is_dynamo_compiling() else None


class EDMDPMSolverMultistepScheduler(EDM, StepWithGenerator, diffusers.EDMDPMSolverMultistepScheduler):  # type: ignore[metaclass]
    """``diffusers.EDMDPMSolverMultistepScheduler`` with the fused step."""

    _plain_output = SchedulerOutput
    _noise_dtype = "original"
    set_timesteps = on_host(diffusers.EDMDPMSolverMultistepScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.EDMDPMSolverMultistepScheduler.add_noise)

    def _draws(self) -> Draws:
        return bool(self.config.algorithm_type == "sde-dpmsolver++")

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        return self._multistep_table(tables, begin, self.config.algorithm_type)
