"""A loop's step at a cursor: with the same buffers each time, by the operator or, once that is known, repeated."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .attached import is_watched
from .backends.registry import BACKENDS, StepFunction
from .call import Call
from .cursor import Cursor
from .inpainting import Inpainting
from .operator import StepArguments
from .repeat import Kinds, describe, repeat
from .thresholds import with_thresholds

_MOST_TRIES = 8
"""Steps that are described: more come of a model whose outputs are laid out anew each time."""
_ROWS = b""
"""A cursor's kinds are for every row."""


class CursorStep:
    """Make the step at a cursor.

    Args:
        step: a backend's.
        arguments: of the operator, with what is the same at every step.
        cursor: whose memory is in the arguments.
    """

    def __init__(self, step: StepFunction, arguments: StepArguments, cursor: Cursor) -> None:
        self._step, self._arguments, self._cursor = step, arguments, cursor
        a = arguments
        self._inpainting = None if a.mask is None else Inpainting._make((a.mask, a.known, a.known_noise))
        backend = next((each for each in BACKENDS.values() if each.step is step), None)
        self._found_before = None if backend is None or a.inverse_thresholds is None else backend
        can_repeat = backend is not None and backend.repeats and a.philox is None
        self._backend = backend if can_repeat else None
        self._made = 0
        """Steps that the operator has made."""
        self._kinds: Kinds = (_ROWS,)

    def __call__(
        self, predictions: list[Tensor], gradient: Tensor | None, variance: Tensor | None, weights: Tensor | None
    ) -> None:
        """Make a step with these, checked already; ``weights``: ``None`` for those of the arguments."""
        if weights is None:
            weights = self._arguments.weights
        can_repeat = self._backend is not None and not is_dynamo_compiling()
        if can_repeat and len(self._kinds) > 1:
            call = self._call(predictions, weights, gradient, variance)
            if repeat(self._kinds, *call) is not None:
                return
        arguments = self.arguments(predictions, gradient, variance)._replace(weights=weights)
        self.once(arguments)
        self._made += 1
        if can_repeat and 1 < self._made <= _MOST_TRIES and not is_watched():
            assert self._backend is not None
            call = Call(*self._call(predictions, weights, gradient, variance))
            kind = describe(_ROWS, call, arguments, self._backend)
            if kind is not None:
                self._kinds = (*self._kinds, kind)

    def arguments(self, predictions: list[Tensor], gradient: Tensor | None, variance: Tensor | None) -> StepArguments:
        """Return the operator's arguments for a step with these."""
        return self._arguments._replace(predictions=predictions, gradient=gradient, variance=variance)

    def once(self, arguments: StepArguments) -> None:
        """Make a step by the operator, as with weights that will not come again."""
        if self._found_before is not None:
            arguments = with_thresholds(self._found_before, arguments)
        self._step(*arguments)

    def _call(self, predictions: Any, weights: Tensor, gradient: Tensor | None, variance: Tensor | None) -> Any:
        a = self._arguments
        return (
            self._cursor, a.sample, predictions, weights, gradient, variance, a.noise, None, a.seeds, self._inpainting,
            a.history, a.anchor, a.original, a.out, a.staged, None,
        )  # fmt: skip
