"""diffusers' schedulers of CogVideoX with the fused step; they do not count their steps, and go by the timestep."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..solvers import StepTable
from ..solvers.cogvideox_dpm import cogvideox_dpm_table
from ..solvers.ddim import ddim_table
from ..step.noise import DeviceGenerator
from . import lazy_outputs
from .counted_step import CountedStep, counted_step, left
from .drawing import Drawing
from .dtypes import Dtypes
from .guidance_arguments import Scale, combined
from .host_alphas import HostAlphasOfVelocity
from .host_tables import HostTables, host_tables, on_host
from .noise import Generators
from .repeat import repeated
from .scheduler_step import SchedulerStep, plan, run
from .tables import UNDEFINED
from .timesteps import place_of, version_of

__all__ = ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]


class CogVideoXDDIMScheduler(HostAlphasOfVelocity, SchedulerStep, diffusers.CogVideoXDDIMScheduler):  # type: ignore[metaclass]
    """``diffusers.CogVideoXDDIMScheduler`` with the fused step."""

    _output = lazy_outputs.LazyCogVideoXOutput
    final_alpha_cumprod: Tensor
    _state = ("_internal_dict", "alphas_cumprod", "final_alpha_cumprod", "num_inference_steps")
    _read_state = staticmethod(itemgetter(*_state))

    def _transitions(self) -> StepTable:
        """Return the rows from every timestep, over abar in the precision that it is in."""
        abar = self.alphas_cumprod.detach().to("cpu", torch.float64)
        assert self.num_inference_steps is not None
        steps = torch.arange(len(abar), device="cpu")
        previous = steps - self.config.num_train_timesteps // self.num_inference_steps
        after = torch.where(previous >= 0, abar[previous.clamp(min=0)], float(self.final_alpha_cumprod))
        return ddim_table(
            steps,
            abar,
            after,
            eta=0.0,
            use_clipped_model_output=True,  # its direction is that of x and x_0
            prediction_type=self.config.prediction_type,
            clip_sample_range=None,
            undefined=UNDEFINED,
        )

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps as diffusers does; the host remembers their values."""
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._timesteps_are_set(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``.

        As in diffusers, ``eta``, ``use_clipped_model_output``, ``generator`` and ``variance_noise`` change nothing.
        """
        done = repeated(self, (), False, model_output, timestep, sample, None, return_dict, guidance_scale)
        if done is not None:
            return done
        planned = plan(self, (), model_output, timestep, sample, guidance_scale=guidance_scale)
        if planned is not None:
            return run(planned, None, None, False, return_dict)
        output = combined(self, model_output, sample, guidance_scale, None)
        unused = eta, use_clipped_model_output, generator, variance_noise
        return super().step(output, timestep, sample, *unused, return_dict)  # type: ignore[misc]


class CogVideoXDPMScheduler(HostAlphasOfVelocity, CountedStep, diffusers.CogVideoXDPMScheduler):  # type: ignore[metaclass]
    """``diffusers.CogVideoXDPMScheduler`` with the fused step.

    What it goes on from is the caller's: the x_0 that ``step`` returned, which is given to the next one. The fused step
    keeps its own, and is made where it is given that very tensor, and the timesteps follow each other.
    """

    _output = lazy_outputs.LazyCogVideoXDPMOutput
    _levels_in = "alphas_cumprod"
    _sigmas_fall = False
    _history_is_given = True
    _state = ("final_alpha_cumprod", "num_inference_steps")
    _step_index: int | None = None
    _returned_original: Any = None
    _returned_version: int | None = None
    final_alpha_cumprod: Tensor
    set_timesteps = on_host(diffusers.CogVideoXDPMScheduler.set_timesteps)

    def _why_not(self) -> str | None:
        known = self.config.prediction_type in ("epsilon", "v_prediction", "sample")
        return None if known else "a configuration that rows do not express"

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step; what a model that predicts x_0 returns is in the output as it is."""
        dtypes = super()._dtypes(sample, model)
        return dtypes._replace(original=model) if self._internal_dict["prediction_type"] == "sample" else dtypes

    def _next_timesteps(self, tables: HostTables) -> Tensor:
        assert self.num_inference_steps is not None
        following: Tensor = tables.host_timesteps - self.config.num_train_timesteps // self.num_inference_steps
        return following

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        told, following = tables.host_timesteps[begin:], self._next_timesteps(tables)[begin:]
        abar = tables.host_sigmas
        after = torch.where(following >= 0, abar[following.clamp(min=0)], float(self.final_alpha_cumprod))
        return cogvideox_dpm_table(told, abar[told], after, (following < 0).tolist(), self.config.prediction_type)

    def _follows(self, place: int, old_original: Any, timestep_back: Any) -> bool:
        """Tell whether a step is the first one, or goes on from the last one, as its arguments say."""
        if old_original is None:
            self._counted = None
            return True
        loop = self._counted
        if loop is None or loop.following != place or old_original is not self._returned_original:
            return False
        if not loop.is_current(self):  # diffusers goes on from what it is given
            return False
        if type(old_original) is lazy_outputs.LazyOriginal:
            if old_original.is_edited():
                return False
        elif version_of(old_original) != self._returned_version:
            return False
        return place_of(self.timesteps, host_tables(self).timestep_values, timestep_back) == place - 1

    def _note_original(self, original: Any) -> None:
        """Note the x_0 that a step returned, from which the next one goes on, if there is one."""
        loop = self._counted
        self._returned_original = None if loop is None or loop.is_over else original
        self._returned_version = None if type(original) is not Tensor else version_of(original)

    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: int | Tensor,
        timestep_back: int | Tensor | None,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``.

        As in diffusers, ``eta``, ``use_clipped_model_output`` and ``variance_noise`` change nothing.
        """
        tables = host_tables(self)
        place = place_of(self.timesteps, tables.timestep_values, timestep)
        served = self.num_inference_steps is not None and not isinstance(generator, DeviceGenerator)
        reason: str | None = "an x_0 or a timestep that the last step does not lead to"
        if place is not None and served and self._follows(place, old_pred_original_sample, timestep_back):
            self._step_index, reason = place, None
            twice = old_pred_original_sample is not None and int(self._next_timesteps(tables)[place]) >= 0

            def path(sample: Tensor, model_dtype: torch.dtype) -> Tensor:
                how: dict[str, Any] = {"generator": generator, "device": sample.device, "dtype": sample.dtype}
                if twice:  # diffusers draws for a step of order 1, which it does not use
                    randn_tensor(tuple(sample.shape), **how)
                drawn: Tensor = randn_tensor(tuple(sample.shape), **how)
                return drawn

            drawing = Drawing(generator, path=path)
            as_output = return_dict and twice  # of its first and last step, diffusers returns a tuple in any case
            done = counted_step(self, (), model_output, timestep, sample, as_output, guidance_scale, drawing)
            if done is not None:
                self._note_original(None if as_output else done[1])
                return done
        output, sample = left(self, model_output, sample, guidance_scale, reason)
        unused = eta, use_clipped_model_output, generator, variance_noise
        given = output, old_pred_original_sample, timestep, timestep_back, sample
        return super().step(*given, *unused, return_dict)  # type: ignore[misc]
