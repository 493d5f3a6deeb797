"""diffusers' schedulers of Brownian motion with the fused step; their noise is torchsde's, as in diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler, DPMSolverSDESchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..solvers import StepTable
from ..solvers._dpm_sde import dpm_sde_table
from .counted_step import counted_step, left
from .drawing import Drawing
from .edm_schedulers import EDM
from .guidance_arguments import Scale
from .host_tables import HostTables, on_host
from .lazy_outputs import lazy
from .noising import noised_by_count
from .sigma_schedulers import Sigmas, with_middles
from .step_signatures import as_number
from .two_calls import TwoCalls

__all__ = ["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"]


class DPMSolverSDEScheduler(TwoCalls, Sigmas, diffusers.DPMSolverSDEScheduler):  # type: ignore[metaclass]
    """``diffusers.DPMSolverSDEScheduler`` with the fused step."""

    _output = lazy(DPMSolverSDESchedulerOutput)
    _sigmas_fall = False
    _not_in_tables = "noise of one path of Brownian motion"
    _predictions = ("epsilon", "v_prediction")
    _default_arguments = (1.0,)
    noise_sampler: Any
    noise_sampler_seed: int | None
    mid_point_sigma: Tensor | None
    set_timesteps = on_host(diffusers.DPMSolverSDEScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.DPMSolverSDEScheduler.add_noise)

    def _loop_table(self, tables: HostTables, begin: int, s_noise: float) -> StepTable:
        calls = self._calls(tables, begin, 2)
        begins = torch.cat([calls.sigmas[:1], calls.sigmas[1:-1:2]])
        middles = (begins[:-1] * begins[1:]).sqrt()
        return dpm_sde_table(with_middles(calls, middles), self._prediction, s_noise)

    def _path(self, sample: Tensor, model_dtype: torch.dtype) -> Tensor | None:
        """Return the noise of the present call, and note what diffusers divides the next input by; the end has none."""
        assert self._step_index is not None
        first = self.state_in_first_order
        place = self._step_index if first else self._step_index - 1
        begin, end = (sigma.log().neg() for sigma in self.sigmas[place : place + 2])
        if self.noise_sampler is None:
            sigmas = self.sigmas
            ends = sigmas[sigmas > 0].min().item(), sigmas.max().item()
            self.noise_sampler = BrownianTreeNoiseSampler(sample, *ends, self.noise_sampler_seed)
        self.mid_point_sigma = None
        if end.isinf():
            return None
        target = (begin + (end - begin) * 0.5 if first else end).neg().exp()
        if first:
            self.mid_point_sigma = target
        drawn: Tensor = self.noise_sampler(begin.neg().exp(), target)
        return drawn

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        drawing = Drawing(None, path=self._path)
        done = counted_step(
            self, (as_number(s_noise),), model_output, timestep, sample, return_dict, guidance_scale, drawing
        )
        if done is not None:
            return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, return_dict, s_noise)  # type: ignore[misc]


class CosineDPMSolverMultistepScheduler(EDM, diffusers.CosineDPMSolverMultistepScheduler):  # type: ignore[metaclass]
    """``diffusers.CosineDPMSolverMultistepScheduler`` with the fused step."""

    _plain_output = SchedulerOutput
    _not_in_tables = "noise of one path of Brownian motion"
    noise_sampler: Any
    set_timesteps = on_host(diffusers.CosineDPMSolverMultistepScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.CosineDPMSolverMultistepScheduler.add_noise)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        return self._multistep_table(tables, begin, "sde-dpmsolver++")

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``.

        ``generator``: only its seed is used, as diffusers does.
        """

        def path(sample: Tensor, model_dtype: torch.dtype) -> Tensor:
            if self.noise_sampler is None:
                seed: list[int] | int | None = None
                if generator is not None:
                    several = generator if isinstance(generator, list) else [generator]
                    seeds = [each.initial_seed() for each in several]
                    seed = seeds if isinstance(generator, list) else seeds[0]
                like = sample.to(torch.promote_types(sample.dtype, model_dtype))
                ends = {"sigma_min": self.config.sigma_min, "sigma_max": self.config.sigma_max}
                self.noise_sampler = BrownianTreeNoiseSampler(like, **ends, seed=seed)
            index = self._step_index
            assert index is not None
            drawn: Tensor = self.noise_sampler(self.sigmas[index], self.sigmas[index + 1]).to(sample.device)
            return drawn

        done = counted_step(
            self, (), model_output, timestep, sample, return_dict, guidance_scale, Drawing(generator, path=path)
        )
        if done is not None:
            return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, generator, return_dict)  # type: ignore[misc]
