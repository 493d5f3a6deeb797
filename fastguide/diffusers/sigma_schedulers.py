"""diffusers' schedulers of unscaled samples with the fused step: Euler's, Heun's, DPM2 and LMS."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ..schedules.predictions import PredictionType
from ..solvers import StepTable
from ..solvers._unscaled import SigmaSteps
from ..solvers._unscaled_calls import UnscaledCalls
from ..solvers.dpm2 import dpm2_table
from ..solvers.euler import euler_table
from ..solvers.euler_ancestral import euler_ancestral_table
from ..solvers.heun import heun_table
from ..solvers.lms import lms_table
from . import lazy_outputs
from .counted_step import counted_step, left
from .dtypes import Dtypes, of_the_model
from .guidance_arguments import Scale
from .host_tables import HostTables, on_host
from .noising import noised_by_count
from .scaled_inputs import ScaledInputs
from .step_signatures import Draws, StepWithChurn, StepWithGenerator, StepWithoutNoise
from .two_calls import TwoCalls

__all__ = [
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
]


class Sigmas(ScaledInputs):
    """What they share: the prediction types that rows express, and the loop's calls."""

    _predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")

    def _why_not(self) -> str | None:
        known = self.config.prediction_type in self._predictions
        return None if known else "a configuration that rows do not express"

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step; what a model that predicts x_0 returns is in the output as it is."""
        dtypes = super()._dtypes(sample, model)
        return dtypes._replace(original=model) if self._prediction == "sample" else dtypes

    def _steps(self, tables: HostTables, begin: int) -> SigmaSteps:
        return SigmaSteps(tables.sigmas_from(begin), tables.host_timesteps[begin:].double())

    def _calls(self, tables: HostTables, begin: int, per_step: int) -> UnscaledCalls:
        sigmas, told = self._steps(tables, begin)
        ends = tuple(per_step == 1 or call % 2 == 1 or call == len(told) - 1 for call in range(len(told)))
        return UnscaledCalls(sigmas, told, 1.0, ends)

    @property
    def _prediction(self) -> PredictionType:
        found: PredictionType = self.config.prediction_type
        return found


class EulerDiscreteScheduler(Sigmas, StepWithChurn, diffusers.EulerDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.EulerDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyEulerOutput
    set_timesteps = on_host(diffusers.EulerDiscreteScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.EulerDiscreteScheduler.add_noise)

    def _loop_table(self, tables: HostTables, begin: int, *arguments: Any) -> StepTable:
        return euler_table(self._steps(tables, begin), self._churn(tables, begin, arguments), self._prediction)


class EulerAncestralDiscreteScheduler(Sigmas, StepWithGenerator, diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.EulerAncestralDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyEulerAncestralOutput
    _refuses_integers = True
    _predictions = ("epsilon", "v_prediction")
    set_timesteps = on_host(diffusers.EulerAncestralDiscreteScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.EulerAncestralDiscreteScheduler.add_noise)

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_model(sample, model)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        return euler_ancestral_table(self._steps(tables, begin), self._prediction)


class HeunDiscreteScheduler(TwoCalls, Sigmas, StepWithoutNoise, diffusers.HeunDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.HeunDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyHeunOutput
    _sigmas_fall = False
    set_timesteps = on_host(diffusers.HeunDiscreteScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.HeunDiscreteScheduler.add_noise)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        clip = self.config.clip_sample_range if self.config.clip_sample else None
        return heun_table(self._calls(tables, begin, 2), self._prediction, clip)


class KDPM2DiscreteScheduler(TwoCalls, Sigmas, StepWithoutNoise, diffusers.KDPM2DiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.KDPM2DiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyKDPM2Output
    _sigmas_fall = False
    _predictions = ("epsilon", "v_prediction")
    _further_tables = ("sigmas_interpol",)
    set_timesteps = on_host(diffusers.KDPM2DiscreteScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.KDPM2DiscreteScheduler.add_noise)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        calls = self._calls(tables, begin, 2)
        # diffusers' sigmas are s_0, s_1, s_1, ..., and those halfway have a table of their own, one call later
        middles = tables.host_further[0].double()[begin + 1 :: 2]
        return dpm2_table(with_middles(calls, middles), calls.sigmas[1:-1:2], self._prediction, ancestral=False)


class KDPM2AncestralDiscreteScheduler(TwoCalls, Sigmas, StepWithGenerator, diffusers.KDPM2AncestralDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.KDPM2AncestralDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyKDPM2AncestralOutput
    _sigmas_fall = False
    _predictions = ("epsilon", "v_prediction")
    _further_tables = ("sigmas_interpol", "sigmas_down", "sigmas_up")
    set_timesteps = on_host(diffusers.KDPM2AncestralDiscreteScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.KDPM2AncestralDiscreteScheduler.add_noise)

    def _draws(self) -> Draws:
        return lambda table, call: call % 2 == 1

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        calls = self._calls(tables, begin, 2)
        middles, downs, ups = (values.double()[begin::2] for values in tables.host_further)
        return dpm2_table(with_middles(calls, middles), downs, self._prediction, ancestral=True, ups=ups)


def with_middles(calls: UnscaledCalls, middles: Tensor) -> UnscaledCalls:
    """Return calls at the sigmas where steps begin, and halfway; of diffusers', which has the former only."""
    sigmas = calls.sigmas.clone()
    sigmas[2:-1:2] = calls.sigmas[1:-2:2]
    sigmas[1:-1:2] = middles[: len(sigmas[1:-1:2])]
    return calls._replace(sigmas=sigmas)


class LMSDiscreteScheduler(Sigmas, diffusers.LMSDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.LMSDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyLMSOutput
    _default_arguments = (4,)
    set_timesteps = on_host(diffusers.LMSDiscreteScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.LMSDiscreteScheduler.add_noise)

    def _loop_table(self, tables: HostTables, begin: int, order: int) -> StepTable:
        before = tables.host_sigmas[:begin].tolist()
        return lms_table(self._calls(tables, begin, 1), order, self._prediction, before)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        if order in (1, 2, 3, 4):
            done = counted_step(self, (order,), model_output, timestep, sample, return_dict, guidance_scale)
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, order, return_dict)  # type: ignore[misc]
