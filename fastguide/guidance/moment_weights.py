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
        count: number of predictions.
        parameters: by name, each a number or of shape (steps or 1, batch or 1).
    """

    def __init__(self, program: Program, count: int, parameters: Mapping[str, float | Tensor]) -> None:
        self.program, self.count = program, count
        self._parameters = {torch.device("cpu"): _on(torch.device("cpu"), parameters)}
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
        return cls(traced(function, count, tuple(parameters), options or {}), count, parameters)

    def __call__(self, predictions: Sequence[Tensor]) -> Tensor:
        """Return the weights of the predictions, shape (steps or 1, batch, predictions)."""
        anchored = self.anchored(predictions)
        return torch.cat([2 * anchored[..., :1] - anchored.sum(-1, keepdim=True), anchored[..., 1:]], -1)

    def anchored(self, predictions: Sequence[Tensor]) -> Tensor:
        """Return the sum of all weights, and those of all predictions but the first.

        They are float64, of shape (steps or 1, batch, predictions).
        """
        batch, device = predictions[0].shape[0], predictions[0].device
        parameters = self._parameters.get(device)
        if parameters is None:
            on_host = self._parameters[torch.device("cpu")]
            parameters = self._parameters[device] = _on(device, on_host)
        inputs = moments_of(predictions, self.program.inputs) | parameters
        like = torch.zeros(1, batch, dtype=torch.float64, device=device)
        columns = [like + weight for weight in self.program.run(inputs)]
        return torch.stack(torch.broadcast_tensors(*columns), -1)


def _on(device: torch.device, parameters: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(value, dtype=torch.float64, device=device).reshape(1, 1)
        if not isinstance(value, Tensor)
        else value.to(device, torch.float64)
        for name, value in parameters.items()
    }
