"""Find the tensors that the sums of a formula are of, and how much of each is in which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..guidance.encoded import MOST_TERMS
from .formula import lies_in_order
from .traced import EXACT, Combined, Source, Traced

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
        scaled, of_pieces = False, _are_of_pieces(leaves)
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
            scaled = scaled or (type(leaf) is Combined and leaf.scale is not None)
        for key in [key for key, term in found.items() if not term.source.is_output]:
            if self._is_gone(key):
                del found[key]
        if len(found) > MOST_TERMS and not scaled:
            found = self._merged(found)
        ordered = sorted(found.items(), key=_place_of_term)
        self.number: dict[Any, int] = {}
        self._terms: list[Traced] = []
        self.outputs = 0
        """How many of them are models' outputs, or were made of such; guidance counts as two."""
        for key, term in ordered:
            self.number[key] = len(self._terms)
            self._terms.append(term)
            self.outputs += term.source.outputs()

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
                alike = tensor.shape[0] == sample.shape[0] and tensor.numel() == sample.numel()
                if not alike or not lies_in_order(tensor):
                    return None
        return tuple([each if each.shape == sample.shape else each.view(sample.shape) for each in tensors])

    def _merged(self, found: dict[Any, Traced]) -> dict[Any, Traced]:
        """Compute sums of outputs that occur in the same proportion everywhere, where kernels take fewer terms."""
        groups: dict[tuple[float, ...], list[Any]] = {}
        for key, term in found.items():
            column = [weights.get(key, (0.0, 0.0))[0] for weights in self.weights]
            first = next((each for each in column if each), 0.0)
            if term.source.is_output and first:
                groups.setdefault(tuple([round(each / first, 9) for each in column]), []).append(key)
        found = dict(found)
        for keys in groups.values():
            if len(keys) > 1:
                self._merge(keys, found)
        return found

    def _merge(self, keys: Sequence[Any], found: dict[Any, Traced]) -> None:
        """Put a mean in the place of some terms: near each of them, so that differences to it are small."""
        where = max(self.weights, key=lambda weights: abs(weights.get(keys[0], (0.0, 0.0))[0]))
        total = sum(where[key][0] for key in keys)
        if abs(total) < 1e-3 * max(abs(where[key][0]) for key in keys):  # there is no mean
            total = where[keys[0]][0]
        terms = [found.pop(key) for key in keys]
        shares = [where[key][0] / total for key in keys]
        mean = terms[0].value().to(torch.promote_types(terms[0].dtype, torch.float32), copy=True).mul_(shares[0])
        for term, share in zip(terms[1:], shares[1:], strict=True):
            mean.add_(term.value(), alpha=share)
        merged = Traced(Source(mean, terms[0].source.fusion), mean)
        key = _key(merged)
        found[key] = merged
        for weights in self.weights:  # each may have one that is 0 there, or none
            present = {each: weights.pop(each) for each in keys if each in weights}
            if present:
                weights[key] = present.get(keys[0], (0.0, 0.0))[0] / shares[0], 0.0


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
