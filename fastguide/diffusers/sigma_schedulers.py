"""diffusers' schedulers of unscaled samples with the fused step: Euler's, Heun's, DPM2 and LMS."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ..schedules.predictions import PredictionType
from ..solvers import StepTable
from ..solvers._unscaled import Churn, SigmaSteps, churn
from ..solvers._unscaled_calls import UnscaledCalls
from ..solvers.dpm2 import dpm2_table
from ..solvers.euler import euler_table
from ..solvers.euler_ancestral import euler_ancestral_table
from ..solvers.heun import heun_table
from ..solvers.lms import lms_table
from . import lazy_outputs
from .counted_step import CountedStep, counted_step, left
from .flow_schedulers import is_integer_timestep
from .guidance_arguments import Scale
from .host_tables import HostTables, host_tables, on_host
from .noise import Generators

__all__ = [
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
]


class _Sigmas(CountedStep):
    """What they share: the prediction types that rows express, and the loop's calls."""

    _predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    sigmas_interpol: Tensor
    sigmas_down: Tensor

    def _why_not(self) -> str | None:
        known = self.config.prediction_type in self._predictions
        return None if known else "a configuration that rows do not express"

    def _calls(self, tables: HostTables, begin: int, per_step: int) -> UnscaledCalls:
        told = tables.host_timesteps[begin:].double()
        ends = tuple(per_step == 1 or call % 2 == 1 or call == len(told) - 1 for call in range(len(told)))
        return UnscaledCalls(tables.sigmas_from(begin), told, 1.0, ends)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first one of a step that makes two."""
        loop = self._counted
        if loop is None or loop.table is None or self._step_index is None:
            return bool(super().state_in_first_order)  # type: ignore[misc]
        return (self._step_index - loop.begin) % 2 == 0

    @property
    def _prediction(self) -> PredictionType:
        found: PredictionType = self.config.prediction_type
        return found


class EulerDiscreteScheduler(_Sigmas, diffusers.EulerDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.EulerDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyEulerOutput
    _default_arguments = (0.0, 0.0, float("inf"), 1.0)
    _casts_back = True
    set_timesteps = on_host(diffusers.EulerDiscreteScheduler.set_timesteps)

    def _loop_table(
        self, tables: HostTables, begin: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
    ) -> StepTable:
        every = churn(tables.host_sigmas, s_churn, s_tmin, s_tmax, s_noise)  # divided among all steps
        steps, last = SigmaSteps(tables.sigmas_from(begin), tables.host_timesteps[begin:].double()), len(self.timesteps)
        return euler_table(steps, Churn(every.sigmas[begin:last], every.noise[begin:last]), self._prediction)

    def _churns(self, s_churn: float, s_tmin: float, s_tmax: float) -> bool:
        """Tell whether diffusers draws noise at the present step."""
        assert self._step_index is not None
        return s_churn > 0 and s_tmin <= float(host_tables(self).host_sigmas[self._step_index]) <= s_tmax

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
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        if not is_integer_timestep(timestep):
            arguments = (s_churn, s_tmin, s_tmax, s_noise)
            done = counted_step(
                self, arguments, model_output, timestep, sample, generator, return_dict, guidance_scale,
                draws=s_churn > 0 and (lambda table, call: self._churns(s_churn, s_tmin, s_tmax)),
            )  # fmt: skip
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)  # type: ignore[misc]


class EulerAncestralDiscreteScheduler(_Sigmas, diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.EulerAncestralDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyEulerAncestralOutput
    _casts_back = True
    _predictions = ("epsilon", "v_prediction")
    set_timesteps = on_host(diffusers.EulerAncestralDiscreteScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        steps = SigmaSteps(tables.sigmas_from(begin), tables.host_timesteps[begin:].double())
        return euler_ancestral_table(steps, self._prediction)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        if not is_integer_timestep(timestep):
            done = counted_step(
                self, (), model_output, timestep, sample, generator, return_dict, guidance_scale, draws=True
            )
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, generator, return_dict)  # type: ignore[misc]


class _WithoutNoise(_Sigmas):
    """What the deterministic ones share: a step without options."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        done = counted_step(self, (), model_output, timestep, sample, None, return_dict, guidance_scale)
        if done is not None:
            return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, return_dict)  # type: ignore[misc]


class HeunDiscreteScheduler(_WithoutNoise, diffusers.HeunDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.HeunDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyHeunOutput
    _repeats_sigmas = True
    set_timesteps = on_host(diffusers.HeunDiscreteScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        clip = self.config.clip_sample_range if self.config.clip_sample else None
        return heun_table(self._calls(tables, begin, 2), self._prediction, clip)


class KDPM2DiscreteScheduler(_WithoutNoise, diffusers.KDPM2DiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.KDPM2DiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyKDPM2Output
    _repeats_sigmas = True
    _predictions = ("epsilon", "v_prediction")
    _state = ("sigmas_interpol",)
    set_timesteps = on_host(diffusers.KDPM2DiscreteScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        calls = self._calls(tables, begin, 2)
        # diffusers' sigmas are s_0, s_1, s_1, ..., and those halfway have a table of their own, one call later
        middles = self.sigmas_interpol.detach().to("cpu", torch.float64)[begin + 1 :: 2]
        return dpm2_table(with_middles(calls, middles), calls.sigmas[1:-1:2], self._prediction, ancestral=False)


class KDPM2AncestralDiscreteScheduler(_Sigmas, diffusers.KDPM2AncestralDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.KDPM2AncestralDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyKDPM2AncestralOutput
    _repeats_sigmas = True
    _predictions = ("epsilon", "v_prediction")
    _state = ("sigmas_interpol", "sigmas_down")
    set_timesteps = on_host(diffusers.KDPM2AncestralDiscreteScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        calls = self._calls(tables, begin, 2)
        middles, downs = (
            values.detach().to("cpu", torch.float64)[begin::2] for values in (self.sigmas_interpol, self.sigmas_down)
        )
        return dpm2_table(with_middles(calls, middles), downs, self._prediction, ancestral=True)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        done = counted_step(
            self, (), model_output, timestep, sample, generator, return_dict, guidance_scale,
            draws=lambda table, call: call % 2 == 1,
        )  # fmt: skip
        if done is not None:
            return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, generator, return_dict)  # type: ignore[misc]


def with_middles(calls: UnscaledCalls, middles: Tensor) -> UnscaledCalls:
    """Return calls at the sigmas where steps begin, and halfway; of diffusers', which has the former only."""
    sigmas = calls.sigmas.clone()
    sigmas[2:-1:2] = calls.sigmas[1:-2:2]
    sigmas[1:-1:2] = middles[: len(sigmas[1:-1:2])]
    return calls._replace(sigmas=sigmas)


class LMSDiscreteScheduler(_Sigmas, diffusers.LMSDiscreteScheduler):  # type: ignore[metaclass]
    """``diffusers.LMSDiscreteScheduler`` with the fused step."""

    _output = lazy_outputs.LazyLMSOutput
    _default_arguments = (4,)
    set_timesteps = on_host(diffusers.LMSDiscreteScheduler.set_timesteps)

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
            done = counted_step(self, (order,), model_output, timestep, sample, None, return_dict, guidance_scale)
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, order, return_dict)  # type: ignore[misc]
