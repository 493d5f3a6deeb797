"""What the two passes of a recorded step share, and what autograd keeps between them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..guidance import Guidance
from .backends.registry import Backend
from .memory import empty_strided
from .operator import StepArguments

ELEMENTWISE = ("sample", "gradient", "variance", "noise", "anchor")
INPUTS = (*ELEMENTWISE, "history", "known", "known_noise", "weights", "parameters")
"""The fields that get gradients, beside the predictions."""
KEPT = ("sample", "rows", "weights", "indices", "gradient", "variance", "noise", "seeds", "mask", "parameters", "made")
"""The fields that a backward pass may read, beside the predictions."""


class Plan:
    """What the two passes of a step share beside the tensors that autograd keeps; it keeps none itself."""

    def __init__(
        self, chosen: Backend, a: StepArguments, clips: bool, writes_history: bool, guidance: Guidance | None
    ) -> None:
        self.arguments: StepArguments | None = a
        """Until the step is made."""
        self.chosen, self.clips, self.writes_history = chosen, clips, writes_history
        self.made_by = None if guidance is None else guidance.weights_from
        """Of a step with a program."""
        self.batch, self.shape, self.device = len(a.sample), a.sample.shape, a.sample.device
        self.strides = (a.sample.numel() // max(self.batch, 1), *a.sample.stride()[1:])
        self.weights = a.weights.shape[-1] - 1
        self.stacked = len(a.predictions) == 1 and self.weights > 1
        self.predictions = self.weights if self.stacked else len(a.predictions)
        self.slots = 0 if a.history is None else len(a.history) // max(self.batch, 1)
        self.index = a.index
        self.dtypes = {name: tensor.dtype for name in INPUTS if isinstance(tensor := getattr(a, name), Tensor)}
        self.of_predictions = [prediction.dtype for prediction in a.predictions]

    def new(self, dtype: torch.dtype, copies: int = 1, samples: int | None = None) -> Tensor:
        """Return a tensor in the layout that all have, for the batch or so many samples, once or several times."""
        count = copies * (self.batch if samples is None else samples)
        return empty_strided((count, *self.shape[1:]), self.strides, dtype, self.device)

    def keeps_bits(self, a: StepArguments, needs: dict[str, bool]) -> bool:
        """Tell whether the step writes where it clips; or it clips nothing, or keeps inputs instead."""
        weighs = needs["weights"] or a.program is not None
        return self.clips and not weighs and self.chosen.clipped is not None and self.device.type == "cpu"

    def kept(self, a: StepArguments, needs: dict[str, bool]) -> StepArguments:
        """Return a step's arguments without those that the backward pass does not read.

        Args:
            a: the step's.
            needs: which of ``INPUTS`` get gradients.
        """
        weighs, of_variance = needs["weights"] or a.program is not None, needs["variance"]
        reads = weighs or (self.clips and not self.keeps_bits(a, needs))
        varies = of_variance or needs["gradient"] or needs["noise"] or needs["weights"]
        return a._replace(
            sample=a.sample if reads else None,  # type: ignore[arg-type]
            predictions=a.predictions if reads else [],
            gradient=a.gradient if reads or of_variance else None,
            variance=a.variance if varies else None,
            noise=a.noise if of_variance else None,
            seeds=a.seeds if of_variance else None,
        )

    def placed(self, grad: Tensor | None) -> Tensor | None:
        """Return a gradient in that layout, and with its own sign."""
        grad = None if grad is None else grad.resolve_neg()
        if grad is None or (grad.stride()[1:] == self.strides[1:] and grad.stride(0) >= self.strides[0]):
            return grad
        return self.new(grad.dtype, len(grad) // max(self.batch, 1)).copy_(grad)
