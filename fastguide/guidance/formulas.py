"""State what the formulas of several guidances share: where they begin, and rescaling.

In a formula, u and c are the predictions without and with the condition, and ``d = c - u``. ``base`` is u, or c for the
form of the papers whose scale is less by one.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from .spaces import TableSpace
from .symbols import Space, Vector, Vectors

Base: TypeAlias = Literal["uncond", "cond"]
"""Which prediction guidance is added to."""
LEAST_NORM = 1e-12
"""A norm that is divided by counts as this where it is lower, as in ``torch.nn.functional.normalize``."""


class Begin(NamedTuple):
    """The vectors that most formulas begin with."""

    uncond: Vector
    cond: Vector
    shift: Vector
    """``cond - uncond``."""


def begin(v: Vectors) -> Begin:
    """Return u, c and d of the first two predictions."""
    uncond, cond = v.predictions[:2]
    return Begin(uncond, cond, cond - uncond)


def check_base(base: Any) -> None:
    """Refuse what is not the name of a base."""
    if base not in ("uncond", "cond"):
        raise ValueError(f"base: expected 'uncond' or 'cond', got {base!r}")


def check_space(space: Any) -> None:
    """Refuse what is no space."""
    if isinstance(space, TableSpace) or (isinstance(space, str) and space in get_args(Space)):
        return
    hint = f"; of a table, it is space_of(table, {space!r})" if space in ("epsilon", "velocity") else ""
    raise ValueError(f"space: expected one of {get_args(Space)}, or of space_of(table, name), got {space!r}{hint}")


def rescaled(v: Vectors, guided: Vector, cond: Vector, guidance_rescale: Any) -> Vector:
    """Return ``phi * std(c) / std(m) * m + (1 - phi) * m`` (Lin et al. 2023, section 3.4).

    A guided prediction m without deviation stays as it is; ``guidance_rescale=None`` leaves all as they are.
    """
    if guidance_rescale is None:
        return guided
    deviation = v.std(guided)
    ratio = v.where(deviation > 0.0, v.std(cond) / deviation, 1.0)
    factor = guidance_rescale * ratio + (1.0 - guidance_rescale)
    scaled: Vector = guided * factor
    return scaled
