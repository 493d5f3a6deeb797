"""Say which of a step's two model calls comes next, as diffusers' schedulers of second order do."""

from __future__ import annotations

from typing import Any

from .counted_step import CountedStep


class TwoCalls(CountedStep):
    """Mix this into a scheduler whose steps make two calls, but the last."""

    def _why_not_from(self, begin: int) -> str | None:
        """Say why rows cannot express a loop that begins at a call; ``None``: they can."""
        return "a loop that begins in the middle of a step" if begin % 2 else None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first one of its step."""
        loop: Any = self._copied_loop if self._counted is None else self._counted
        if loop is None or self._step_index is None or (self._counted is not None and self._counted.table is None):
            return bool(super().state_in_first_order)  # type: ignore[misc]
        return bool((self._step_index - loop.begin) % 2 == 0)
