"""Say which of a step's two model calls comes next, as diffusers' schedulers of second order do."""

from __future__ import annotations

from .counted_step import CountedStep


class TwoCalls(CountedStep):
    """Mix this into a scheduler whose steps make two calls, but the last."""

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first one of its step."""
        loop = self._counted
        if loop is None or loop.table is None or self._step_index is None:
            return bool(super().state_in_first_order)  # type: ignore[misc]
        return (self._step_index - loop.begin) % 2 == 0
