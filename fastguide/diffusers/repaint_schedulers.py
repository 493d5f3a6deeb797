"""diffusers' scheduler of RePaint with the fused step: DDIM's, and the known part of an image in the same pass."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..guidance import Guidance
from ..solvers import StepTable
from ..solvers._repaint import undoing_rows
from ..solvers.ddim import ddim_table
from ..step.guided_step import guided_step
from ..step.inpainting import Inpainting
from ..step.memory import DTYPES, dense_within_sample, in_layout_of
from . import lazy_outputs
from .fitted import SHAPES, refusal_of
from .guidance_arguments import Scale, combined
from .lazy_tensor import plain
from .scheduler_step import LEFT, SchedulerStep, count, plan, run
from .tables import UNDEFINED, current_tables, host_alphas
from .timesteps import row_of
from .weights_of_formula import Conversion
from .written_tables import state_of

__all__ = ["RePaintScheduler"]

_MOST = 32
"""Noises that are added in one launch, as many predictions as kernels take on a GPU."""


class _Undoing(NamedTuple):
    """The rows that lead back to more noise, as long as the scheduler has these very betas."""

    betas: Tensor
    version: Any
    length: int
    """Of a step, in timesteps."""
    rows: StepTable
    weights: Guidance
    """Of the noises."""
    by_device: dict[torch.device, StepTable]

    def is_of(self, betas: Tensor, length: int) -> bool:
        """Tell whether these are the rows of what a scheduler has now; torch.compile does not trace who writes."""
        same = self.betas is betas and self.length == length
        return same and (torch.compiler.is_compiling() or self.version == state_of(betas))


class RePaintScheduler(SchedulerStep, diffusers.RePaintScheduler):  # type: ignore[metaclass]
    """``diffusers.RePaintScheduler`` with the fused step."""

    _output = lazy_outputs.LazyRePaintOutput
    _state = ("_internal_dict", "alphas_cumprod", "final_alpha_cumprod", "num_inference_steps")
    betas: Tensor
    final_alpha_cumprod: Tensor
    eta: Any
    _undoing: _Undoing | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave these out of copies, as weights may hold what cannot be copied."""
        return {name: value for name, value in super().__getstate__().items() if name != "_undoing"}

    def _transitions(self, eta: float) -> StepTable:
        """Return the rows from every t to t - num_train_timesteps // num_inference_steps."""
        assert self.num_inference_steps is not None
        count = self.config.num_train_timesteps // self.num_inference_steps
        alphas, steps = host_alphas(self), torch.arange(len(self.alphas_cumprod), device="cpu")
        previous = steps - count
        return ddim_table(
            steps,
            alphas,
            torch.where(previous >= 0, alphas[previous.clamp(min=0)], float(self.final_alpha_cumprod)),
            eta=eta,
            use_clipped_model_output=False,
            prediction_type="epsilon",
            clip_sample_range=1.0 if self.config.clip_sample else None,
            undefined=UNDEFINED,
        )

    def set_timesteps(
        self,
        num_inference_steps: int,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        device: str | torch.device | None = None,
    ) -> None:
        """Set the timesteps as diffusers does; the host remembers their values."""
        super().set_timesteps(num_inference_steps, jump_length, jump_n_sample)  # type: ignore[misc]
        self._timesteps_are_set(device, self._eta() or 0.0)

    def _eta(self) -> float | None:
        """Return eta as a number; ``None``: rows do not express it."""
        eta = float(self.eta) if isinstance(self.eta, Real) else None
        return eta if eta is not None and 0 <= eta <= 1 else None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``.

        The mask is 1 where the image is known; it and the image may have fewer channels or samples than the sample.
        """
        sample, original_image, mask = plain((sample, original_image, mask))
        reason = _why_not(sample, model_output.dtype, original_image, mask)
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            reason = "timesteps for each sample"
        planned = None
        if reason is None:
            arguments = None if self._eta() is None else (self._eta(),)
            planned = plan(self, arguments, model_output, timestep, sample, guidance_scale=guidance_scale)
        else:
            count(self, LEFT + reason)
        if planned is None:
            output = combined(self, model_output, sample, guidance_scale, None)
            return super().step(output, timestep, sample, original_image, mask, generator, return_dict)  # type: ignore[misc]
        given, dtype = planned.sample, planned.model_dtype
        noise = randn_tensor(tuple(given.shape), generator=generator, device=given.device, dtype=dtype)
        noise, known = in_layout_of(given, noise), in_layout_of(given, original_image.expand(given.shape))
        painted = 1.0 - mask.to(torch.promote_types(mask.dtype, torch.float32))
        inpainting = Inpainting(in_layout_of(given, painted.expand(given.shape)), known, noise)
        row, table = planned.row, planned.table
        adds = table.adds_noise_anywhere if isinstance(row, Tensor) else table.adds_noise[row]
        return run(planned._replace(inpainting=inpainting), None, noise if adds else None, False, return_dict)

    def undo_step(
        self, sample: Tensor, timestep: int | Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """Add the noise of as many timesteps as a step takes away: diffusers' own draws, and one sum of them."""
        sample, steps = plain(sample), self.num_inference_steps
        count = 0 if steps is None else self.config.num_train_timesteps // steps
        if not 1 <= count <= _MOST or self._why_not_undone(sample) is not None:
            return super().undo_step(sample, timestep, generator)  # type: ignore[misc, no-any-return]
        row = row_of(self, timestep, sample)
        if isinstance(row, int) and not 0 <= row <= len(self.betas) - count:
            return super().undo_step(sample, timestep, generator)  # type: ignore[misc, no-any-return]
        how: dict[str, Any] = {"generator": generator, "device": sample.device, "dtype": sample.dtype}
        noises = [in_layout_of(sample, randn_tensor(tuple(sample.shape), **how)) for _ in range(count)]
        table, weights = self._rows_back(sample.device, count)
        if not dense_within_sample(sample.shape, sample.stride()):
            sample, noises = sample.contiguous(), [noise.contiguous() for noise in noises]
        return guided_step(table, row, sample, noises, weights)

    def _rows_back(self, device: torch.device, count: int) -> tuple[StepTable, Guidance]:
        """Return the rows that lead back to more noise, and the weights of the noises."""
        betas, made = self.betas, self._undoing
        if made is None or not made.is_of(betas, count):
            rows, weights = undoing_rows(betas.detach().to("cpu", torch.float32), count)
            made = self._undoing = _Undoing(betas, state_of(betas), count, rows, Conversion(weights, None), {})
        if device not in made.by_device:
            made.by_device[device] = made.rows.to(device)
        return made.by_device[device], made.weights

    def _why_not_undone(self, sample: Tensor) -> str | None:
        """Say why adding noise is left to diffusers; ``None``: it is not."""
        if sample.device.type == "mps":
            return "noise that is drawn on the host"
        return current_tables(self).refusal or refusal_of(sample, sample, None, None)


def _why_not(sample: Tensor, model: torch.dtype, *known: Tensor) -> str | None:
    """Say why a step with this image and mask is left to diffusers; ``None``: it is not."""
    dtype = torch.promote_types(sample.dtype, model)
    for each in known:
        if each.dtype not in DTYPES or torch.promote_types(dtype, each.dtype) != dtype:
            return f"an image or a mask of {each.dtype}"
        if each.device != sample.device:
            return "tensors of two devices"
        if each.requires_grad and torch.is_grad_enabled():
            return "autograd"
        sizes = zip(reversed(sample.shape), reversed(each.shape), strict=False)
        if each.dim() > sample.dim() or any(other not in (1, size) for size, other in sizes):
            return SHAPES
    return None
