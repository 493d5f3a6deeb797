"""diffusers' schedulers of unCLIP and Wuerstchen with the fused step: DDPM's, over timesteps of their own."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenSchedulerOutput
from torch import Tensor

from ..solvers import StepTable
from ..solvers._wuerstchen import wuerstchen_table
from ..solvers.ddpm import ddpm_table
from . import lazy_outputs
from .counted_step import CountedStep, counted_step, left
from .drawing import Drawing
from .dtypes import Dtypes, of_the_model
from .guidance_arguments import Scale, combined
from .host_alphas import HostAlphas
from .host_tables import HostTables, host_tables, on_host
from .noise import Generators
from .repeat import repeated
from .scheduler_step import LEFT, SchedulerStep, count, plan, run
from .tables import UNDEFINED, host_alphas
from .timesteps import host_timesteps, place_in, place_of

__all__ = ["DDPMWuerstchenScheduler", "UnCLIPScheduler"]


class UnCLIPScheduler(HostAlphas, SchedulerStep, diffusers.UnCLIPScheduler):  # type: ignore[metaclass]
    """``diffusers.UnCLIPScheduler`` with the fused step."""

    _output = lazy_outputs.LazyUnCLIPOutput
    _steps_before_set_timesteps = True
    _prediction_types = ("epsilon", "sample")
    _variance_types = ("fixed_small_log", "learned_range")
    betas: Tensor
    _state = ("_internal_dict", "alphas_cumprod", "betas", "timesteps", "num_inference_steps", "variance_type")
    _read_state = staticmethod(itemgetter(*_state))

    def _transitions(self, along: bool) -> StepTable:
        """Return the rows from every timestep to the one before, or ``along`` the timesteps that are set."""
        abar = host_alphas(self)
        steps = torch.arange(len(abar), device="cpu")
        previous = steps - 1
        if along:
            told = host_timesteps(self)
            previous = torch.full_like(steps, len(abar))  # nowhere
            previous[list(told[:-1])] = torch.tensor(told[1:], device="cpu")
        padded = torch.cat([abar, abar.new_tensor([torch.nan, 1.0])])  # nowhere, and -1
        after = padded[previous]
        beta = torch.where(previous == steps - 1, self.betas.detach().to(abar), 1 - abar / after)
        return ddpm_table(
            steps,
            abar.double(),
            after.double(),
            steps > 0,
            prediction_type=self.config.prediction_type,
            variance_type=self.variance_type,  # type: ignore[arg-type]
            clip_sample_range=self.config.clip_sample_range if self.config.clip_sample else None,
            undefined=UNDEFINED,
            beta=beta.double(),
        )

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps as diffusers does; the host remembers their values."""
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._timesteps_are_set(device, True)

    def _leads_along(self, timestep: int | Tensor, prev_timestep: int | Tensor | None) -> bool | None:
        """Tell whether a step leads along the timesteps that are set; ``None``: nor to the one before."""
        if prev_timestep is None:
            return False
        told = host_timesteps(self)
        here, there = (place_of(self.timesteps, told, value) for value in (timestep, prev_timestep))
        return True if here is not None and there == here + 1 else None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        along = self._leads_along(timestep, prev_timestep)
        if along is not None:
            done = repeated(
                self, (along,), None, model_output, timestep, sample, generator, return_dict, guidance_scale
            )
            if done is not None:
                return done
            planned = plan(self, (along,), model_output, timestep, sample, guidance_scale=guidance_scale)
            if planned is not None:
                draws = isinstance(planned.row, Tensor) or planned.row > 0
                return run(planned, generator, None, draws, return_dict)
        else:
            count(self, LEFT + "a timestep that none of its own leads to")
        output = combined(self, model_output, sample, guidance_scale, None)
        return super().step(output, timestep, sample, prev_timestep, generator, return_dict)  # type: ignore[misc]


class DDPMWuerstchenScheduler(CountedStep, diffusers.DDPMWuerstchenScheduler):  # type: ignore[metaclass]
    """``diffusers.DDPMWuerstchenScheduler`` with the fused step.

    Its timesteps are one for each sample; they have to be the same one for all, and one of ``timesteps``.
    """

    _plain_output = DDPMWuerstchenSchedulerOutput
    _levels_in = "timesteps"
    _steps_before_set_timesteps = True
    _state = ("s", "_init_alpha_cumprod")
    _step_index: int | None = None
    _alpha_cumprod: Callable[[Tensor, torch.device], Tensor]
    set_timesteps = on_host(diffusers.DDPMWuerstchenScheduler.set_timesteps)

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_model(sample, model)

    def _why_not(self) -> str | None:
        return None

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        told = tables.host_timesteps[begin:]
        abar = self._alpha_cumprod(told, told.device)
        return wuerstchen_table(told.double(), abar.double())

    def _place_of(self, timestep: Any) -> int | None:
        """Return the place of a timestep for all samples, as far as the host knows it; the last one leads nowhere."""
        if not isinstance(timestep, Tensor) or timestep.dim() != 1 or timestep.numel() == 0:
            return None
        place = None
        if timestep.stride(0) == 0 or len(timestep) == 1:  # of one that is expanded
            place = place_in(self.timesteps, timestep[:1])
        if place is None and timestep.device.type == "cpu" and bool((timestep == timestep[0]).all()):
            told = host_tables(self).host_timesteps
            places = (told == timestep[0].to(told.dtype)).nonzero()
            place = int(places[0]) if len(places) else None
        return None if place is None or place >= len(self.timesteps) - 1 else place

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        self._step_index = self._place_of(timestep)
        reason = None if self._step_index is not None else "timesteps that are not the same one of its own"
        if self._step_index is not None:
            drawing = Drawing(generator)
            done = counted_step(self, (), model_output, timestep, sample, return_dict, guidance_scale, drawing)
            if done is not None:
                return done
        output, sample = left(self, model_output, sample, guidance_scale, reason)
        return super().step(output, timestep, sample, generator, return_dict)  # type: ignore[misc]
