"""Stand for what a pipeline joins of combinations: along the channels with another output, or twice along the batch.

Kandinsky's and DeepFloyd's pipelines join guidance with the variance that a model learned. DiT's and Lumina's guide the
first channels, join the result twice along the batch, and that along the channels with those that are not guided.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lazy_tensor import LazyTensor
from .traced import Combined, Seen, Traced, check_version, own_value, register, stop_trying


class Doubled(LazyTensor):
    """A combination, and after it the same once more: two of each of its samples."""

    __slots__ = ("main",)

    def __init__(self, main: Combined) -> None:
        self._value = None
        self.main = main

    def like(self) -> Tensor:
        """Return a tensor of the same shape and device."""
        one = self.main.like()
        return one[:1].expand(2 * len(one), *one.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The combination's."""
        return self.main.dtype

    @property
    def seen(self) -> Seen:
        """The outputs that it is of, and how often each had been written to."""
        return self.main.seen

    def is_pending(self) -> bool:
        """Tell whether nobody has seen its values, or those of the combination."""
        return self._value is None and self.main.is_pending()

    def check_unchanged(self) -> None:
        """Refuse outputs and scales that are not what they were when they were combined.

        Raises:
            RuntimeError: one has been written to since.
        """
        self.main.check_unchanged()

    def value(self) -> Tensor:
        """Compute the tensor, for later use."""
        if self._value is None:
            one = self.main.value()
            self._value = torch.cat([one, one])
        return self._value

    def computed(self, by: str = "") -> Tensor:
        """Return the tensor itself, the same one each time; ``by``: the operation that asks."""
        if self._value is None:
            stop_trying(self.seen, by)
        return self.value()


class Joined(LazyTensor):
    """A combination with other channels after it: a variance that a model learned, or those that are not guided."""

    __slots__ = ("main", "rest", "seen")

    def __init__(self, main: Combined | Doubled, rest: Traced | Combined) -> None:
        self._value = None
        self.main = main
        self.rest = rest
        self.seen: Seen = rest.seen if type(rest) is Combined else ((rest.source, rest.source.version()),)
        """The other channels' outputs, and how often each had been written to."""
        register(self, (*main.seen, *self.seen))

    def like(self) -> Tensor:
        """Return the tensor itself."""
        return self.computed("shape")

    @property
    def dtype(self) -> torch.dtype:
        """That of both."""
        return self.main.dtype

    def is_pending(self) -> bool:
        """Tell whether nobody has seen its values, or those of the combination."""
        return self._value is None and self.main.is_pending()

    def check_unchanged(self) -> None:
        """Refuse outputs that are not what they were when they were combined.

        Raises:
            RuntimeError: one has been written to since.
        """
        self.main.check_unchanged()
        for source, version in self.seen:
            check_version(source, version)

    def value(self) -> Tensor:
        """Compute the tensor, for later use."""
        if self._value is None:
            for source, version in self.seen:
                check_version(source, version)
            self._value = torch.cat([self.main.value(), self.rest.value()], 1)
        return self._value

    def computed(self, by: str = "") -> Tensor:
        """Return the tensor itself, the same one each time; ``by``: the operation that asks."""
        if self._value is None:
            stop_trying((*self.main.seen, *self.seen), by)
        return self.value()

    def split(self, split_size: Any, dim: int = 0) -> Any:
        """Return both parts, if it is they that are asked for."""
        if self.is_pending() and dim == 1 and split_size == self.main.like().shape[1] == own_value(self.rest).shape[1]:
            return self.main, self.rest
        return self.computed("split").split(split_size, dim)

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        """Return both parts, if it is they that are asked for: along the channels, or of two along the batch."""
        if chunks == 2 and self.is_pending():
            if dim == 1:
                return self.split(self.main.like().shape[1], 1)
            halves = self.rest.chunk(2) if dim == 0 and type(self.main) is Doubled else ()
            if [type(half) for half in halves] == [Traced, Traced]:
                assert type(self.main) is Doubled
                return tuple([Joined(self.main.main, half) for half in halves])
        return self.computed("chunk").chunk(chunks, dim)
