"""Keep the states of a sampler's last kinds of calls, and lend each to one caller at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..guidance import Guidance
from .capture import Graphs, Pool
from .state import SamplerState, StateKey


class Cached(NamedTuple):
    """The buffers of a kind of calls, and what was captured over them."""

    state: SamplerState
    graphs: Graphs


class CachedStates:
    """The states of one sampler, by their keys: the least recently used come first."""

    def __init__(self) -> None:
        self.cached: dict[StateKey, Cached] = {}
        self._pools: dict[torch.device, Pool] = {}
        self._in_use = threading.Lock()

    def __contains__(self, key: StateKey) -> bool:
        return key in self.cached

    @contextmanager
    def borrow(
        self, key: StateKey, guidance: Guidance, most: int, recapture: bool, whole_loops: bool
    ) -> Iterator[Cached]:
        """Lend the state of a key; a new one is kept when its first use has succeeded.

        Args:
            key: of the call.
            guidance: of this key.
            most: how many states are kept.
            recapture: whether a call of another kind than the first is allowed.
            whole_loops: whether a graph is of all steps.
        """
        with self._exclusive("is running already, in another thread or a callback; expected one of its own"):
            pool = self._pools.setdefault(key.device, Pool(key.device))
            pool.wait()
            cached = self.cached.get(key)
            if cached is None:
                if not recapture and self.cached:
                    first = next(iter(self.cached))
                    raise ValueError(f"recapture: expected a call like the first, of {first.difference(key)}")
                only_one = not recapture and whole_loops
                cached = Cached(SamplerState(key, guidance), Graphs(pool, max(most, 2), only_one))
            try:
                yield cached
            except BaseException:
                pool.mark_end()
                if key not in self.cached:  # its memory is freed now
                    pool.synchronize()
                raise
            pool.mark_end()
            self.cached.pop(key, None)
            while len(self.cached) >= max(most, 1):
                self._drop(next(iter(self.cached)))
            self.cached[key] = cached

    def clear(self) -> None:
        """Drop all states and graphs; waits for the device."""
        with self._exclusive("is running, in another thread or a callback; expected it idle"):
            for key in list(self.cached):
                self._drop(key)
            self._pools.clear()

    @contextmanager
    def _exclusive(self, refusal: str) -> Iterator[None]:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(f"sampler: {refusal}")
        try:
            yield
        finally:
            self._in_use.release()

    def _drop(self, key: StateKey) -> None:
        self._pools[key.device].synchronize()
        del self.cached[key]
