"""Stand for what a pipeline computes of its model's outputs, as long as that is linear in them.

A pipeline that is accelerated gets its model's outputs ``Traced``. Parts and other views of them are traced as well,
and sums, differences and multiples are ``Combined``: they know the coefficient of each output, and the operation that
the pipeline asked for. The scheduler's step takes the coefficients, and makes guidance and its own update in one pass;
any other operation computes the tensors, by the very operations that the pipeline asked for, and goes on with them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lazy_tensor import LazyTensor, plain

Scale = float | Tensor
EXACT = 1e-12
"""How far coefficients may be from what they are but for rounding."""
LARGEST = 1e30
"""A number above this, or NaN, is no coefficient that the kernels' float32 could do with."""


class Fusion:
    """What the models and schedulers of one pipeline know of each other: whether guidance is fused, and how often."""

    __slots__ = ("callers", "counts", "tries")

    def __init__(self) -> None:
        self.callers: dict[int, CodeType] = {}
        """The code of the pipelines' methods, whose calls of the models are traced, by identity."""
        self.tries = False
        """Whether models' outputs are traced: from ``set_timesteps`` on to the last step. A run in which guidance is
        used before the step ends that: rescaled guidance, for example, is computed by the pipeline at every step."""
        self.counts: Counter[str] = Counter()
        """Steps, by what was done."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        copied = Fusion()
        copied.callers = dict(self.callers)
        copied.counts = self.counts  # of a scheduler that a pipeline copies for itself
        copied.tries = self.tries
        return copied

    def __reduce__(self) -> Any:
        """Leave behind, in a pickle, whose code may be called: the pipeline there is not accelerated."""
        return Fusion, ()


class Source:
    """One output of a model, or another tensor that goes into a sum: itself, and who else may know of it."""

    __slots__ = ("combined", "dtype", "escaped", "fusion", "is_linear", "is_output", "tensor", "uncounted")

    def __init__(self, tensor: Tensor, fusion: Fusion | None, is_output: bool = True) -> None:
        self.tensor = tensor
        self.is_output = is_output
        """Whether a model has returned it."""
        self.fusion = fusion
        """``None``: of a guider, which is asked anew each time."""
        self.dtype = tensor.dtype
        self.is_linear = tensor.is_floating_point() and not tensor.requires_grad
        """Whether combinations of it may wait."""
        self.uncounted = tensor.is_inference()
        """Whether torch does not count who writes to it."""
        self.escaped = False
        """Whether others than traced tensors have it, or a view of it."""
        self.combined: list[weakref.ref[Any]] | None = None
        """What was combined of it, if it is not counted who writes to it."""

    def version(self) -> int | None:
        """Return how often the output was written to; ``None``: torch does not count that."""
        return None if self.uncounted else self.tensor._version

    def may_wait(self) -> bool:
        """Tell whether combinations of it may wait: nobody can write to it unseen."""
        return self.is_linear and not (self.escaped and self.uncounted)

    def escape(self) -> None:
        """Note that others get it: in inference mode, what was combined of it is computed before they can write."""
        self.escaped = True
        pending, self.combined = self.combined, None
        for reference in pending or ():
            node = reference()
            if node is not None:
                node.value()


class Traced(LazyTensor):
    """A model's output, or a view of it."""

    __slots__ = ("piece", "source")

    def __init__(self, source: Source, value: Tensor | None, piece: tuple[int, int] | None = None) -> None:
        self.source = source
        self._value = value
        self.piece = piece
        """Which part of how many that the output has along its batch."""

    @property
    def dtype(self) -> torch.dtype:
        """The output's."""
        return self.source.dtype

    def value(self) -> Tensor:
        """Return the tensor for one's own use, which is not to write to it."""
        value = self._value
        if value is None:
            assert self.piece is not None
            number, parts = self.piece
            size = self.source.tensor.shape[0] // parts
            value = self._value = self.source.tensor.narrow(0, number * size, size)
        return value

    like = value

    def computed(self) -> Tensor:
        """Return the tensor, for any use."""
        self.source.escape()
        return self.value()


def traced(output: Tensor, fusion: Fusion | None) -> Traced:
    """Return a model's output as a pipeline gets it."""
    return Traced(Source(output, fusion), output)


def beside(tensor: Any, output: Traced, dtype: torch.dtype) -> Traced | None:
    """Return a tensor of the pipeline's own, mostly its latents, as one that is added to outputs like another one.

    ``None``: it is no such tensor, or outputs have been used before the step in this run. Where torch does not count
    who writes to it, it is copied.

    Args:
        tensor: anything that is added.
        output: one of those that it is added to.
        dtype: of their sum.
    """
    fusion, like = output.source.fusion, output.value()
    if type(tensor) is not Tensor or fusion is None or not fusion.tries:
        return None
    if tensor.dtype != dtype or tensor.requires_grad:
        return None
    if tensor.shape != like.shape or tensor.device != like.device or tensor.dim() == 0:
        return None
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return Traced(Source(tensor, fusion, is_output=False), tensor)


Term = tuple[Traced, float, float]
"""A traced tensor and its coefficient, ``constant + factor * scale`` with a scale that all terms share."""


class ScaleAsSeen(NamedTuple):
    """A tensor that multiplies or divides combinations, as it was when it first did."""

    tensor: Tensor
    """A copy, if torch does not count who writes to it."""
    version: int
    divides: bool = False

    @classmethod
    def of(cls, scale: Tensor, divides: bool = False) -> ScaleAsSeen:
        """Return a scale as it is now."""
        if scale.is_inference():
            scale = scale.clone()
            return cls(scale, 0, divides)
        return cls(scale, scale._version, divides)

    def is_same(self, other: ScaleAsSeen) -> bool:
        """Tell whether another one is the same tensor, with the same values."""
        return self.divides == other.divides and self.has_same_values(other)

    def has_same_values(self, other: ScaleAsSeen) -> bool:
        """Tell whether the tensors are one, or the same number of another."""
        one, two = self.tensor, other.tensor
        if one is two or one.dim() or two.dim() or one.dtype != two.dtype or one.device != two.device:
            return one is two and self.version == other.version
        if one.is_cpu:
            return one.item() == two.item()
        counted = not (one.is_inference() or two.is_inference()) and self.version == other.version
        return counted and one.data_ptr() == two.data_ptr() != 0

    def is_changed(self) -> bool:
        """Tell whether it has been written to since."""
        return not self.tensor.is_inference() and self.tensor._version != self.version

    def factor(self) -> Tensor:
        """Return what multiplies."""
        return self.tensor.reciprocal() if self.divides else self.tensor


_UNCOUNTED = -1


class Combined(LazyTensor):
    """A linear combination of models' outputs, which is computed when it is asked for."""

    __slots__ = ("_dtype", "base", "handed_out", "made_by", "scale", "seen", "terms")

    def __init__(
        self,
        made_by: tuple[Any, ...],
        terms: tuple[Term, ...],
        scale: ScaleAsSeen | None,
        dtype: torch.dtype,
        seen: tuple[tuple[Source, int | None], ...],
        base: Combined | None = None,
    ) -> None:
        self._value = None
        self.made_by = made_by
        """The function that computes it, and its arguments."""
        self.terms = terms
        self.scale = scale
        """What factors multiply: one number, or one for each sample."""
        self._dtype = dtype
        self.seen = seen
        """The outputs, and how often each had been written to when it was first combined."""
        self.base = base
        """What it is a view of."""
        self.handed_out: int | None = None
        """How often its value had been written to when others got it; ``None``: nobody has."""
        if seen[0][1] is None or (len(seen) > 1 and any([version is None for _, version in seen])):  # noqa: C419
            register(self, seen)

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor that it stands for."""
        return self._dtype

    def like(self) -> Tensor:
        """Return a tensor of the same shape and device."""
        return self.terms[0][0].value()

    def is_pending(self) -> bool:
        """Tell whether nobody has seen its values, or those that it is a view of."""
        return self._value is None and (self.base is None or self.base.is_pending())

    def check_unchanged(self) -> None:
        """Refuse outputs and scales that are not what they were when they were combined.

        Raises:
            RuntimeError: one has been written to since.
        """
        for source, version in self.seen:
            check_version(source, version)
        if self.scale is not None and self.scale.is_changed():
            raise RuntimeError(f"the scale of guidance {WRITTEN_TO}")

    def value(self) -> Tensor:
        """Return the tensor for one's own use, as it was before others could write to it."""
        value = self._value
        if self.base is not None or value is None or self._may_be_written():
            function, *operands = self.made_by
            if self.base is None:
                self.check_unchanged()
            made: Tensor = function(*[own_value(operand) for operand in operands])
            if self.base is None and value is None:
                self._value = made
            return made
        return value

    def _may_be_written(self) -> bool:
        if self.handed_out is None:
            return False
        assert self._value is not None
        return self.handed_out == _UNCOUNTED or self._value._version != self.handed_out

    def computed(self) -> Tensor:
        """Return the tensor, for any use, the same one each time."""
        if self.handed_out is None:
            stop_trying(self.seen)
            if self.base is None:
                self._value = self.value()
            else:
                function, _ = self.made_by
                self._value = function(self.base.computed())
            self.handed_out = _UNCOUNTED if self._value.is_inference() else self._value._version
        assert self._value is not None
        return self._value


WRITTEN_TO = (
    "was written to after guidance had been taken from it: expected plain tensors for that, as without "
    "fastguide.diffusers.accelerate() or a guider of fastguide's"
)


def check_version(source: Source, version: int | None) -> None:
    """Refuse an output that has been written to since.

    Raises:
        RuntimeError: it has.
    """
    if source.version() != version:
        what = "the model's output" if source.is_output else "a tensor that was added to the model's output"
        raise RuntimeError(f"{what} {WRITTEN_TO}")


def register(made: LazyTensor, seen: Iterable[tuple[Source, int | None]]) -> None:
    """Let what was made of outputs be computed before others can write to those, where torch does not count that."""
    for source, version in seen:
        if version is None:
            source.combined = [*(source.combined or ()), weakref.ref(made)]


def stop_trying(seen: Iterable[tuple[Source, int | None]]) -> None:
    """Trace no more outputs in this run of the pipeline: guidance is used before the step."""
    for source, _ in seen:
        if source.fusion is not None:
            source.fusion.tries = False


def leading(scale: Tensor) -> int:
    """Return how many dimensions of a scale have a number for each element: 1 for samples, 2 for their frames."""
    sizes = [size != 1 for size in scale.shape]
    return max(1, len(sizes) - sizes[::-1].index(True)) if any(sizes) else min(1, len(sizes))


def own_value(operand: Any) -> Any:
    """Return the tensor that an operand stands for, for one's own use, which does not write to it."""
    return operand.value() if type(operand) in (Traced, Combined) else plain(operand)
