"""Stand for what a pipeline computes of its model's outputs, as long as that is linear in them.

A pipeline that is accelerated gets its model's outputs ``Traced``. Parts and other views of them are traced as well,
and sums, differences and multiples are ``Combined``: they know the coefficient of each output, and the operation that
the pipeline asked for. The scheduler's step takes the coefficients, and makes guidance and its own update in one pass;
any other operation computes the tensors, by the very operations that the pipeline asked for, and goes on with them.
"""

from __future__ import annotations

import itertools
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


_RUNS = itertools.count(1)
_new = object.__new__


class Fusion:
    """What the models and schedulers of one pipeline know of each other: whether guidance is fused, and how often."""

    __slots__ = (
        *("callers", "computed", "copies", "counts", "forms", "guidances", "known", "run", "steps", "tries"),
        *("used", "used_at"),
    )

    def __init__(self) -> None:
        self.callers: dict[int, CodeType] = {}
        """The code of the pipelines' methods, whose calls of the models are traced, by identity."""
        self.tries = False
        """Whether models' outputs are traced: from ``set_timesteps`` on to the last step. A run in which guidance is
        used before the step ends that."""
        self.run = 0
        """Which run this is among those of all pipelines: one that was left before its last step still ``tries``."""
        self.counts: Counter[str] = Counter()
        """Steps, by what was done."""
        self.computed: Counter[str] = Counter()
        """The operations that ended tracing: they needed the values of guidance before the step."""
        self.steps = 0
        """How many there have been, to tell outputs of an earlier one."""
        self.guidances: dict[Any, Any] = {}
        """What weights were made with, by what the pipeline computed: see weights_of_formula.py."""
        self.known: dict[Any, Any] = {}
        """The operations that were met, by what tells them: see known.py, as for the next three."""
        self.forms: dict[Any, int] = {}
        """Numbers of outputs' places in a step, layouts, dtypes and devices."""
        self.used: list[int] = []
        """The memory of the outputs that operations of a step have used, in the order in which they did first."""
        self.used_at = -1
        """Which step that was."""
        self.copies: list[weakref.ref[Traced]] = []
        """Of tensors that were added to outputs, where torch does not count who writes to them."""

    def begin(self) -> None:
        """Trace models' outputs from now on, before those pipelines that began earlier."""
        self.tries, self.run = True, next(_RUNS)

    def count_step(self, what: str, *, is_last: bool = False) -> None:
        """Count a step, by what was done; after the last one of a run, outputs are not traced."""
        self.counts[what] += 1
        self.steps += 1
        if is_last:
            self.tries = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        copied = Fusion()
        copied.callers = dict(self.callers)
        copied.counts, copied.computed = self.counts, self.computed  # of a scheduler that a pipeline copies for itself
        copied.tries, copied.run = self.tries, self.run
        return copied

    def __reduce__(self) -> Any:
        """Leave behind, in a pickle, whose code may be called: the pipeline there is not accelerated."""
        return Fusion, ()


class Source:
    """One output of a model: the tensor itself, and who else may know of it; or another tensor of the pipeline's."""

    __slots__ = (
        *("alone", "combined", "dtype", "escaped", "form", "fusion", "guides", "is_linear", "is_of_outputs"),
        *("is_output", "step", "tensor"),
    )

    def __init__(
        self, tensor: Tensor, fusion: Fusion | None, is_output: bool = True, is_of_outputs: bool = True
    ) -> None:
        self.tensor = tensor
        self.fusion = fusion
        """``None``: of a guider, which is asked anew each time."""
        self.dtype = dtype = tensor.dtype
        self.is_linear = dtype.is_floating_point and not tensor.requires_grad
        """Whether combinations of it may wait."""
        self.is_output = is_output
        self.is_of_outputs = is_of_outputs
        """Whether it is one, or a state that was made of those of earlier steps, such as momentum's."""
        self.alone = False
        """Whether it is one sample, without a dimension for the batch, as in a list of them."""
        self.guides = False
        """Whether it is made of guidance, which was computed ahead of the step."""
        self.escaped = not is_output
        """Whether others than traced tensors have it, or a view of it."""
        self.step = 0 if fusion is None else fusion.steps
        """How many steps there had been."""
        self.combined: list[weakref.ref[Any]] | None = None
        """What was combined of it, if it is not counted who writes to it."""
        self.form: Any = None
        """Its place among the outputs of the step, and its version when it was first used: see known.py."""

    def outputs(self) -> int:
        """Return how many models' outputs it counts as: guidance as two, and a state of outputs as one."""
        return self.is_of_outputs + self.guides

    @property
    def uncounted(self) -> bool:
        """Whether torch does not count who writes to it."""
        return self.tensor.is_inference()

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

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return (self.source.tensor if self.piece is not None else self.value()).ndim

    def computed(self, by: str = "") -> Tensor:
        """Return the tensor, for any use."""
        self.source.escape()
        return self.value()


def beside(tensor: Tensor, fusion: Fusion | None) -> Traced:
    """Return another tensor of a pipeline's, such as its latents, that is added to outputs."""
    return Traced(Source(tensor, fusion, is_output=False, is_of_outputs=False), tensor)


def copied_beside(tensor: Tensor, of: Source) -> Traced:
    """Return a copy of a tensor that is added to outputs, as torch does not count who writes to it.

    On the host, where nothing waits for a device, one that has the same values as an earlier copy is not copied again.
    """
    fusion, copies = of.fusion, []
    for reference in () if fusion is None else fusion.copies:
        copy = reference()
        if copy is not None and copy.source.step == of.step:
            copies.append(reference)
            own = copy.source.tensor
            if own.is_cpu and tensor.is_cpu and own.dtype == tensor.dtype and torch.equal(own, tensor):
                return copy
    with torch.inference_mode(False):  # so that torch counts who writes to it: nobody does
        made = beside(tensor.clone(), fusion)
    made.source.step = of.step
    if fusion is not None:
        fusion.copies = [*copies, weakref.ref(made)]
    return made


def state_of_outputs(tensor: Tensor, fusion: Fusion | None) -> Traced:
    """Return a tensor that a pipeline made of outputs of several steps."""
    return Traced(Source(tensor, fusion, is_output=False), tensor)


def traced(output: Tensor, fusion: Fusion | None) -> Traced:
    """Return a model's output as a pipeline gets it."""
    made = _new(Traced)  # for half the price of calling the class
    made.source, made._value, made.piece = Source(output, fusion), output, None
    return made


Term = tuple[Traced, float, float]
"""A traced tensor and its coefficient, ``constant + factor * scale`` with a scale that all terms share."""


class ScaleAsSeen(NamedTuple):
    """A tensor that multiplies combinations, as it was when it first did."""

    tensor: Tensor
    """A copy, if torch does not count who writes to it."""
    version: int

    @classmethod
    def of(cls, scale: Tensor) -> ScaleAsSeen:
        """Return a scale as it is now."""
        if scale.is_inference():
            scale = scale.clone()
            return cls(scale, 0)
        return cls(scale, scale._version)

    def is_same(self, other: ScaleAsSeen) -> bool:
        """Tell whether another one is the same tensor, with the same values; or the same number of a device's tensor.

        A pipeline asks for ``scheduler.sigmas[i]`` each time, which is a view of its own.
        """
        one, two = self.tensor, other.tensor
        if one is two or self.version != other.version:
            return self.version == other.version
        counted = not (one.is_inference() or two.is_inference())
        alike = one.dim() == two.dim() == 0 and one.dtype == two.dtype and one.device == two.device
        return counted and alike and one.data_ptr() == two.data_ptr() != 0

    def is_changed(self) -> bool:
        """Tell whether it has been written to since."""
        return not self.tensor.is_inference() and self.tensor._version != self.version


Seen = tuple[tuple[Source, int | None], ...]
"""Outputs, and how often each had been written to; ``None``: torch does not count that."""


def seen_by_both(left: Seen, right: Seen) -> Seen:
    """Return the outputs of both; of one that both have, the earlier version, as one of them may have lost it."""
    if left == right:
        return left
    merged = dict(left)
    for source, version in right:
        before = merged.get(source, version)
        merged[source] = before if version is None or before is None else min(before, version)
    return tuple(merged.items())


_UNCOUNTED = -1


class Waiting(LazyTensor):
    """What was made of models' outputs, and is computed when it is asked for."""

    __slots__ = ("_dtype", "base", "handed_out", "leaves", "made_by", "recipe", "seen", "source")

    def __init__(self, made_by: tuple[Any, ...], dtype: torch.dtype, seen: Seen, base: Any = None) -> None:
        self._value = None
        self.made_by = made_by
        """The function that computes it, and its arguments."""
        self._dtype = dtype
        self.seen = seen
        """The outputs, and how often each had been written to when it was first combined."""
        self.base = base
        """What it is a view of, of its own class; ``None``: it is none."""
        self.handed_out: int | None = None
        """How often its value had been written to when others got it; ``None``: nobody has."""
        self.recipe: Any = None
        """What tells the operation that made it, if it can be known again; then it has the next two: see known.py."""
        self.leaves: dict[Any, Traced]
        self.source: Source
        if seen[0][1] is None or (len(seen) > 1 and any([version is None for _, version in seen])):  # noqa: C419
            register(self, seen)

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor that it stands for."""
        return self._dtype

    def is_pending(self) -> bool:
        """Tell whether nobody has seen its values, or those that it is a view of."""
        return self._value is None and (self.base is None or self.base.is_pending())

    def check_unchanged(self) -> None:
        """Refuse outputs that are not what they were when they were combined.

        Raises:
            RuntimeError: one has been written to since.
        """
        for source, version in self.seen:
            check_version(source, version)

    def value(self) -> Tensor:
        """Return the tensor for one's own use, as it was before others could write to it."""
        if self.base is not None:
            return self._made()
        value = self._value
        if value is None or self.may_be_written():
            self.check_unchanged()
            made = self._made()
            if value is None:
                self._value = made
            return made
        return value

    def _made(self) -> Tensor:
        function, *operands = self.made_by
        made: Tensor = function(*[own_value(operand) for operand in operands])
        return made

    def may_be_written(self) -> bool:
        """Tell whether others may have written to its value since they got it, or to that of what it is a view of."""
        if self.base is not None:
            return True
        if self.handed_out is None:
            return False
        assert self._value is not None
        return self.handed_out == _UNCOUNTED or self._value._version != self.handed_out

    def _shared(self) -> Tensor:
        """Return the value that others get, the first time: a view shares its memory with what it is a view of."""
        if self.base is None:
            return self.value()
        function, _ = self.made_by
        shared: Tensor = function(self.base.computed())
        return shared

    def computed(self, by: str = "") -> Tensor:
        """Return the tensor, for any use, the same one each time; ``by``: the operation that asks."""
        if self.handed_out is None:
            stop_trying(self.seen, by)
            self._hand_out(self._shared())
        assert self._value is not None
        return self._value

    def _hand_out(self, value: Tensor) -> None:
        """Note the value that others get, and how often it has been written to by now."""
        self._value = value
        self.handed_out = _UNCOUNTED if value.is_inference() else value._version


class Combined(Waiting):
    """A linear combination of models' outputs."""

    __slots__ = ("scale", "terms")

    def __init__(
        self,
        made_by: tuple[Any, ...],
        terms: tuple[Term, ...],
        scale: ScaleAsSeen | None,
        dtype: torch.dtype,
        seen: Seen,
        base: Combined | None = None,
    ) -> None:
        super().__init__(made_by, dtype, seen, base)
        self.terms = terms
        self.scale = scale
        """What factors multiply: one number, or one for each sample."""

    def like(self) -> Tensor:
        """Return a tensor of the same shape and device."""
        return self.terms[0][0].value()

    def check_unchanged(self) -> None:
        """Refuse outputs and scales that are not what they were when they were combined.

        Raises:
            RuntimeError: one has been written to since.
        """
        super().check_unchanged()
        if self.scale is not None and self.scale.is_changed():
            raise RuntimeError(f"the scale of guidance {WRITTEN_TO}")


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


def stop_trying(seen: Iterable[tuple[Source, int | None]], by: str) -> None:
    """Trace no more outputs in this run of the pipeline: an operation uses guidance before the step."""
    for source, _ in seen:
        fusion = source.fusion
        if fusion is not None and fusion.tries:
            fusion.tries = False
            fusion.computed[by] += 1


def leading(scale: Tensor) -> int:
    """Return how many dimensions of a scale have a number for each element: 1 for samples, 2 for their frames."""
    sizes = [size != 1 for size in scale.shape]
    return max(1, len(sizes) - sizes[::-1].index(True)) if any(sizes) else min(1, len(sizes))


def own_value(operand: Any) -> Any:
    """Return the tensor that an operand stands for, for one's own use, which does not write to it."""
    return operand.value() if isinstance(operand, (Traced, Waiting)) else plain(operand)
