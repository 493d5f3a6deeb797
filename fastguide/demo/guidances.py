"""Compare kinds of classifier-free guidance at one large scale: on digits, and on the mixture in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..guidance import AdaptiveProjected, ClassifierFree, Guidance, MagnitudeAware, Normalized, Tangential, ZeroStar
from ..sampling.sampler import Sampler
from ..solvers import StepTable
from . import digits, paths
from .methods import noise
from .mixture import DEVIATIONS, MEANS
from .models import NULL_CLASS, Denoiser

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SCALE = 8.0
_FULL = 0.98
"""Pixels count as saturated above this, of 1."""

KINDS: dict[str, Callable[[StepTable], Guidance]] = {
    "plain": lambda table: ClassifierFree(SCALE),
    "rescaled, 0.7": lambda table: ClassifierFree(SCALE, guidance_rescale=0.7),
    "within 0.2 to 0.8": lambda table: ClassifierFree(SCALE).within(table, 0.2, 0.8),
    "normalized": lambda table: Normalized(SCALE, at_most=1.0),
    "projected, in x_0": lambda table: AdaptiveProjected(SCALE - 1, norm_threshold=None, base="cond", space="original"),
    "tangential": lambda table: Tangential(SCALE),
    "magnitude-aware": lambda table: MagnitudeAware(SCALE),
    "zero star": lambda table: ZeroStar(SCALE, zero_init_steps=0),
}
"""By name, each of a table, for those that are bounded to a part of it."""


class OnDigits(NamedTuple):
    """Images of one kind of guidance, and what was measured of them."""

    name: str
    images: Tensor
    agreement: float
    """With the independent classifier."""
    diversity: float
    """Coverage of real digits, over that of as many other real digits."""
    saturation: float
    """The share of pixels that are black or white, over that of real digits."""

    def numbers(self) -> dict[str, Any]:
        """Return what is written to the results."""
        quality = {"agreement": self.agreement, "diversity": self.diversity, "saturation": self.saturation}
        return {"guidance": self.name, "scale": SCALE, **quality}


def images_of(
    name: str,
    table: StepTable,
    denoiser: Denoiser,
    labels: Tensor,
    seed: int,
    backend: str | None,
    mesh: DeviceMesh | None = None,
) -> Tensor:
    """Sample the labels with one of the kinds of guidance; all start from the same noise."""
    sampler = Sampler(denoiser, table, KINDS[name](table), backend=backend, mesh=mesh)
    return sampler(**noise(len(labels), seed, mesh), cond=labels, uncond=torch.full_like(labels, NULL_CLASS))


def on_digits(
    images_of: Callable[[str], Tensor],
    judge: digits.Judge,
    held_out: digits.Digits,
    labels: Tensor,
    real_coverage: float,
) -> list[OnDigits]:
    """Measure the images of each kind of guidance."""
    found = []
    for name in KINDS:
        images = images_of(name)
        found.append(
            OnDigits(
                name,
                images,
                judge.agreement(images, labels),
                digits.coverage(images, held_out) / real_coverage,
                _full(images) / _full(held_out.images),
            )
        )
    return found


def _full(images: Tensor) -> float:
    return float((images.abs() > _FULL).double().mean())


class OnMixture(NamedTuple):
    """Samples of one kind of guidance in the plane, of shape (n, 2), and how they lie to their class."""

    name: str
    samples: Tensor
    distance: float
    """Of their mean to the class's, in the class's standard deviations."""
    spread: float
    """Their standard deviation, over the class's."""


def on_mixture(*, samples: int = 300, steps: int = 60) -> list[OnMixture]:
    """Sample a class of the mixture with each kind of guidance, but for rescaling: two numbers have no deviation."""
    found, deviation = [], float(DEVIATIONS[paths.LABEL])
    for name, make in KINDS.items():
        if name.startswith("rescaled"):
            continue
        end = paths.guided(make, samples=samples, steps=steps)[-1]
        centre = end.mean(0)
        distance = float((centre - MEANS[paths.LABEL]).norm()) / deviation
        spread = math.sqrt(float((end - centre).square().mean())) / deviation
        found.append(OnMixture(name, end, distance, spread))
    return found


def table_of(found: list[OnDigits]) -> str:
    """Return a table with a line for each kind of guidance on digits."""
    lines = [f"{f'guidance of scale {SCALE:g}':<22} {'agreement':>10} {'diversity':>10} {'saturation':>11}"]
    for each in found:
        lines.append(f"{each.name:<22} {each.agreement:>10.1%} {each.diversity:>10.2f} {each.saturation:>11.2f}")
    return "\n".join(lines)
