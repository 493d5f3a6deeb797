"""Noise schedules: betas to cumulative alphas, and which timesteps a solver visits. Float64, host only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .._counts import check_count, is_integer
from .levels import Levels

TimestepSpacing: TypeAlias = Literal["leading", "trailing", "linspace"]


class NoiseSchedule:
    """A noise schedule: how much of the signal is left at each training timestep.

    A schedule holds ``alphas_cumprod`` (abar_t), a float64 CPU tensor of shape ``(num_train_timesteps,)`` that
    falls from nearly 1 to nearly 0: ``x_t = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * noise`` (Ho et al. 2020, eq. 4).
    Build one with a class method; a schedule is never changed in place.

    >>> schedule = NoiseSchedule.linear()
    >>> len(schedule), f"{schedule.alphas_cumprod[0]:.4f}", f"{schedule.alphas_cumprod[-1]:.2e}"
    (1000, '0.9999', '4.04e-05')
    """

    alphas_cumprod: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> NoiseSchedule:
        """Return a schedule of abar_t itself: one dimension, falling (ties allowed), every value in [0, 1)."""
        values = _as_tensor("alphas_cumprod", alphas_cumprod).detach().to("cpu", torch.float64, copy=True)
        if values.dim() != 1 or values.numel() == 0:
            raise ValueError(
                f"alphas_cumprod: expected one dimension and at least one value, got {tuple(values.shape)}"
            )
        if not bool(((values >= 0) & (values < 1)).all()):
            raise ValueError(
                "alphas_cumprod: expected every value in [0, 1), "
                f"got values from {values.min().item():.6g} to {values.max().item():.6g}"
            )
        if bool((values.diff() > 0).any()):
            raise ValueError(
                "alphas_cumprod: expected values that never rise, "
                f"got a rise at index {int((values.diff() > 0).nonzero()[0]) + 1}"
            )
        return cls(values)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> NoiseSchedule:
        """Return a schedule of the forward variances beta_t: one dimension, every value in (0, 1]."""
        values = _as_tensor("betas", betas).detach().to("cpu", torch.float64)
        if values.dim() != 1 or values.numel() == 0:
            raise ValueError(f"betas: expected one dimension and at least one value, got {tuple(values.shape)}")
        if not bool(((values > 0) & (values <= 1)).all()):
            raise ValueError(
                f"betas: expected every value in (0, 1], got values from {values.min().item():.6g} "
                f"to {values.max().item():.6g}"
            )
        return cls.from_alphas_cumprod(torch.cumprod(1.0 - values, dim=0))

    @classmethod
    def linear(
        cls, num_train_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Return a schedule whose betas rise linearly (Ho et al. 2020, section 4)."""
        check_count("num_train_timesteps", num_train_timesteps)
        return cls.from_betas(
            torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64, device="cpu")
        )

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Return latent diffusion's schedule, whose betas' roots rise linearly (Rombach et al. 2022)."""
        check_count("num_train_timesteps", num_train_timesteps)
        roots = torch.linspace(
            math.sqrt(beta_start), math.sqrt(beta_end), num_train_timesteps, dtype=torch.float64, device="cpu"
        )
        return cls.from_betas(roots.square())

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, *, max_beta: float = 0.999) -> NoiseSchedule:
        """Return the squared-cosine schedule, ``squaredcos_cap_v2`` (Nichol & Dhariwal 2021, eq. 17)."""
        check_count("num_train_timesteps", num_train_timesteps)
        time = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
        alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        return cls.from_betas((1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    @classmethod
    def sigmoid(
        cls, num_train_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Return a schedule whose betas follow a sigmoid from -6 to 6 (GeoDiff, Xu et al. 2022)."""
        check_count("num_train_timesteps", num_train_timesteps)
        steps = _linspace(-6.0, 6.0, num_train_timesteps)
        return cls.from_betas(torch.sigmoid(steps) * (beta_end - beta_start) + beta_start)

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Return this schedule shifted and scaled so that abar is exactly 0 at the last timestep.

        Lin et al. 2023, algorithm 1. Nothing of x_0 is left there, so ``prediction_type="epsilon"`` cannot serve
        that timestep: predict v or the sample.
        """
        roots = self.alphas_cumprod.sqrt()
        first, last = roots[0], roots[-1]
        if bool(first == last):
            raise ValueError("rescale_zero_terminal_snr: expected a schedule that falls, got a constant one")
        return self.from_alphas_cumprod(((roots - last) * (first / (first - last))).square())

    def shift_snr(self, scale: float) -> NoiseSchedule:
        """Return this schedule with its signal-to-noise ratio divided by ``scale``, as CogVideoX trains (scale 3).

        ``abar / (scale + (1 - scale) * abar)`` (Yang et al. 2024, diffusers' ``snr_shift_scale``; Hoogeboom et al. 2023
        for the idea).
        """
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {scale!r}")
        return self.from_alphas_cumprod(self.alphas_cumprod / (scale + (1 - scale) * self.alphas_cumprod))

    @property
    def sigmas(self) -> Tensor:
        """The sigma of each training timestep of the unscaled sample ``x_0 + sigma * epsilon``: sqrt(1/abar - 1).

        Where abar is 0, it is that of abar = 2^-24, 4096, as in diffusers: no sample is infinite.
        """
        abar = torch.where(self.alphas_cumprod == 0, 2.0**-24, self.alphas_cumprod)
        return ((1 - abar) / abar).sqrt()

    @property
    def levels(self) -> Levels:
        """The levels (alpha, sigma) = (sqrt(abar), sqrt(1 - abar)) of all training timesteps."""
        return Levels.from_alphas_cumprod(self.alphas_cumprod)

    @property
    def num_train_timesteps(self) -> int:
        """The number of timesteps that the model was trained with."""
        return self.alphas_cumprod.numel()

    def __len__(self) -> int:
        return self.num_train_timesteps

    def __repr__(self) -> str:
        ends = f"{self.alphas_cumprod[0].item():.6g} .. {self.alphas_cumprod[-1].item():.6g}"
        return f"NoiseSchedule(num_train_timesteps={len(self)}, alphas_cumprod={ends})"

    def timesteps(
        self, num_inference_steps: int, spacing: TimestepSpacing = "leading", *, steps_offset: int = 0
    ) -> Tensor:
        """Return the training timesteps that a solver visits: int64, shape ``(num_inference_steps,)``, falling.

        The three spacings of the field (Lin et al. 2023, table 2); ``steps_offset`` is added in ``leading`` only,
        as in diffusers.

        >>> NoiseSchedule.linear().timesteps(5, "trailing").tolist()
        [999, 799, 599, 399, 199]
        """
        check_count("num_inference_steps", num_inference_steps)
        if not is_integer(steps_offset):
            raise TypeError(f"steps_offset: expected an integer, got {steps_offset!r}")
        total = self.num_train_timesteps
        if num_inference_steps > total:
            raise ValueError(
                f"num_inference_steps: expected at most num_train_timesteps = {total}, got {num_inference_steps}"
            )
        if spacing == "leading":
            steps = torch.arange(num_inference_steps - 1, -1, -1, device="cpu") * (total // num_inference_steps)
            steps = steps + steps_offset
        elif spacing == "trailing":
            back = torch.arange(num_inference_steps, dtype=torch.float64, device="cpu") * (total / num_inference_steps)
            steps = (total - back).round().to(torch.int64) - 1
        elif spacing == "linspace":
            steps = _linspace(total - 1, 0, num_inference_steps)
            if num_inference_steps == 1:  # one step of a linspace is its first point, which is timestep 0
                steps = torch.zeros(1, dtype=torch.float64, device="cpu")
            steps = steps.round().to(torch.int64)
        else:
            raise ValueError(f"timestep_spacing: expected one of {get_args(TimestepSpacing)}, got {spacing!r}")
        return self.check_timesteps(steps)

    def check_timesteps(self, timesteps: Tensor | Sequence[int]) -> Tensor:
        """Return given timesteps as an int64 CPU tensor; refuse them unless they fall strictly within the schedule."""
        steps = _as_tensor("timesteps", timesteps)
        if steps.dim() != 1 or steps.numel() == 0:
            raise ValueError(f"timesteps: expected one dimension and at least one value, got {tuple(steps.shape)}")
        if steps.dtype.is_floating_point or steps.dtype == torch.bool:
            raise TypeError(f"timesteps: expected integers, got {steps.dtype}")
        steps = steps.detach().to("cpu", torch.int64)
        low, high = int(steps.min()), int(steps.max())
        if low < 0 or high >= self.num_train_timesteps:
            raise ValueError(
                f"timesteps: expected values from 0 to {self.num_train_timesteps - 1}, got {low} to {high}"
            )
        if bool((steps.diff() >= 0).any()):
            raise ValueError(f"timesteps: expected strictly falling values, got {steps.tolist()}")
        return steps


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")  # whatever the default device is


def _as_tensor(name: str, values: object) -> Tensor:
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor or a sequence of numbers, got {values!r}") from error
