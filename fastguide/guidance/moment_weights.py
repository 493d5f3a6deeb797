"""Make the weights of each sample's predictions from their moments, by a program that a function was traced to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .encoded import encode
from .moments import moments_of
from .program import Program, traced
from .scales import scale_columns
from .symbols import Vector


class MomentWeights:
    """Weights that a program makes of moments and parameters.

    Args:
        program: makes them.
        parameters: by name, each a number or of shape (steps or 1, batch or 1), on any device.

    Raises:
        ValueError: the program is too large for the kernels, or has too many predictions.
    """

    def __init__(self, program: Program, parameters: Mapping[str, float | Tensor]) -> None:
        self.program, self._names = program, tuple(parameters)
        encoded = encode(program, self._names)
        self._words = torch.tensor([encoded.words], dtype=torch.int32, device="cpu")
        self._parameters = scale_columns(*parameters.values(), *encoded.constants).double()
        self._on_devices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._made: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = {}
        """Where steps write their weights, and that as ``last_weights`` has it."""
        self.last_weights: Tensor | None = None
        """What was made last, as the step read it: the sum of all weights, those of all predictions but the first, and
        a classifier's scale, on the device; shape (steps or 1, batch, columns)."""

    @classmethod
    def of(
        cls,
        function: Callable[..., Vector],
        count: int,
        parameters: Mapping[str, float | Tensor],
        options: Mapping[str, Any] | None = None,
    ) -> MomentWeights:
        """Return the weights that a function makes; see ``traced``."""
        return cls(traced(function, count, tuple(parameters), options or {}), parameters)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the program as kernels read it, int32 of shape (1, words), and its parameters and constants.

        These are float64, of shape (steps or 1, batch or 1, numbers).
        """
        found = self._on_devices.get(device)
        if found is None:
            found = self._on_devices[device] = self._words.to(device), self._parameters.to(device).contiguous()
        return found

    def place_for(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        """Return where a step writes the weights that it makes, and ``last_weights`` finds them: (batch, columns)."""
        key = sample.device, dtype, sample.shape[0]
        found = self._made.get(key)
        if found is None:
            columns = len(self.program.weights) + 1
            place = torch.empty(sample.shape[0], columns, dtype=dtype, device=sample.device)
            found = self._made[key] = place, place[None]
        place, self.last_weights = found
        return place

    def anchored(self, predictions: Sequence[Tensor], parameters: Tensor | None = None) -> Tensor:
        """Return the sum of all weights, and those of all predictions but the first, by torch's own operations.

        They are float64, of shape (steps or 1, batch, predictions).

        Args:
            predictions: one for each weight.
            parameters: those of a step, as ``on`` returns them; ``None``: all of them.
        """
        batch, device = predictions[0].shape[0], predictions[0].device
        if parameters is None:
            _, parameters = self.on(device)
        named = dict(zip(self._names, parameters.unbind(-1), strict=False))
        weights = self.program.run(moments_of(predictions, self.program.inputs) | named)
        like = torch.zeros(1, batch, dtype=torch.float64, device=device)
        return torch.stack(torch.broadcast_tensors(*[like + weight for weight in weights]), -1)
