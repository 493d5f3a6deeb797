"""The sigmas and timesteps of flow matching: shifts, terminal values, spacings. Float64, host only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from .._counts import check_count
from .levels import Levels
from .sigmas import SigmaSpacing, given_sigmas, spaced_sigmas

TimeShiftType: TypeAlias = Literal["exponential", "linear"]


class FlowSteps(NamedTuple):
    """What a solver of a flow visits: float64 on the host."""

    sigmas: Tensor
    """Shape (calls + 1,): where each step begins, and where the last one ends."""
    timesteps: Tensor
    """Shape (calls,): what the model is told."""


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching: ``x = (1 - sigma) * x_0 + sigma * epsilon``, and which sigmas a solver visits.

    Lipman et al. 2023 and Liu et al. 2023 (the straight path), Esser et al. 2024 (the shift, eq. 23). The numbers are
    those of diffusers' ``FlowMatchEulerDiscreteScheduler`` in float64, quirks included: without ``sigmas=``, the
    smallest sigma is shifted twice, once in the training schedule and once among the visited. A schedule is never
    changed in place.

    Args:
        num_train_timesteps: the model is told ``sigma * num_train_timesteps``.
        shift: sigma becomes ``shift * sigma / (1 + (shift - 1) * sigma)``; larger shifts for larger images.
        use_dynamic_shifting: shift by ``mu``, which each call gives for its number of image tokens, instead.
        time_shift_type: with mu, ``"exponential"``: ``exp(mu) / (exp(mu) + 1 / sigma - 1)``, or ``"linear"``: the same
            with mu instead of exp(mu).
        shift_terminal: the last sigma before 0, to which all are stretched; ``None``: as they are.
        invert_sigmas: the model's time runs from 0, noise, to 1 (Mochi): the sigmas that are returned rise.
        sigma_spacing: ``"karras"``, ``"exponential"`` or ``"beta"`` between the ends; ``None``: as they are.

    Raises:
        ValueError: an argument is not as described.

    >>> FlowSchedule(shift=3.0).steps(4)[0]
    tensor([1.0000, 0.8577, 0.6022, 0.0089, 0.0000], dtype=torch.float64)
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: TimeShiftType = "exponential"
    shift_terminal: float | None = None
    invert_sigmas: bool = False
    sigma_spacing: SigmaSpacing | None = None

    def __post_init__(self) -> None:
        check_count("num_train_timesteps", self.num_train_timesteps)
        if isinstance(self.shift, bool) or not isinstance(self.shift, (int, float)) or not 0 < self.shift < math.inf:
            raise ValueError(f"shift: expected a positive number, got {self.shift!r}")
        if self.time_shift_type not in get_args(TimeShiftType):
            raise ValueError(
                f"time_shift_type: expected one of {get_args(TimeShiftType)}, got {self.time_shift_type!r}"
            )
        if self.shift_terminal is not None and not 0 < self.shift_terminal < 1:
            raise ValueError(f"shift_terminal: expected a number above 0 and below 1, got {self.shift_terminal!r}")
        if self.sigma_spacing not in (None, *get_args(SigmaSpacing)):
            raise ValueError(
                f"sigma_spacing: expected None or one of {get_args(SigmaSpacing)}, got {self.sigma_spacing!r}"
            )

    def __len__(self) -> int:
        return self.num_train_timesteps

    @property
    def train_sigmas(self) -> Tensor:
        """The sigma of each training timestep, rising to 1, with the fixed shift: shape (num_train_timesteps,)."""
        sigmas = torch.arange(1, len(self) + 1, dtype=torch.float64, device="cpu") / len(self)
        return sigmas if self.use_dynamic_shifting else self._shifted(sigmas, None)

    @property
    def train_timesteps(self) -> Tensor:
        """What a model in training is told at each index: ``num_train_timesteps`` times the sigma, or 1 - sigma."""
        sigmas = self.train_sigmas
        return (1 - sigmas if self.invert_sigmas else sigmas) * len(self)

    @property
    def levels(self) -> Levels:
        """The levels (1 - sigma, sigma) of all training timesteps, for ``add_noise`` and ``training_target``."""
        return Levels.flow_matching(self.train_sigmas)

    def steps(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Tensor | Sequence[float] | None = None,
        timesteps: Tensor | Sequence[float] | None = None,
        mu: float | None = None,
    ) -> FlowSteps:
        """Return the sigmas and timesteps that a solver visits.

        Args:
            num_inference_steps: number of steps, if ``sigmas`` and ``timesteps`` do not say them.
            sigmas: where the steps begin, strictly falling, above 0 and up to 1; they are shifted as any others are.
                The last step leads to 0.
            timesteps: what the model is told, instead of what follows from the sigmas. Without ``sigmas``, the sigmas
                are those of the timesteps, shifted.
            mu: the shift of this image size, with ``use_dynamic_shifting``; refused without.

        Raises:
            TypeError, ValueError: an argument is not as described, or the resulting sigmas do not fall.

        >>> FlowSchedule(use_dynamic_shifting=True).steps(sigmas=[1.0, 0.5], mu=1.15).timesteps
        tensor([1000.0000,  759.5109], dtype=torch.float64)
        """
        self._check_mu(mu)
        begins, told = self._begins(num_inference_steps, sigmas, timesteps)
        begins = self._shifted(begins, mu)
        if self.shift_terminal is not None:  # stretch 1 - sigma
            begins = 1 - (1 - begins) * ((1 - self.shift_terminal) / (1 - begins[-1]))
        if self.sigma_spacing is not None:
            begins = spaced_sigmas(self.sigma_spacing, len(begins), begins[0].item(), begins[-1].item())
        if not bool((begins.diff() < 0).all()) or not bool(((begins > 0) & (begins <= 1)).all()):
            raise ValueError(f"sigmas: expected strictly falling values above 0 and up to 1, got {begins.tolist()}")
        if self.invert_sigmas:
            inverted = 1 - begins
            return FlowSteps(torch.cat([inverted, inverted.new_ones(1)]), inverted * len(self))
        told = begins * len(self) if told is None else told
        return FlowSteps(torch.cat([begins, begins.new_zeros(1)]), told)

    def _check_mu(self, mu: float | None) -> None:
        if self.use_dynamic_shifting:
            if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not math.isfinite(mu):
                raise ValueError(f"mu: expected a number, as use_dynamic_shifting is True, got {mu!r}")
            if self.time_shift_type == "linear" and mu <= 0:
                raise ValueError(f"mu: expected a positive number, as time_shift_type is 'linear', got {mu!r}")
        elif mu is not None:
            raise ValueError(f"mu: expected None, as use_dynamic_shifting is False, got {mu!r}")

    def _begins(
        self,
        num_inference_steps: int | None,
        sigmas: Tensor | Sequence[float] | None,
        timesteps: Tensor | Sequence[float] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return where the steps begin, before any shift, and the timesteps that the caller gives."""
        told = None if timesteps is None else given_sigmas("timesteps", timesteps)
        begins = None if sigmas is None else given_sigmas("sigmas", sigmas)
        if begins is None and told is not None:
            begins = told / len(self)
        if begins is None:
            if num_inference_steps is None:
                raise ValueError("num_inference_steps: expected a number, or sigmas=, got None")
            check_count("num_inference_steps", num_inference_steps)
            train = self.train_sigmas
            ends = train[-1].item(), train[0].item()
            return torch.linspace(*ends, num_inference_steps, dtype=torch.float64, device="cpu"), None
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("timesteps", None if told is None else len(told)),
        ):
            if count is not None and count != len(begins):
                raise ValueError(f"{name}: expected {len(begins)}, the number of sigmas, got {count}")
        return begins, told

    def _shifted(self, sigmas: Tensor, mu: float | None) -> Tensor:
        """Return shifted sigmas (Esser et al. 2024, eq. 23; with mu, the same with exp(mu) or mu for the shift)."""
        if mu is None:
            return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
        return factor / (factor + (1 / sigmas - 1))
