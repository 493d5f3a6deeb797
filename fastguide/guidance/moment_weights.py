"""Make the weights of each sample's predictions from their moments, by a program that a function was traced to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .moments import moments_of
from .program import Program, traced
from .symbols import Vector


class MomentWeights:
    """Weights that a program makes of moments and parameters.

    Args:
        program: makes them.
        parameters: by name, each a number or of shape (steps or 1, batch or 1), on any device.
    """

    def __init__(self, program: Program, parameters: Mapping[str, float | Tensor]) -> None:
        self.program = program
        self._parameters = dict(parameters)
        self._on_devices: dict[torch.device, dict[str, Tensor]] = {}
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

    def anchored(self, predictions: Sequence[Tensor]) -> Tensor:
        """Return the sum of all weights, and those of all predictions but the first.

        They are float64, of shape (steps or 1, batch, predictions).
        """
        batch, device = predictions[0].shape[0], predictions[0].device
        parameters = self._on_devices.get(device)
        if parameters is None:
            parameters = self._on_devices[device] = _on(device, self._parameters)
        inputs = moments_of(predictions, self.program.inputs) | parameters
        like = torch.zeros(1, batch, dtype=torch.float64, device=device)
        columns = [like + weight for weight in self.program.run(inputs)]
        return torch.stack(torch.broadcast_tensors(*columns), -1)


def _on(device: torch.device, parameters: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """Return parameters on a device, in float64."""
    return {name: torch.as_tensor(value, dtype=torch.float64, device=device) for name, value in parameters.items()}
