"""diffusers' schedulers of distilled models with the fused step: latent, trajectory and other consistency models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeSchedulerOutput
from torch import Tensor

from ..solvers import StepTable
from ..solvers._trigflow import trigflow_table
from ..solvers.consistency import consistency_table
from ..solvers.lcm import consistency_function, lcm_table
from ..solvers.tcd import tcd_table
from . import lazy_outputs
from .counted_step import CountedStep, counted_step, left
from .drawing import Drawing
from .dtypes import Dtypes, NoiseRule, with_default_noise
from .guidance_arguments import Scale
from .host_alphas import HostAlphasOfVelocity
from .host_tables import HostTables, on_host
from .noise import Generators
from .noising import noised_by_count
from .scaled_inputs import ScaledInputs
from .step_signatures import NOT_AT, Draws, StepWithGenerator

__all__ = ["CMStochasticIterativeScheduler", "LCMScheduler", "SCMScheduler", "TCDScheduler"]


class _Distilled(HostAlphasOfVelocity, CountedStep):
    """What those of latent models share: rows over abar, and steps whose last one adds no noise.

    diffusers takes the level that a step begins at from the timestep that it is given, and where it leads to from the
    counter; rows have both from the counter.
    """

    _levels_in = "alphas_cumprod"
    _sigmas_fall = False
    _returns_original = False
    _state = ("num_inference_steps",)
    num_inference_steps: int | None

    def _why_not(self) -> str | None:
        if self.num_inference_steps != len(self.timesteps):
            return "timesteps that are not as many as its steps"
        known = self.config.prediction_type in ("epsilon", "v_prediction", "sample")
        return None if known else "a configuration that rows do not express"

    def _draws_but_last(self, table: StepTable, call: int) -> bool:
        return call != len(table) - 1


class LCMScheduler(_Distilled, StepWithGenerator, diffusers.LCMScheduler):  # type: ignore[metaclass]
    """``diffusers.LCMScheduler`` with the fused step."""

    _output = lazy_outputs.LazyLCMOutput
    _noise_dtype = "original"
    set_timesteps = on_host(diffusers.LCMScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        config, told = self.config, tables.host_timesteps[begin:]
        clip = config.clip_sample_range if config.clip_sample else None
        return lcm_table(told, tables.host_sigmas[told], config.timestep_scaling, config.prediction_type, clip)

    def _second_columns(self, tables: HostTables, begin: int, *arguments: Any) -> Mapping[str, Tensor]:
        """Return the columns of the consistency function, which is noised to be the next sample."""
        c_skip, c_out = consistency_function(tables.host_timesteps[begin:], self.config.timestep_scaling)
        return {"out_sample": c_skip, "out_x0": c_out}

    def _draws(self) -> Draws:
        return self._draws_but_last

    def _why_not_at(self, timestep: Any) -> str | None:
        return None if self._is_at(timestep) else NOT_AT


class TCDScheduler(_Distilled, diffusers.TCDScheduler):  # type: ignore[metaclass]
    """``diffusers.TCDScheduler`` with the fused step."""

    _output = lazy_outputs.LazyTCDOutput
    _ignores_thresholding = True
    _default_arguments = (0.3,)
    set_timesteps = on_host(diffusers.TCDScheduler.set_timesteps)

    def _loop_table(self, tables: HostTables, begin: int, eta: float) -> StepTable:
        told = tables.host_timesteps[begin:]
        following = torch.cat([told[1:], told.new_zeros(1)])
        jump = torch.floor((1 - eta) * following).long()  # in float32, as diffusers does
        return tcd_table(told, jump, tables.host_sigmas, eta, self.config.prediction_type)

    def _second_columns(self, tables: HostTables, begin: int, *arguments: Any) -> Mapping[str, Tensor]:
        """Return the columns of the step before its noise."""
        columns = self._loop_table(tables, begin, *arguments).coefficients()
        kept = (1 - columns["out_noise"].square()).sqrt()
        return {name: columns[name] / kept for name in ("out_x0", "out_sample", "out_pred")}

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        is_number = isinstance(eta, (int, float)) and 0 <= eta <= 1
        reason = None if is_number else "an eta that is no number from 0 to 1"
        if is_number and not self._is_at(timestep):
            reason = NOT_AT
        if reason is None:
            drawing = Drawing(generator, self._draws_but_last, "original") if eta > 0 else None
            given = (float(eta),), model_output, timestep, sample
            done = counted_step(self, *given, return_dict, guidance_scale, drawing)
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale, reason)
        return super().step(output, timestep, sample, eta, generator, return_dict)  # type: ignore[misc]


class SCMScheduler(StepWithGenerator, diffusers.SCMScheduler):  # type: ignore[metaclass]
    """``diffusers.SCMScheduler`` with the fused step."""

    _output = lazy_outputs.LazySCMOutput
    _levels_in = "timesteps"
    set_timesteps = on_host(diffusers.SCMScheduler.set_timesteps)

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return with_default_noise(sample, model)

    def _why_not(self) -> str | None:
        return None if self.config.prediction_type == "trigflow" else "a configuration that rows do not express"

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        return trigflow_table(tables.host_sigmas[begin:], self.config.sigma_data)

    @property
    def _noise_dtype(self) -> NoiseRule:  # type: ignore[override]
        return torch.get_default_dtype()


class CMStochasticIterativeScheduler(ScaledInputs, StepWithGenerator, diffusers.CMStochasticIterativeScheduler):  # type: ignore[metaclass]
    """``diffusers.CMStochasticIterativeScheduler`` with the fused step."""

    _plain_output = CMStochasticIterativeSchedulerOutput
    _refuses_integers = True
    _steps_before_set_timesteps = True
    set_timesteps = on_host(diffusers.CMStochasticIterativeScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.CMStochasticIterativeScheduler.add_noise)

    def _why_not(self) -> str | None:
        known = len(self.sigmas) == len(self.timesteps) + 1
        return None if known else "timesteps that are not set"

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        config = self.config
        return consistency_table(
            tables.sigmas_from(begin),
            tables.host_timesteps[begin:].double(),
            config.sigma_min,
            config.sigma_max,
            sigma_data=config.sigma_data,
            s_noise=config.s_noise if len(self.timesteps) > 1 else 0.0,
            clip_sample_range=1.0 if config.clip_denoised else None,
        )

    def _draws(self) -> Draws:
        return len(self.timesteps) > 1
