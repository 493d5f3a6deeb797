"""The operator ``torch.ops.fastguide.guided_step``: its one list of arguments, the schema made of it, and its fake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor


class StepArguments(NamedTuple):
    """All that one step reads and writes; the schema is made of these fields, and backends are called with them.

    A tensor that a step gains is a field here, and in ``StepArguments`` of csrc/kernels/arguments.h: see
    docs/extending.md.
    """

    out: Tensor
    """The next sample; like every tensor of ``ELEMENTWISE``, of the sample's shape and layout within a sample."""
    original: Tensor | None
    """The predicted original sample."""
    staged: Tensor | None
    """The next model input, as often as its batch is a multiple of the sample's."""
    sample: Tensor
    predictions: list[Tensor]
    """One a weight, or one tensor that holds them all along the batch."""
    rows: Tensor
    """Of shape (calls, columns), float32 or float64, which is the precision of the arithmetic."""
    weights: Tensor
    """Of shape (calls or 1, batch or 1, predictions + 1), as ``Guidance`` describes them."""
    index: int  # type: ignore[assignment]  # hides the method of tuple
    """The row, unless ``indices`` or ``cursor`` say it."""
    indices: Tensor | None
    """Rows: int64 of shape () or (batch,)."""
    gradient: Tensor | None
    variance: Tensor | None
    noise: Tensor | None
    """Standard normal values that were drawn already; at most one of ``noise``, ``seeds`` and ``philox``."""
    seeds: Tensor | None = None
    """Of the portable stream, drawn by the kernel: int64 of shape () or (batch,)."""
    philox: Tensor | None = None
    """torch's CUDA stream, drawn by the kernel: seed and offset on the CPU, or ``DeviceGenerator.state``."""
    philox_threads: int = 0
    """Threads of torch's own kernel for a tensor of this size."""
    cursor: Tensor | None = None
    """``Cursor.state``: where each sample is in its table; the step moves it on."""
    timestep: Tensor | None = None
    """``Cursor.timestep``, written for the next model call."""
    mask: Tensor | None = None
    """``Inpainting.mask``: 0 where the next sample is ``known``, noised by ``known_noise`` to its level."""
    known: Tensor | None = None
    known_noise: Tensor | None = None
    anchor: Tensor | None = None
    """What the last call wrote, where the caller has changed it since: the sample itself unless it is given."""
    history: Tensor | None = None
    """``History.entries``: slots of a sample each, one after the other along the batch, in the arithmetic's dtype."""
    program: Tensor | None = None
    """Makes the weights of each sample from its predictions' moments, see ``fastguide.guidance.encoded``: int32 of
    shape (1 or batch, words). ``weights`` then give the gradient's scale alone. Kernels read it on the device, but
    Triton's of groups are compiled for its words. If it is a tensor on a GPU that no ``Guidance`` has made, the host
    reads these once, and again after each write to it, and waits for the GPU; the reference does at each step."""
    parameters: Tensor | None = None
    """What the program computes with beside moments: float64 of shape (calls or 1, batch or 1, numbers)."""
    made: Tensor | None = None
    """The weights that the program makes: (batch, predictions + 1), or one more, which is the sample's own."""
    scratch: Tensor | None = None
    """A GPU's memory for a program, float64 and 0 between two steps; of one stream at a time."""
    inverse_thresholds: Tensor | None = None
    """Gets 1 over the threshold of each sample's x_0, and holds what a GPU needs to find it: see ``thresholds.py``."""

    def named_inputs(self) -> list[tuple[str, Tensor]]:
        """Return the tensors that are read element by element, each with its name in messages."""
        predictions: Sequence[Tensor] = self.predictions
        if len(predictions) == 1 and predictions[0].shape[0] > self.sample.shape[0] > 0:  # one tensor of all
            predictions = predictions[0].unflatten(0, (-1, self.sample.shape[0])).unbind(0)
        stacked = [(f"predictions[{k}]", prediction) for k, prediction in enumerate(predictions)]
        return [
            *((NAMES.get(name, name), tensor) for name in INPUTS if (tensor := getattr(self, name)) is not None),
            *stacked,
        ]


def elementwise(a: StepArguments) -> tuple[Tensor | None, ...]:
    """Return the fields that have an element for each of the sample's; None where one is absent."""
    return (
        a.out, a.original, a.sample, a.gradient, a.variance, a.noise, a.mask, a.known, a.known_noise, a.anchor,
    )  # fmt: skip


ELEMENTWISE: tuple[str, ...] = elementwise(StepArguments._make(StepArguments._fields))  # type: ignore[assignment]
"""The names of those fields."""
WRITTEN = (
    "out",
    "original",
    "staged",
    "philox",
    "cursor",
    "timestep",
    "history",
    "made",
    "scratch",
    "inverse_thresholds",
)
"""Fields that the step writes."""
INPUTS = tuple(name for name in ELEMENTWISE if name not in WRITTEN)
MAY_BE_OUTPUT = ("sample", "predictions", "gradient", "variance", "noise")
"""Inputs that ``out`` and ``original`` may be, element for element: ``may_be_output`` in csrc/kernels/arguments.h."""
THRESHOLD_WORDS = 2056
"""Of a sample's ``inverse_thresholds`` on a GPU: that, and what the search needs (csrc/kernels/thresholds.h)."""
NAMES = {"mask": "inpainting.mask", "known": "inpainting.original", "known_noise": "inpainting.noise"}
"""What the fields are called by the callers of ``guided_step``, where that differs."""

_INPUT_PLACES = tuple(StepArguments._fields.index(name) for name in INPUTS)


def inputs(arguments: StepArguments) -> list[Tensor]:
    """Return the tensors that are read element by element, predictions included."""
    tensors = [tensor for place in _INPUT_PLACES if (tensor := arguments[place]) is not None]
    return [*tensors, *arguments.predictions]  # type: ignore[list-item]


def _schema() -> str:
    """Return the fields as an operator's schema, in which each written tensor has an alias of its own."""
    types = {Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", int: "SymInt"}
    defaults, parts = StepArguments._field_defaults, []
    for name, hint in get_type_hints(StepArguments).items():
        kind = types[hint]
        if name in WRITTEN:
            kind = f"Tensor({chr(ord('a') + WRITTEN.index(name))}!){kind.removeprefix('Tensor')}"
        default = f"={defaults[name]}" if name in defaults else ""
        parts.append(f"{kind} {name}{default}")
    return f"({', '.join(parts)}) -> ()"


SCHEMA = _schema()
"""The schema of the operator, and of a backend's own operator."""


def guided_step_fake(*_arguments: object) -> None:
    """Write nothing: the operator fills tensors whose shapes the caller has set, so nothing is left to infer."""


library = torch.library.Library("fastguide", "DEF")
library.define("guided_step" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("fastguide::guided_step", guided_step_fake, lib=library)
library.define("record_step" + SCHEMA.replace(") -> ()", ", *, Tensor(z!) record) -> ()"))
"""Writes the step into ``record`` as plain data, and does not make it: see ``repeat.py``."""
