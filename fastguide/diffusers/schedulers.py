"""diffusers' DDPM and DDIM schedulers with the fused step: the same configurations, arguments, results and noise.

What the kernel does not serve is left to diffusers' own ``step``, which these classes inherit: dynamic thresholding,
tensors that require grad, shapes that broadcast, and whatever it refuses.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ..schedules.predictions import GradientForm
from ..solvers.table import StepTable
from . import lazy_outputs as outputs
from . import tables as transitions
from .lazy_guidance import resolved
from .scheduler_step import FusedStep, Generators, HostAlphas, Scale


class _DDIM(HostAlphas, FusedStep):
    final_alpha_cumprod: Tensor

    def _state(self) -> tuple[Any, ...]:
        return (self.config, self.alphas_cumprod, self.final_alpha_cumprod, self.num_inference_steps)

    def _transitions(self, *arguments: Any) -> StepTable:
        return transitions.ddim_transitions(self, *arguments)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As diffusers'; the timesteps' values are kept on the host as well."""
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._remember(device, 0.0, False)

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
        """One step: ``diffusers.DDIMScheduler.step``, and guidance with it.

        Args:
            model_output: the model's output; with ``guidance_scale`` of twice the sample's batch, unconditional first.
                If it has twice the channels as well, its second half, a learned variance, is not used.
            timestep: an int, or an int64 tensor of shape () or, one per sample, (batch,), on any device.
            sample: x_t.
            eta, use_clipped_model_output, generator, variance_noise, return_dict: as in diffusers.
            guidance_scale: of classifier-free guidance: a number, or one per sample.
            gradient: of a classifier, as ``fastguide.guided_step`` takes it.
            gradient_scale, gradient_form: its scale and form, as in ``fastguide.Classifier``.
        """
        output, guidance_scale = resolved(model_output, sample, guidance_scale)
        guidance = self._guidance(output, sample, guidance_scale, gradient, gradient_scale, gradient_form)
        fits = (
            isinstance(eta, (int, float))
            and 0 <= eta <= 1
            and not (generator is not None and variance_noise is not None)
            and (variance_noise is None or variance_noise.dtype != torch.float64 or sample.dtype == torch.float64)
        )
        if fits and self.num_inference_steps and self._serves(output, sample, gradient, variance_noise):
            row = self._row(timestep, sample)
            table = self._table(sample.device, float(eta), use_clipped_model_output)
            if self._is_defined(table, row) and self._fits(output, sample, guidance, guidance is not None):
                return self._step(
                    table,
                    row,
                    output,
                    sample,
                    generator,
                    variance_noise,
                    eta > 0,
                    return_dict,
                    guidance,
                    gradient,
                )
        return super().step(  # type: ignore[misc]
            self._combined(output, sample, guidance_scale, gradient),
            timestep,
            sample,
            eta,
            use_clipped_model_output,
            generator,
            variance_noise,
            return_dict,
        )


class _DDPM(HostAlphas, FusedStep):
    custom_timesteps: bool

    def _state(self) -> tuple[Any, ...]:
        return (self.config, self.alphas_cumprod, self.timesteps, self.num_inference_steps, self.variance_type)

    def _transitions(self, *arguments: Any) -> StepTable:
        chosen = self.custom_timesteps or self.num_inference_steps
        return transitions.ddpm_transitions(self, self._host_timesteps() if chosen else None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers'; the timesteps' values are kept on the host as well."""
        super().set_timesteps(num_inference_steps, None, timesteps)  # type: ignore[misc]
        self._remember(device)

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
        """One step: ``diffusers.DDPMScheduler.step``, and guidance with it.

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
        output, guidance_scale = resolved(model_output, sample, guidance_scale)
        guidance = self._guidance(output, sample, guidance_scale, gradient, gradient_scale, gradient_form)
        if self._serves(output, sample, gradient):
            row = self._row(timestep, sample)
            table = self._table(sample.device)
            learned = table.learned_variance
            if self._fits(output, sample, guidance, learned) and self._is_defined(table, row):
                draws = isinstance(row, Tensor) or row > 0
                return self._step(table, row, output, sample, generator, None, draws, return_dict, guidance, gradient)
        return super().step(  # type: ignore[misc]
            self._combined(output, sample, guidance_scale, gradient), timestep, sample, generator, return_dict
        )

    def _is_defined(self, table: StepTable, row: int | Tensor) -> bool:
        if isinstance(row, int) and row in table.undefined_rows:
            chosen = self._host_timesteps()
            if row not in chosen and (self.custom_timesteps or self.num_inference_steps):
                raise IndexError(
                    f"timestep: expected one of the {len(chosen)} that are set, {_ends(chosen)}, got {row}"
                )
        return super()._is_defined(table, row)


def _ends(timesteps: tuple[int, ...]) -> str:
    return (
        ", ".join(map(str, timesteps)) if len(timesteps) < 8 else f"{timesteps[0]}, {timesteps[1]} .. {timesteps[-1]}"
    )


class DDIMScheduler(_DDIM, diffusers.DDIMScheduler):
    """``diffusers.DDIMScheduler`` with the fused step.

    >>> import torch, fastguide.diffusers
    >>> scheduler = fastguide.diffusers.DDIMScheduler(clip_sample=False)
    >>> scheduler.set_timesteps(50)
    >>> latents, output = torch.randn(1, 4, 8, 8), torch.randn(2, 4, 8, 8)
    >>> scheduler.step(output, scheduler.timesteps[0], latents, guidance_scale=7.5).prev_sample.shape
    torch.Size([1, 4, 8, 8])
    """

    _output = outputs.LazyDDIMOutput


class DDPMScheduler(_DDPM, diffusers.DDPMScheduler):
    """``diffusers.DDPMScheduler`` with the fused step.

    Where diffusers returns NaN, for ``fixed_large_log`` and ``learned``, whose logarithms it takes the root of, the
    variance is the paper's.
    """

    _output = outputs.LazyDDPMOutput


class DDIMParallelScheduler(_DDIM, diffusers.DDIMParallelScheduler):
    """``diffusers.DDIMParallelScheduler`` with the fused step."""

    _output = outputs.LazyDDIMParallelOutput


class DDPMParallelScheduler(_DDPM, diffusers.DDPMParallelScheduler):
    """``diffusers.DDPMParallelScheduler`` with the fused step."""

    _output = outputs.LazyDDPMParallelOutput


class DDIMInverseScheduler(FusedStep, diffusers.DDIMInverseScheduler):
    """``diffusers.DDIMInverseScheduler`` with the fused step: from an image back to its noise."""

    _output = outputs.LazyDDIMInverseOutput
    initial_alpha_cumprod: Tensor

    def _state(self) -> tuple[Any, ...]:
        return (self.config, self.alphas_cumprod, self.initial_alpha_cumprod, self.num_inference_steps)

    def _transitions(self, *arguments: Any) -> StepTable:
        return transitions.ddim_transitions(self, 0.0, False, inverse=True)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As diffusers'; the timesteps' values are kept on the host as well."""
        super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        self._remember(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """One step: ``diffusers.DDIMInverseScheduler.step``; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        output, guidance_scale = resolved(model_output, sample, guidance_scale)
        guidance = self._guidance(output, sample, guidance_scale, None, 1.0, "epsilon")
        if self.num_inference_steps and self._serves(output, sample):
            row, table = self._row(timestep, sample), self._table(sample.device)
            if self._is_defined(table, row) and self._fits(output, sample, guidance, guidance is not None):
                return self._step(table, row, output, sample, None, None, False, return_dict, guidance, None)
        combined = self._combined(output, sample, guidance_scale, None)
        return super().step(combined, timestep, sample, return_dict)  # type: ignore[misc]
