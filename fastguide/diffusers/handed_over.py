"""Hand UniPC's history over to diffusers where somebody reads it in the middle of a loop, and may change it.

ChronoEdit's pipeline cuts frames out of it. A loop's history is a fused scheduler's own: what diffusers keeps is made
of that when it is asked for, and diffusers' own step goes on from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers.entries import Form
from .counted_loop import CountedLoop
from .counted_step import CountedStep


class HandsOver(CountedStep):
    """Mix this into a scheduler that keeps entries of earlier calls as ``model_outputs``, and ``last_sample``."""

    lower_order_nums: int
    this_order: int

    def _predictor_forms(self, loop: CountedLoop) -> list[Form]:
        """Return what each call of a loop makes of its corrected sample and of entries."""
        raise NotImplementedError(type(self).__name__)

    @property
    def model_outputs(self) -> list[Tensor | None]:
        """What diffusers keeps of earlier calls, the newest last; reading it in a loop leaves the rest to diffusers."""
        self._hand_over()
        kept: list[Tensor | None] = self.__dict__["model_outputs"]
        return kept

    @model_outputs.setter
    def model_outputs(self, kept: list[Tensor | None]) -> None:
        self.__dict__["model_outputs"] = kept

    @property
    def last_sample(self) -> Tensor | None:
        """The last call's corrected sample; as ``model_outputs``."""
        self._hand_over()
        kept: Tensor | None = self.__dict__["last_sample"]
        return kept

    @last_sample.setter
    def last_sample(self, kept: Tensor | None) -> None:
        self.__dict__["last_sample"] = kept

    def _hand_over(self) -> None:
        loop = self._counted
        if loop is None or loop.history is None or loop.is_over or loop.following == loop.begin:
            return
        held, written = _entries(loop), loop.returned if loop.state is None else loop.state
        assert written is not None
        assert loop.returned is not None
        made, dtype, config = loop.following - loop.begin, loop.returned.dtype, self._internal_dict
        order, remaining = config["solver_order"], len(self.timesteps) - loop.following + 1
        last = _corrected(self._predictor_forms(loop)[made - 1], written, held)
        unused = torch.zeros_like(written)  # of which diffusers takes nothing, but with which it computes
        outputs = [None if call < 0 else held.get(call, unused).to(dtype) for call in range(made - order, made)]
        self.__dict__["model_outputs"] = outputs
        self.__dict__["last_sample"] = (written if last is None else last).to(dtype)
        self.lower_order_nums = min(order, made)
        self.this_order = min(order, made, remaining if config["lower_order_final"] else order)
        self._counted, self._handed_over = None, True


def _entries(loop: CountedLoop) -> dict[int, Tensor]:
    """Return copies of the entries that a loop's history has, by the calls that left them."""
    assert loop.table is not None
    assert loop.history is not None
    slots = loop.table.coefficients()["hist_slot"].tolist()
    holds = {int(slot): call for call, slot in enumerate(slots[: loop.following - loop.begin]) if slot >= 0}
    entries = loop.history.entries.unflatten(0, (loop.history.slots, -1))
    return {call: entries[slot].clone() for slot, call in holds.items()}


def _corrected(form: Form, written: Tensor, held: dict[int, Tensor]) -> Tensor | None:
    """Return the sample that a call predicted from; ``None``: the history has not all of it, as no call needs it."""
    factors = {call: factor for call, factor in form.entries.items() if factor}
    if form.sample == 0 or not factors.keys() <= held.keys():
        return None
    rest: Tensor = written.to(torch.promote_types(written.dtype, torch.float32), copy=True)
    for call, factor in factors.items():
        rest -= factor * held[call]
    return rest / form.sample
