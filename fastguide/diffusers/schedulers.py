"""Diffusers' DDPM and DDIM schedulers with the fused step: the same configurations, results and noise.

What the kernel does not serve is left to diffusers' own ``step``, which these classes inherit: a few configurations,
tensors that require grad, shapes that broadcast, and whatever it refuses.
"""

from __future__ import annotations

from numbers import Real
from operator import itemgetter
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..schedules.predictions import GradientForm
from ..solvers import StepTable
from . import lazy_outputs, tables
from .guidance_arguments import Scale, combined
from .host_alphas import HostAlphasOfVelocity
from .noise import Generators
from .repeat import repeated
from .scheduler_step import SchedulerStep, plan, run
from .timesteps import host_timesteps

__all__ = [  # noqa: RUF022  # the most used first
    "DDIMScheduler",
    "DDPMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DDIMInverseScheduler",
]


def _number_of(eta: Any, sample: Tensor) -> float | None:
    """Return an eta as a number; ``None``: it is none, or changes more than a number would."""
    if not isinstance(eta, Tensor):
        return float(eta) if isinstance(eta, Real) else None
    if eta.numel() != 1 or torch.compiler.is_compiling() or (eta.requires_grad and torch.is_grad_enabled()):
        return None
    is_scalar = eta.dim() == 0 or (eta.dim() <= sample.dim() and eta.dtype == sample.dtype)
    return float(eta) if is_scalar else None  # on a GPU, this waits for it, as diffusers' own step does


class _DDIM(HostAlphasOfVelocity, SchedulerStep):
    final_alpha_cumprod: Tensor
    _transitions = tables.ddim_transitions
    _loop = tables.ddim_loop

    _state = ("_internal_dict", "alphas_cumprod", "final_alpha_cumprod", "num_inference_steps")
    _read_state = staticmethod(itemgetter(*_state))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps as diffusers does; the host remembers their values."""
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._timesteps_are_set(device, 0.0, False)

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
        gradient: Tensor | None = None,
        gradient_scale: Scale = 1.0,
        gradient_form: GradientForm = "epsilon",
    ) -> Any:
        """Make one step: ``diffusers.DDIMScheduler.step``, and guidance with it.

        Args:
            model_output: the model's output; with ``guidance_scale`` of twice the sample's batch, unconditional first.
                If it has twice the channels as well, its second half, a learned variance, is not used.
            timestep: an int, or an int64 tensor of shape () or, one per sample, (batch,), on any device.
            sample: x_t.
            eta: a number, or a tensor of one element, as in diffusers.
            use_clipped_model_output, generator, variance_noise, return_dict: as in diffusers.
            guidance_scale: of classifier-free guidance: a number, or one per sample.
            gradient: of a classifier, as ``fastguide.guided_step`` takes it.
            gradient_scale, gradient_form: its scale and form, as in ``fastguide.Classifier``.
        """
        number = eta if type(eta) is float else _number_of(eta, sample)
        if variance_noise is None:
            done = repeated(
                self, (number, use_clipped_model_output), number != 0, model_output, timestep, sample, generator,
                return_dict, guidance_scale, gradient, gradient_scale, gradient_form,
            )  # fmt: skip
            if done is not None:
                return done
        rows = number is not None and 0 <= number <= 1 and (generator is None or variance_noise is None)
        planned = plan(
            self, (number, use_clipped_model_output) if rows else None, model_output, timestep, sample,
            variance_noise, guidance_scale, gradient, gradient_scale, gradient_form,
        )  # fmt: skip
        if planned is not None:
            return run(planned, generator, variance_noise, number != 0, return_dict)
        output = combined(self, model_output, sample, guidance_scale, gradient)
        return super().step(  # type: ignore[misc]
            output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
        )


class _DDPM(HostAlphasOfVelocity, SchedulerStep):
    custom_timesteps: bool
    _loop = tables.ddpm_loop
    _steps_before_set_timesteps = True

    _state = ("_internal_dict", "alphas_cumprod", "timesteps", "num_inference_steps", "variance_type")
    _read_state = staticmethod(itemgetter(*_state))

    def _transitions(self) -> StepTable:
        return tables.ddpm_transitions(self, self._linked_timesteps())

    def _linked_timesteps(self) -> tuple[int, ...] | None:
        return host_timesteps(self) if self.custom_timesteps or self.num_inference_steps else None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps as diffusers does; the host remembers their values."""
        super().set_timesteps(num_inference_steps, None, timesteps)  # type: ignore[misc]
        self._timesteps_are_set(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
        gradient: Tensor | None = None,
        gradient_scale: Scale = 1.0,
        gradient_form: GradientForm = "epsilon",
    ) -> Any:
        """Make one step: ``diffusers.DDPMScheduler.step``, and guidance with it.

        Args:
            model_output: the model's output, of twice the sample's channels if the variance is learned; with
                ``guidance_scale`` of twice its batch, unconditional first, and the conditional half's variance is used.
            timestep: an int, or an int64 tensor of shape () or, one per sample, (batch,), on any device.
            sample: x_t.
            generator, return_dict: as in diffusers.
            guidance_scale, gradient, gradient_scale, gradient_form: as in ``DDIMScheduler.step``.

        Raises:
            IndexError: the timestep is not one of ``timesteps``, of which the step leads from one to the next.
        """
        done = repeated(
            self, (), None, model_output, timestep, sample, generator, return_dict, guidance_scale, gradient,
            gradient_scale, gradient_form,
        )  # fmt: skip
        if done is not None:
            return done
        planned = plan(
            self, (), model_output, timestep, sample, None, guidance_scale, gradient, gradient_scale, gradient_form
        )
        if planned is not None:
            draws = isinstance(planned.row, Tensor) or planned.row > 0
            return run(planned, generator, None, draws, return_dict)
        output = combined(self, model_output, sample, guidance_scale, gradient)
        return super().step(output, timestep, sample, generator, return_dict)  # type: ignore[misc]


def _batch_step(
    scheduler: SchedulerStep, arguments: tuple[Any, ...], model_output: Tensor, timesteps: Tensor, sample: Tensor
) -> Tensor | None:
    """Make a step of each sample from its own timestep, without noise; ``None``: it is left to diffusers."""
    one_a_sample = isinstance(timesteps, Tensor) and timesteps.shape == sample.shape[:1]
    planned = plan(scheduler, arguments, model_output, timesteps, sample) if one_a_sample else None
    if planned is None:
        return None
    result: Tensor = run(planned, None, None, False, False)[0]
    return result


class DDIMScheduler(_DDIM, diffusers.DDIMScheduler):  # type: ignore[metaclass]
    """``diffusers.DDIMScheduler`` with the fused step.

    >>> import torch, fastguide.diffusers
    >>> scheduler = fastguide.diffusers.DDIMScheduler(clip_sample=False)
    >>> scheduler.set_timesteps(50)
    >>> latents, output = torch.randn(1, 4, 8, 8), torch.randn(2, 4, 8, 8)
    >>> scheduler.step(output, scheduler.timesteps[0], latents, guidance_scale=7.5).prev_sample.shape
    torch.Size([1, 4, 8, 8])
    """

    _output = lazy_outputs.LazyDDIMOutput


class DDPMScheduler(_DDPM, diffusers.DDPMScheduler):  # type: ignore[metaclass]
    """``diffusers.DDPMScheduler`` with the fused step.

    Where diffusers returns NaN, for ``fixed_large_log`` and ``learned``, whose logarithms it takes the root of, the
    variance is the paper's.
    """

    _output = lazy_outputs.LazyDDPMOutput


class DDIMParallelScheduler(_DDIM, diffusers.DDIMParallelScheduler):  # type: ignore[metaclass]
    """``diffusers.DDIMParallelScheduler`` with the fused step."""

    _output = lazy_outputs.LazyDDIMParallelOutput

    def _transitions(  # type: ignore[override]
        self, eta: float, use_clipped_model_output: bool, in_batches: bool = False
    ) -> StepTable:
        if in_batches:
            return tables.mean_transitions(self, True, use_clipped_model_output)
        return tables.ddim_transitions(self, eta, use_clipped_model_output)

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """Make a step of each sample from its own timestep, without noise, in one pass; ``eta`` is 0."""
        if eta == 0.0 and self.num_inference_steps is not None:
            arguments = (0.0, bool(use_clipped_model_output), True)
            done = _batch_step(self, arguments, model_output, timesteps, sample)
            if done is not None:
                return done
        theirs: Any = super().batch_step_no_noise  # type: ignore[misc]
        result: Tensor = theirs(model_output, timesteps, sample, eta, use_clipped_model_output)
        return result


class DDPMParallelScheduler(_DDPM, diffusers.DDPMParallelScheduler):  # type: ignore[metaclass]
    """``diffusers.DDPMParallelScheduler`` with the fused step."""

    _output = lazy_outputs.LazyDDPMParallelOutput

    def _transitions(self, in_batches: bool = False) -> StepTable:
        return tables.mean_transitions(self, False) if in_batches else super()._transitions()

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """Make a step of each sample from its own timestep, without noise, in one pass."""
        output, channels = model_output, sample.shape[1] if sample.dim() > 1 else 0
        if self.variance_type.startswith("learned") and output.shape[1:2] == (2 * channels,):
            output = output[:, :channels]
        done = _batch_step(self, (True,), output, timesteps, sample)
        if done is not None:
            return done
        result: Tensor = super().batch_step_no_noise(model_output, timesteps, sample)  # type: ignore[misc]
        return result


class DDIMInverseScheduler(SchedulerStep, diffusers.DDIMInverseScheduler):  # type: ignore[metaclass]
    """``diffusers.DDIMInverseScheduler`` with the fused step: from an image back to its noise."""

    _output = lazy_outputs.LazyDDIMInverseOutput
    initial_alpha_cumprod: Tensor

    _state = ("_internal_dict", "alphas_cumprod", "initial_alpha_cumprod", "num_inference_steps")
    _read_state = staticmethod(itemgetter(*_state))

    def _transitions(self) -> StepTable:
        return tables.ddim_transitions(self, 0.0, False, inverse=True)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps as diffusers does; the host remembers their values."""
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._timesteps_are_set(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: ``diffusers.DDIMInverseScheduler.step``; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        done = repeated(self, (), False, model_output, timestep, sample, None, return_dict, guidance_scale)
        if done is not None:
            return done
        planned = plan(self, (), model_output, timestep, sample, guidance_scale=guidance_scale)
        if planned is not None:
            return run(planned, None, None, False, return_dict)
        output = combined(self, model_output, sample, guidance_scale, None)
        return super().step(output, timestep, sample, return_dict)  # type: ignore[misc]


__test__ = {name: globals()[name] for name in __all__}  # doctest would look for them in the module that they name
