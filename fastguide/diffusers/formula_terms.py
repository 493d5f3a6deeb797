"""Find the tensors that the sums of a formula are of, and how much of each is in which."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..guidance.encoded import MOST_TERMS
from .formula import lies_in_order
from .traced import EXACT, Combined, ScaleAsSeen, Source, Traced

Weights = dict[Any, tuple[float, float]]
"""The constant and the factor of a scale that each term of a sum has, by the term's key."""


class Terms:
    """The terms of outputs, and of sums of outputs: outputs first, in the order of a batch's parts, then other tensors.

    Args:
        leaves: the outputs and sums, ``Traced`` or ``Combined``.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.weights: list[Weights] = []
        """Of each leaf."""
        found: dict[Any, Traced] = {}
        keys: dict[int, Any] = {}
        scales: list[ScaleAsSeen] = []
        of_pieces = _are_of_pieces(leaves)
        for leaf in leaves:
            weights: Weights = {}
            for of, constant, factor in ((leaf, 1.0, 0.0),) if type(leaf) is Traced else leaf.terms:
                key = keys.get(id(of))
                if key is None:
                    key = keys[id(of)] = (id(of.source), of.piece) if of_pieces else _key(of)
                    found.setdefault(key, of)
                before = weights.get(key)
                weights[key] = (constant, factor) if before is None else (before[0] + constant, before[1] + factor)
            self.weights.append(weights)
            if type(leaf) is Combined and leaf.scale is not None:
                scales.append(leaf.scale)
        for key in [key for key, term in found.items() if not term.source.is_output]:
            if self._is_gone(key):
                del found[key]
        self.outputs = sum([term.source.outputs() for term in found.values()])
        """How many of them are models' outputs, or were made of such; guidance counts as two."""
        if len(found) > MOST_TERMS and all([each.is_same(scales[0]) for each in scales]):  # noqa: C419
            self._scale = scales[0].tensor if scales else None
            found = self._merged(found)
        ordered = sorted(found.items(), key=_place_of_term)
        self.number: dict[Any, int] = {}
        self._terms: list[Traced] = []
        for key, term in ordered:
            self.number[key] = len(self._terms)
            self._terms.append(term)

    def __len__(self) -> int:
        return len(self._terms)

    def _is_gone(self, key: Any) -> bool:
        """Take a tensor out of the sums that it was added to and taken away from; tell whether none is left."""
        gone = True
        for weights in self.weights:
            if key in weights:
                if len(weights) > 1 and max(map(abs, weights[key])) <= EXACT:
                    del weights[key]
                else:
                    gone = False
        return gone

    def whole(self, sample: Tensor) -> Tensor | None:
        """Return the one output whose halves the two terms are; ``None``: they are not those."""
        if len(self._terms) != 2 or (self._terms[0].piece, self._terms[1].piece) != ((0, 2), (1, 2)):
            return None
        source, shape = self._terms[0].source, sample.shape
        alike = self._terms[1].source is source and source.tensor.shape == (2 * shape[0], *shape[1:])
        return source.tensor if alike else None

    def tensors_like(self, sample: Tensor) -> tuple[Tensor, ...] | None:
        """Return the terms in the sample's shape; ``None``: they have not as many elements."""
        tensors = [term.value() for term in self._terms]
        for tensor in tensors:
            if tensor.shape != sample.shape:
                alike = tensor.shape[0] == sample.shape[0] and lies_in_order(tensor)
                alike = alike or (len(sample) == 1 and tensor.is_contiguous())
                if not alike or tensor.numel() != sample.numel():
                    return None
        return tuple([each if each.shape == sample.shape else each.view(sample.shape) for each in tensors])

    def _merged(self, found: dict[Any, Traced]) -> dict[Any, Traced]:
        """Compute sums of terms that occur in the same proportion everywhere, where kernels take fewer terms.

        Those of outputs alone, if that is enough. Otherwise also with tensors that were added to them: of latents, each
        x_0 has a copy of its own where torch does not count who writes to them, and goes along with its output.
        """
        columns = {key: self._proportion(key) for key in found}
        outputs = {key: columns[key] for key, term in found.items() if term.source.is_output}
        groups = _alike(outputs)
        if len(found) - sum([len(keys) - 1 for keys in groups]) > MOST_TERMS:
            groups = _alike(columns)
        found = dict(found)
        for keys in groups:
            self._merge(keys, found)
        return found

    def _proportion(self, key: Any) -> tuple[float, ...] | None:
        """Return how much of a term is in each sum, of one in the first that has it; ``None``: the scale says that."""
        weights = [each.get(key, (0.0, 0.0)) for each in self.weights]
        first = next((each for each in weights if any(each)), (0.0, 0.0))
        where = max((0, 1), key=lambda part: abs(first[part]))
        if not first[where]:
            return None
        ratios = tuple([round(each[where] / first[where], 9) for each in weights])
        for ratio, each in zip(ratios, weights, strict=True):
            if max([abs(a - ratio * b) for a, b in zip(each, first, strict=True)]) > 1e-8 * abs(first[where]):
                return None
        return ratios

    def _merge(self, keys: Sequence[Any], found: dict[Any, Traced]) -> None:
        """Put a mean in the place of some terms: near each of them, so that differences to it are small.

        Of x_0s it is one as well: those coefficients sum to 1 that are of the latents.
        """
        where = max(self.weights, key=lambda weights: max(map(abs, weights.get(keys[0], (0.0, 0.0)))))
        terms, weights = [found.pop(key) for key in keys], [where[key] for key in keys]
        beside = [weight for term, weight in zip(terms, weights, strict=True) if not term.source.is_output]
        said = [max(weight, key=abs) for weight in beside or weights]
        total = sum(said)
        if abs(total) < 1e-3 * max(map(abs, said)):  # there is no mean
            total = said[0]
        scaled = not any(constant for constant, _ in weights)  # all of them: then the mean is not
        shares = [(factor, 0.0) if scaled else (constant, factor) for constant, factor in weights]
        mean = _mean(terms, [(constant / total, factor / total) for constant, factor in shares], self._scale)
        merged = Traced(Source(mean, terms[0].source.fusion, len(beside) < len(terms)), mean)
        key, part = _key(merged), 0 if abs(weights[0][0]) >= abs(weights[0][1]) else 1
        found[key] = merged
        for each in self.weights:  # each may have one that is 0 there, or none
            present = {other: each.pop(other) for other in keys if other in each}
            if present:
                weight = present.get(keys[0], (0.0, 0.0))[part] / weights[0][part] * total
                each[key] = (0.0, weight) if scaled else (weight, 0.0)


def _alike(columns: dict[Any, tuple[float, ...] | None]) -> list[list[Any]]:
    """Return the keys, two or more, that have the same column."""
    groups: dict[tuple[float, ...], list[Any]] = {}
    for key, column in columns.items():
        if column is not None:
            groups.setdefault(column, []).append(key)
    return [keys for keys in groups.values() if len(keys) > 1]


def _mean(terms: Sequence[Traced], shares: Sequence[tuple[float, float]], scale: Tensor | None) -> Tensor:
    """Compute a sum of terms, in float32 or more; each share is a constant, and a factor of the scale.

    With latents, it is added up in float64: a velocity is a difference to x_0, and over a small sigma.
    """
    first, *others = [term.value() for term in terms]
    dtype = functools.reduce(torch.promote_types, [value.dtype for value in others], first.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    precise = first.device.type in ("cpu", "cuda") and not all(term.source.is_output for term in terms)
    wide = torch.float64 if precise else dtype

    def share(constant: float, factor: float) -> float | Tensor:
        if not factor:
            return constant
        assert scale is not None
        return (scale.to(wide) * factor + constant).reshape(-1, *[1] * (first.dim() - 1))

    mean = first.to(wide, copy=True).mul_(share(*shares[0]))
    for value, each in zip(others, shares[1:], strict=True):
        by, value = share(*each), value.reshape(first.shape)
        if isinstance(by, Tensor):
            mean.addcmul_(value.to(wide), by)
        else:
            mean.add_(value, alpha=by)
    return mean.to(dtype)


def _are_of_pieces(leaves: Sequence[Any]) -> bool:
    """Tell whether all outputs, and all that sums are of, are parts of a batch, as they were cut."""
    for leaf in leaves:
        if type(leaf) is Traced:
            if leaf.piece is None:
                return False
        else:
            for of, *_ in leaf.terms:
                if of.piece is None:
                    return False
    return True


def _key(term: Traced) -> Any:
    """Return what is the same for the same elements in the same order, in whatever shape each sample has them."""
    value = term.value()
    if lies_in_order(value):
        return value.data_ptr(), value.dtype, value.shape[0], value.stride(0), value.numel()
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _place_of_term(item: tuple[Any, Traced]) -> tuple[bool, tuple[int, int]]:
    return not item[1].source.is_output, item[1].piece or (0, 0)
