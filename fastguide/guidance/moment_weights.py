"""Make the weights of each sample's predictions from their moments, by a program that a function was traced to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .encoded import encode, group_scratch_numbers, scratch_numbers
from .groups import number_of_groups, sizes_of_groups
from .program import Program, input_of, traced
from .scales import scale_columns
from .spaces import TableSpace
from .symbols import Space, Vector
from .words import remember

_HOST = torch.device("cpu")
_ACTIVE = "active"
"""The input of programs that are not for every step."""


class MomentWeights:
    """Weights that a program makes of moments and parameters.

    Args:
        program: makes them.
        parameters: by name, each a number or of shape (steps or 1, batch or 1), on any device.
        active: bools on the host, one a step: elsewhere the weights are those of the conditional prediction alone.
        dims: the dimensions of a group of elements that has moments and weights of its own; ``None``: a whole sample.

    Raises:
        ValueError: the program is too large for the kernels, or has too many predictions.
    """

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, float | Tensor],
        active: Tensor | None = None,
        dims: tuple[int, ...] | None = None,
    ) -> None:
        self._always = program, dict(parameters)
        self.active, self.dims = active, dims
        values = {input_of(name): value for name, value in parameters.items()}
        if active is not None:
            program = program.where(_ACTIVE, [1.0, 1.0])
            values[_ACTIVE] = active.double().view(-1, 1)
        self.program, self.names = program, tuple([name for name in program.inputs if name in values])
        """In the program's own order: where programs are the same, so are the places of their parameters."""
        encoded = encode(program, self.names)
        self._encoded = encoded.words
        self._words = {_HOST: torch.tensor([encoded.words], dtype=torch.int32, device="cpu")}
        self._constants = encoded.constants
        self._parameters = self._columns(values)
        self._on_devices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._made: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        """Where steps write their weights, and that as ``last_weights`` has it."""
        self._scratch: dict[tuple[torch.device, int, int], Tensor] = {}
        self._of_groups: dict[torch.device, list[Tensor]] = {}
        """Memory for guided predictions, the largest last: none is given back, as a graph of the caller's may write to
        it. Each is at least twice as large as the one before, so that all are four times what is needed, at most."""
        self.last_weights: Tensor | None = None
        """What was made last, as the step read it: the sum of all weights, those of all predictions but the first, and
        a classifier's scale, and the sample's own if it has one, on the device; shape (1, batch, columns), or
        (1, batch, ..., columns), with the dimensions whose places are groups."""

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter requires a gradient."""
        return self._parameters.requires_grad

    @classmethod
    def of(
        cls,
        function: Callable[..., Vector],
        count: int,
        parameters: Mapping[str, float | Tensor],
        options: Mapping[str, Any] | None = None,
        space: Space | TableSpace = "prediction",
        first_is_state: bool = False,
        dims: tuple[int, ...] | None = None,
    ) -> MomentWeights:
        """Return the weights that a function makes; see ``traced``."""
        program = traced(function, count, tuple(parameters), options or {}, space, first_is_state)
        of_space = space.parameters() if isinstance(space, TableSpace) else {}
        return cls(program, {**parameters, **of_space}, dims=dims)

    @property
    def scales(self) -> list[float | Tensor]:
        """The parameters, each a number or of shape (steps or 1, batch or 1)."""
        return list(self._always[1].values())

    def with_parameters(self, parameters: Mapping[str, float | Tensor]) -> MomentWeights:
        """Return the same program with other numbers, and the same memory: what either makes is gone with the other.

        ``parameters``: as many, of the same names.
        """
        other = copy.copy(self)
        other._always = self._always[0], dict(parameters)
        values = {input_of(name): value for name, value in parameters.items()}
        if self.active is not None:
            values[_ACTIVE] = self.active.double().view(-1, 1)
        other._parameters = self._columns(values)
        other._on_devices, other.last_weights = {}, None
        return other

    def _columns(self, values: Mapping[str, float | Tensor]) -> Tensor:
        """Return the parameters, by the names of their inputs, and the constants."""
        return scale_columns(*[values[name] for name in self.names], *self._constants).double()

    def where(self, active: Tensor) -> MomentWeights:
        """Return the same weights at some of the steps, and the conditional prediction's alone at the others."""
        both = active if self.active is None else active & self.active
        return MomentWeights(*self._always, both, self.dims)

    def of_samples(self, samples: slice) -> MomentWeights:
        """Return the weights of some samples."""
        program, parameters = self._always
        of_samples = {name: _of_samples(p, samples) for name, p in parameters.items()}
        return MomentWeights(program, of_samples, self.active, self.dims)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the program as kernels read it, int32 of shape (1, words), and its parameters and constants.

        These are float64, of shape (steps or 1, batch or 1, numbers).
        """
        found = self._on_devices.get(device)
        if found is None:
            with torch.inference_mode(False), torch.set_grad_enabled(self._parameters.requires_grad):  # for later, too
                words = self._words.get(device)
                if words is None:
                    words = self._words[device] = self._words[_HOST].to(device)
                    if not torch.compiler.is_compiling():
                        remember(words, self._encoded)
                parameters = self._parameters.to(device, non_blocking=True)  # from pageable memory: staged at once
                found = self._on_devices[device] = words, parameters.contiguous()
        return found

    def place_for(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        """Return where a step writes the weights that it makes, and ``last_weights`` finds them.

        Its shape is (batch, columns), or (batch * groups, columns).
        """
        batch, groups = sample.shape[0], number_of_groups(self.dims, sample)
        laid_out = None if self.dims is None or sample.is_contiguous() else (sample.shape, sample.stride())
        key = sample.device, dtype, batch, groups, laid_out
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False):  # or only inference mode could write it
                place = torch.empty(batch * groups, len(self.program.weights) + 1, dtype=dtype, device=sample.device)
                found = self._made[key] = place, self.as_last_weights(place, sample)
        place, self.last_weights = found
        return place

    def as_last_weights(self, made: Tensor, sample: Tensor) -> Tensor:
        """Return weights of the shape (batch or batch * groups, columns) as ``last_weights`` has them.

        Kernels write those of groups as they lie in memory.
        """
        batch, columns = sample.shape[0], made.shape[1]
        if self.dims is None:
            return made[None]
        groups = len(made) // max(batch, 1)
        if sample.is_contiguous() or groups < 2:
            return made.view(1, batch, groups, columns)
        sizes, places = sizes_of_groups(self.dims, sample)
        return made.view(1, batch, *sizes, columns).permute(0, 1, *[2 + place for place in places], 2 + len(sizes))

    def scratch_for(self, sample: Tensor) -> Tensor | None:
        """Return the memory that a GPU's kernel needs, which is 0 between two steps; ``None`` elsewhere.

        Where groups have weights of their own, it has room for the guided prediction, and holds nothing between steps.
        """
        if sample.device.type == "cpu" or sample.shape[0] == 0:
            return None
        batch, elements, groups = sample.shape[0], sample[0].numel(), number_of_groups(self.dims, sample)
        if groups > 1:
            return self._memory_of_groups(group_scratch_numbers(batch, elements), sample.device)
        key = sample.device, batch, elements
        scratch = self._scratch.get(key)
        if scratch is None:
            numbers = scratch_numbers(len(self.program.weights), batch, elements)
            with torch.inference_mode(False):
                scratch = self._scratch[key] = torch.zeros(numbers, dtype=torch.float64, device=sample.device)
        return scratch

    def _memory_of_groups(self, numbers: int, device: torch.device) -> Tensor:
        """Return at least so many numbers of 8 bytes, the same memory for smaller samples as for larger ones."""
        kept = self._of_groups.setdefault(device, [])
        if not kept or kept[-1].numel() < numbers:
            room = max(numbers, 2 * kept[-1].numel()) if kept else numbers
            with torch.inference_mode(False):
                kept.append(torch.empty(room, dtype=torch.float64, device=device))
        return kept[-1]


def _of_samples(parameter: float | Tensor, samples: slice) -> float | Tensor:
    if isinstance(parameter, Tensor) and parameter.shape[1] > 1:
        return parameter[:, samples]
    return parameter
