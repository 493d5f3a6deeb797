"""The operators beside the step's own: its backward pass, a step that notes its clips for that, and its distance from
its mean. Their arguments and fakes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .operator import SCHEMA, StepArguments, guided_step_fake, library

_KNOWN = frozenset({
    "out", "original", "staged", "sample", "predictions", "rows", "weights", "index", "indices", "gradient", "variance",
    "noise", "seeds", "philox", "philox_threads", "cursor", "timestep", "mask", "known", "known_noise", "anchor",
    "history", "program", "parameters", "made", "scratch",
})  # fmt: skip
"""The fields of ``StepArguments`` that these operators, and who calls them, have been written for."""


def unknown_fields(a: StepArguments) -> list[str]:
    """Return the fields that a step has beyond these: their part in a gradient is not known."""
    others = {name: getattr(a, name) for name in a._fields if name not in _KNOWN}
    defaults = a._field_defaults
    return [name for name, value in others.items() if isinstance(value, Tensor) or value != defaults.get(name)]


class Gradients(NamedTuple):
    """What the backward pass reads and writes beside a step's arguments, of which ``out`` says no more than the layout.

    The first three come in, the gradients of what the step wrote, and ``clipped``. The others go out; ``None``: it is
    not asked for.
    ``FASTGUIDE_GRADIENTS`` in csrc/kernels/backward.h has the same.
    """

    grad_out: Tensor | None = None
    grad_original: Tensor | None = None
    grad_left: Tensor | None = None
    """Of the history, as the step has left it."""
    grad_sample: Tensor | None = None
    grad_predictions: tuple[Tensor, ...] = ()
    """As the predictions come: one each, or one for all along the batch; empty: not asked for."""
    grad_gradient: Tensor | None = None
    grad_variance: Tensor | None = None
    grad_noise: Tensor | None = None
    grad_anchor: Tensor | None = None
    grad_history: Tensor | None = None
    """Of the history, as the step has read it."""
    grad_weights: Tensor | None = None
    """Of each sample's own weights, whether it shares them or not: float64 of shape (batch, columns).

    The operator for CUDA leaves those of each tile, (batch, tiles, columns), which backends/native.py adds up.
    """
    clipped: Tensor | None = None
    """Where the step has clipped x_0, as ``guided_step_clipped`` writes it; ``None``: the inputs say it."""


def empty_clipped(sample: Tensor) -> Tensor:
    """Return a place for a bit of each element of a sample, whose samples begin with a byte each."""
    batch = len(sample)
    return sample.new_empty((batch, -(-(sample.numel() // max(batch, 1)) // 8)), dtype=torch.uint8)


def _schema() -> str:
    """Return the fields as arguments of an operator, those that it writes with aliases of their own."""
    parts = []
    for place, name in enumerate(Gradients._fields):
        written = name != "clipped" and place >= Gradients._fields.index("grad_sample")
        alias, several = f"({chr(ord('m') + place)}!)" if written else "", name == "grad_predictions"
        parts.append(f"Tensor{alias}{'[]' if several else '?'} {name}{'' if several else '=None'}")
    return ", ".join(parts)


library.define("guided_step_backward" + SCHEMA.replace(") -> ()", f", *, {_schema()}) -> ()"))
library.define("guided_step_clipped" + SCHEMA.replace(") -> ()", ", *, Tensor(z!) clipped) -> ()"))
"""Makes a step, and writes where it clips x_0: a bit an element in their order in memory, the first one's the lowest,
in uint8 of shape (batch, bytes)."""
library.define("guided_step_squares" + SCHEMA.replace(") -> ()", ", *, bool makes_step, Tensor(z!) squares) -> ()"))
"""Writes the sum of (x' - mean)^2 over each sample into ``squares``, float64 of shape (batch,); the mean is the step
without its noise. It makes the step; or ``out`` is what the step made, and it moves the history on alone."""
for _name in ("guided_step_backward", "guided_step_clipped", "guided_step_squares"):
    torch.library.register_fake(f"fastguide::{_name}", lambda *_, **__: guided_step_fake(), lib=library)
