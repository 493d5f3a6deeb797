"""What is known of a sample's x_0, for inpainting."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Known(NamedTuple):
    """A known image, and where: after each step the next sample is replaced there by the image, noised to its level.

    ``mask * x' + (1 - mask) * (sqrt(abar') * original + sqrt(1 - abar') * noise)``, as Lugmayr et al. 2022 (RePaint),
    eq. 8, do, with one noise for all steps, as diffusers' inpainting does; after the last step the image itself. Each
    is of the sample's shape and layout, and of any dtype of a sample's.
    """

    mask: Tensor
    """1 where the model paints, 0 where the image is known; what is between is blended."""
    original: Tensor
    """The known x_0."""
    noise: Tensor
    """Standard normal values."""
