"""How much signal and how much noise a sample holds: (alpha, sigma), of which abar is the variance-preserving case."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """The levels of several timesteps: ``x_t = alpha * x_0 + sigma * epsilon``.

    Two tensors of one shape, float64 on the host. ``alpha^2 + sigma^2`` is 1 where the schedule preserves the variance
    (Ho et al. 2020: alpha^2 = abar); flow matching has alpha = 1 - sigma; EDM (Karras et al. 2022) has alpha = 1.

    >>> import torch
    >>> Levels.from_alphas_cumprod(torch.tensor([0.64], dtype=torch.float64))
    Levels(alpha=tensor([0.8000], dtype=torch.float64), sigma=tensor([0.6000], dtype=torch.float64))
    """

    alpha: Tensor
    """What x_0 is multiplied by."""
    sigma: Tensor
    """What the noise is multiplied by."""

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Levels:
        """Return the levels (sqrt(abar), sqrt(1 - abar))."""
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

    @classmethod
    def flow_matching(cls, sigmas: Tensor) -> Levels:
        """Return the levels (1 - sigma, sigma) of the straight path (Lipman et al. 2023; Liu et al. 2023)."""
        return cls(1 - sigmas, sigmas)

    @classmethod
    def variance_exploding(cls, sigmas: Tensor) -> Levels:
        """Return the levels (1, sigma) of an unscaled sample (Song et al. 2021, section 3.4; Karras et al. 2022)."""
        return cls(torch.ones_like(sigmas), sigmas)

    def at(self, places: Tensor | slice) -> Levels:
        """Return the levels at these indices."""
        return Levels(self.alpha[places], self.sigma[places])

    @property
    def is_flow_matching(self) -> bool:
        """Whether alpha = 1 - sigma at every level, as ``flow_prediction`` needs it."""
        return not bool(((self.alpha + self.sigma - 1).abs() > 1e-6).any())

    @property
    def radius(self) -> Tensor:
        """The root of alpha^2 + sigma^2, which is 1 where the variance is preserved."""
        return (self.alpha.square() + self.sigma.square()).sqrt()
