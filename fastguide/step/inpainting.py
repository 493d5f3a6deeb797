"""The part of an image that is kept while the rest is painted."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inpainting(NamedTuple):
    """A known image, and where: after each step, its part of the next sample becomes the image, noised to its level.

    ``mask * x' + (1 - mask) * (alpha' * original + sigma' * noise)``, Lugmayr et al. 2022 (RePaint), eq. 8, with one
    noise for all steps as in diffusers' inpainting; after the last step it is the image itself. Each tensor has the
    sample's shape and layout, and any dtype that a sample may have.

    >>> import torch
    >>> from fastguide import Inpainting, NoiseSchedule, ddim, guided_step
    >>> x, image, noise = torch.randn(3, 2, 1, 8, 8)
    >>> mask = torch.zeros_like(x)
    >>> last = guided_step(ddim(NoiseSchedule.linear(), 5), 4, x, x, inpainting=Inpainting(mask, image, noise))
    >>> torch.equal(last, image)
    True
    """

    mask: Tensor
    """1 where the model paints, 0 where the image is kept; a value between blends the two."""
    original: Tensor
    """The known x_0."""
    noise: Tensor
    """Standard normal values."""
