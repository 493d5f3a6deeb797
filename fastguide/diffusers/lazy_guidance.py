"""Leave a pipeline's guidance to the scheduler's step, which makes both in one pass.

A pipeline that is accelerated gets its model's output ``Traced``, with halves that are ``Prediction``s, or one of two
calls for the two conditions. The three operations of classifier-free guidance, ``uncond + guidance_scale * (cond -
uncond)``, make a ``Guided`` of them, which the step takes apart. Any other operation computes the tensor that they
stand for, and goes on with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from numbers import Real
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from .lazy_tensor import LazyTensor, plain

Scale = float | Tensor
Output = Tensor | tuple[Tensor, Tensor]
"""A model's output: one tensor, or the unconditional and the conditional prediction."""


class Fusion:
    """What the models and schedulers of one pipeline know of each other: whether guidance is fused, and how often."""

    __slots__ = ("callers", "counts", "tries")

    def __init__(self) -> None:
        self.callers: dict[int, CodeType] = {}
        """The code of the pipelines' methods, whose calls of the models are traced, by identity."""
        self.tries = True
        """Whether models' outputs are traced. A run in which guidance is used before the step ends that, until the next
        run: rescaled guidance, for example, is computed by the pipeline at every step."""
        self.counts: Counter[str] = Counter()
        """Steps, by what was done."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        copied = Fusion()
        copied.callers = dict(self.callers)
        return copied


class TracedPair:
    """The outputs of two calls of a model, or what a guider gets: the unconditional and the conditional prediction."""

    __slots__ = ("_fusion", "output")

    def __init__(self, uncond: Tensor, cond: Tensor, fusion: Fusion | None = None) -> None:
        self.output = uncond, cond
        self._fusion = fusion

    def prediction(self, half: int) -> Tensor:
        """Return the unconditional (0) or the conditional (1) prediction."""
        return self.output[half]

    def version(self) -> tuple[int, int]:
        """Return how often the predictions were written to."""
        return self.output[0]._version, self.output[1]._version

    def fits(self, sample: Tensor) -> bool:
        """Tell whether each prediction has the sample's shape."""
        return self.output[0].shape == self.output[1].shape == sample.shape

    def is_used(self) -> None:
        """Note that guidance is used before the step; a guider is asked anew each time."""
        if self._fusion is not None:
            self._fusion.tries = False


class Traced(LazyTensor):
    """A model's output: the tensor itself, which is one prediction, or ``[uncond, cond]``, whose halves are two."""

    __slots__ = ("_fusion", "output")

    def __init__(self, output: Tensor, fusion: Fusion) -> None:
        self._value = self.output = output
        self._fusion = fusion

    def like(self) -> Tensor:
        """Return the output itself."""
        return self.output

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        """Return the halves as predictions, and any other parts as they are."""
        output = self.output
        if chunks != 2 or dim != 0 or output.dim() == 0 or output.shape[0] % 2:
            return output.chunk(chunks, dim)
        if output.requires_grad or output.is_inference():  # torch does not count who writes to an inference tensor
            return output.chunk(2)
        return Prediction(self, 0), Prediction(self, 1)

    def __sub__(self, other: Any) -> Any:
        if type(other) is Traced and other._fusion is self._fusion and other.output.shape == self.output.shape:
            tensors = other.output, self.output
            if not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors):
                pair = TracedPair(*tensors, self._fusion)
                return Guided(pair, None, False, pair.version())
        return self.output - plain(other)

    def __add__(self, other: Any) -> Any:
        if type(other) is Guided and type(other.source) is TracedPair and not other.complete and other._value is None:
            scale = 1.0 if other.scale is None else other.scale
            uncond, cond = other.source.output
            if self.output is uncond or self.output is cond:  # added to the conditional one, it has one more
                return Guided(other.source, scale if self.output is uncond else scale + 1, True, other.version)
        return self.output + plain(other)

    def prediction(self, half: int) -> Tensor:
        """Return the unconditional (0) or the conditional (1) prediction."""
        batch = self.output.shape[0] // 2
        return self.output.narrow(0, half * batch, batch)

    def version(self) -> int:
        """Return how often the predictions were written to."""
        return self.output._version

    def fits(self, sample: Tensor) -> bool:
        """Tell whether each prediction has the sample's shape."""
        batch, *shape = self.output.shape
        return [batch // 2, *shape] == list(sample.shape)

    def is_used(self) -> None:
        """Note that guidance is used before the step."""
        self._fusion.tries = False


class Prediction(LazyTensor):
    """The unconditional (0) or the conditional (1) prediction of a model's output."""

    __slots__ = ("half", "source")

    def __init__(self, source: Traced | TracedPair, half: int) -> None:
        self._value, self.source, self.half = None, source, half

    def like(self) -> Tensor:
        """Return the prediction itself, which is a view."""
        return self.computed()

    def _compute(self) -> Tensor:
        return self.source.prediction(self.half)

    def __sub__(self, other: Any) -> Any:
        source = self.source
        if type(other) is Prediction and other.source is source and self.half > other.half:
            return Guided(source, None, False, source.version())
        return self.computed() - other

    def __add__(self, other: Any) -> Any:
        if type(other) is Guided and other.source is self.source and not other.complete and other._value is None:
            scale = 1.0 if other.scale is None else other.scale
            # added to the conditional one, in the paper's own form, it has one more
            return Guided(self.source, scale + 1 if self.half else scale, True, other.version)
        return self.computed() + other


class Guided(LazyTensor):
    """``scale * (cond - uncond)``, or, if ``complete``, that and ``uncond``; without a scale, until it is multiplied.

    ``version``: of the predictions, when their difference was taken.
    """

    __slots__ = ("complete", "scale", "source", "version")

    def __init__(
        self, source: Traced | TracedPair, scale: Scale | None, complete: bool, version: int | tuple[int, int]
    ) -> None:
        self._value = None
        self.source = source
        self.scale = scale
        self.complete = complete
        self.version = version

    def like(self) -> Tensor:
        """Return the unconditional prediction."""
        return self.source.prediction(0)

    def is_whole(self) -> bool:
        """Tell whether it is guidance as a step makes it, and nobody has seen its values."""
        return self.complete and self._value is None

    def check_unchanged(self) -> None:
        """Refuse predictions that are not what they were when their difference was taken.

        Raises:
            RuntimeError: one has been written to since.
        """
        if self.source.version() != self.version:
            raise RuntimeError(
                "the model's output was written to after guidance had been taken from it: expected plain tensors for "
                "that, as without fastguide.diffusers.accelerate() or a guider of fastguide's"
            )

    def _compute(self) -> Tensor:
        self.check_unchanged()
        self.source.is_used()
        uncond, cond = self.source.prediction(0), self.source.prediction(1)
        value = cond - uncond if self.scale is None else self.scale * (cond - uncond)
        return uncond + value if self.complete else value

    def __mul__(self, other: Any) -> Any:
        if self._value is None and self.scale is None and not self.complete:
            scale = other if type(other) is float else self._scale_of(other)
            if scale is not None:
                return Guided(self.source, scale, False, self.version)
        return self.computed() * other

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        if type(other) in (Prediction, Traced):
            return other + self
        return self.computed() + other

    def _scale_of(self, scale: Any) -> Scale | None:
        """Return what a difference may be multiplied by later: a number, or one number a sample in its own dtype."""
        if type(scale) is Tensor:
            uncond = self.like()
            one_a_sample = (uncond.shape[0], *[1] * (uncond.dim() - 1))
            fits = not scale.requires_grad and (scale.dim() == 0 or tuple(scale.shape) == one_a_sample)
            fits = fits and scale.device == uncond.device and torch.result_type(scale, uncond) == uncond.dtype
            return scale if fits else None
        return float(scale) if isinstance(scale, Real) and not isinstance(scale, bool) else None


def _names(*names: str) -> list[Any]:
    return [getattr(where, name) for name in names for where in (torch, Tensor) if hasattr(where, name)]


def _operation(kinds: tuple[type, ...], name: str, reflected: str) -> Callable[[Any, Any], Any]:
    """Return a function of two tensors, at least one of which is lazy, that asks the one of these kinds first."""

    def operation(first: Any, second: Any) -> Any:
        if type(first) in kinds:
            return getattr(first, name)(second)
        if type(second) in kinds:
            return getattr(second, reflected)(first)
        return getattr(plain(first), name)(plain(second))

    return operation


LazyTensor.rules |= {
    **dict.fromkeys(_names("chunk"), lambda output, *how: output.chunk(*how)),
    **dict.fromkeys(_names("sub", "__sub__", "subtract"), _operation((Prediction, Traced), "__sub__", "__rsub__")),
    **dict.fromkeys(_names("mul", "__mul__", "__rmul__", "multiply"), _operation((Guided,), "__mul__", "__mul__")),
    **dict.fromkeys(
        _names("add", "__add__", "__radd__"), _operation((Prediction, Guided, Traced), "__add__", "__add__")
    ),
}


def resolved(output: Any, sample: Tensor, guidance_scale: Any) -> tuple[Output, Any]:
    """Return a step's model output and guidance scale; guidance that was left to the step is taken apart into both.

    Raises:
        TypeError: the output or the sample is no tensor.
        RuntimeError: the output was written to after guidance had been taken from it.
    """
    if type(output) is Tensor and isinstance(sample, Tensor):
        return output, guidance_scale
    sample = plain(sample)
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
    if type(output) is Guided and guidance_scale is None and output.is_whole() and output.source.fits(sample):
        output.check_unchanged()
        scale = output.scale
        return output.source.output, scale.reshape(-1) if isinstance(scale, Tensor) else scale
    output = plain(output)
    if not isinstance(output, Tensor):
        hint = "; its .sample is one" if isinstance(getattr(output, "sample", None), Tensor) else ""
        hint = "; its [0] is one" if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else hint
        raise TypeError(f"model_output: expected a tensor, got {type(output).__name__}{hint}")
    return output, guidance_scale
