"""Hand UniPC's history over to diffusers where somebody reads it in the middle of a loop, or writes to it.

ChronoEdit's pipeline cuts frames out of it. SkyReels' diffusion forcing writes each result into the sample's memory:
diffusers, which keeps the first sample as it was given, corrects by what is there then. A loop's history is a fused
scheduler's own: what diffusers keeps is made of that when it is needed, and diffusers' own step goes on from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..solvers.entries import Form
from .counted_loop import CountedLoop
from .counted_step import CountedStep
from .guidance_arguments import Scale

_READ = "a history that was read, and may have been changed"
_WRITTEN = "an earlier sample that was written to, by which diffusers corrects the next"


class HandsOver(CountedStep):
    """Mix this into a scheduler that keeps entries of earlier calls as ``model_outputs``, and ``last_sample``."""

    lower_order_nums: int
    this_order: int
    _given: tuple[Tensor, int] | None = None
    """The last call's sample, if diffusers keeps it as it was given, and how often it had been written to then."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        step = super().step  # type: ignore[misc]
        if is_dynamo_compiling():
            return step(model_output, timestep, sample, return_dict, guidance_scale=guidance_scale)
        given, self._given = self._given, None
        if given is not None and given[0]._version != given[1]:
            self._hand_over(_WRITTEN)
            if self._handed_over:
                self.__dict__["last_sample"] = given[0]
        done = step(model_output, timestep, sample, return_dict, guidance_scale=guidance_scale)
        loop = self._counted
        if loop is not None and loop.following > loop.begin and self._keeps_sample(loop.begin, loop.following - 1):
            self._given = _counted_writes(sample)
        return done

    def _tables_are_set(self, device: str | torch.device | None) -> None:
        super()._tables_are_set(device)
        self._given = None

    def _keeps_sample(self, begin: int, index: int) -> bool:
        """Tell whether diffusers keeps the sample of a step as it was given, as it does not correct it."""
        return index == begin

    def _predictor_forms(self, loop: CountedLoop) -> list[Form]:
        """Return what each call of a loop makes of its corrected sample and of entries."""
        raise NotImplementedError(type(self).__name__)

    @property
    def model_outputs(self) -> list[Tensor | None]:
        """What diffusers keeps of earlier calls, the newest last; reading it in a loop leaves the rest to diffusers."""
        self._hand_over(_READ)
        kept: list[Tensor | None] = self.__dict__["model_outputs"]
        return kept

    @model_outputs.setter
    def model_outputs(self, kept: list[Tensor | None]) -> None:
        self.__dict__["model_outputs"] = kept

    @property
    def last_sample(self) -> Tensor | None:
        """The last call's corrected sample; as ``model_outputs``."""
        self._hand_over(_READ)
        kept: Tensor | None = self.__dict__["last_sample"]
        return kept

    @last_sample.setter
    def last_sample(self, kept: Tensor | None) -> None:
        self.__dict__["last_sample"] = kept

    def _hand_over(self, reason: str) -> None:
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
        self._counted, self._handed_over = None, reason


def _counted_writes(sample: Any) -> tuple[Tensor, int] | None:
    """Return a sample, and how often it has been written to; ``None`` where torch does not count that, or traces it."""
    if type(sample) is not Tensor or sample.requires_grad or sample.is_inference():
        return None
    return sample, sample._version


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
