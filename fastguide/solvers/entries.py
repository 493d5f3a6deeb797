"""Rows of solvers that go on from earlier calls: linear forms over what calls leave, in a history's slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..schedules.levels import Levels
from ._columns import finite_or_reason, x0_shift
from .table import MAX_SLOTS

GOES_ON = "the gradient has to be a part of the x_0 that its calls combine, and leave for others; use form='epsilon'"


class Entry(NamedTuple):
    """What each call leaves for later ones, ``x0 * x_0 + sample * x``: two tensors of shape (calls,), float64."""

    x0: Tensor
    sample: Tensor

    @classmethod
    def original(cls, levels: Levels) -> Entry:
        """Return entries that are the predicted x_0."""
        return cls(torch.ones_like(levels.alpha), torch.zeros_like(levels.alpha))

    @classmethod
    def epsilon(cls, levels: Levels) -> Entry:
        """Return entries that are the predicted noise, ``(x - alpha * x_0) / sigma``."""
        return cls(-levels.alpha / levels.sigma, 1 / levels.sigma)

    @classmethod
    def slope(cls, levels: Levels) -> Entry:
        """Return entries ``(x - x_0) / sigma``: a flow's velocity, and the slope in sigma of an unscaled sample."""
        return cls(-1 / levels.sigma, 1 / levels.sigma)

    @classmethod
    def velocity(cls, levels: Levels) -> Entry:
        """Return entries that are v of a variance-preserving schedule, ``(alpha * x - x_0) / sigma``."""
        return cls(-1 / levels.sigma, levels.alpha / levels.sigma)


@dataclass
class Form:
    """What a call makes of the sample, of its own x_0, and of entries: one row of a table."""

    sample: float = 0.0
    anchor: float = 0.0
    """The factor of the sample as the last call wrote it."""
    x0: float = 0.0
    noise: float = 0.0
    entries: dict[int, float] = field(default_factory=dict)
    """The factors of entries, by the calls that leave them; the call's own is one of them."""

    def add(self, entries: Mapping[int, float], factor: float = 1.0) -> Form:
        """Add multiples of entries."""
        for call, value in entries.items():
            self.entries[call] = self.entries.get(call, 0.0) + factor * value
        return self


def history_columns(forms: Sequence[Form], entry: Entry) -> dict[str, Tensor]:
    """Return the columns of these forms, each entry in a slot from its call to the last one that reads it.

    A call reads before it writes, so that an entry may take the slot of one that is read for the last time.

    Args:
        forms: one for each call.
        entry: what the calls leave, where a later one reads it.

    Raises:
        ValueError: more than three entries would have to be kept at once, or a call reads what a later one leaves.
    """
    if len(forms) != len(entry.x0):
        raise ValueError(f"forms: expected {len(entry.x0)}, one for each entry, got {len(forms)}")
    last_read = {call: call for call in range(len(forms))}
    for reader, form in enumerate(forms):
        last_read |= {call: reader for call, factor in form.entries.items() if factor}
    names = ("out_sample", "out_anchor", "out_x0", "out_noise", "hist_x0", "hist_sample")
    columns = {name: torch.zeros(len(forms), dtype=torch.float64, device="cpu") for name in names}
    columns |= {f"out_hist_{slot}": torch.zeros_like(columns["out_x0"]) for slot in range(MAX_SLOTS)}
    columns["hist_slot"] = torch.full_like(columns["out_x0"], -1.0)
    holder: list[int | None] = [None] * MAX_SLOTS
    slot_of: dict[int, int] = {}
    for call, form in enumerate(forms):
        own = form.entries.get(call, 0.0)
        columns["out_sample"][call] = form.sample + own * entry.sample[call]
        columns["out_x0"][call] = form.x0 + own * entry.x0[call]
        columns["out_anchor"][call], columns["out_noise"][call] = form.anchor, form.noise
        for earlier, factor in form.entries.items():
            if not 0 <= earlier <= call:
                raise ValueError(f"forms: expected entries of calls from 0 to {call} in call {call}, got {earlier}")
            if earlier != call and factor:
                columns[f"out_hist_{slot_of[earlier]}"][call] = factor
        if last_read[call] > call:
            slot = _free_slot(holder, last_read, call)
            holder[slot], slot_of[call] = call, slot
            columns["hist_slot"][call] = slot
            columns["hist_x0"][call], columns["hist_sample"][call] = entry.x0[call], entry.sample[call]
    return columns


def _free_slot(holder: Sequence[int | None], last_read: Mapping[int, int], call: int) -> int:
    for slot, held in enumerate(holder):
        if held is None or last_read[held] <= call:
            return slot
    raise ValueError(f"history: expected at most {MAX_SLOTS} entries that are kept at once, got more at call {call}")


def history_gradients(
    columns: Mapping[str, Tensor], levels: Levels, timesteps: Tensor, variance: Tensor | str
) -> dict[str, Mapping[str, Tensor] | str]:
    """Return a gradient's columns in each form: all that a row takes of a prediction, it takes of its x_0.

    Args:
        columns: the row's own.
        levels: of the calls' samples.
        timesteps: of the rows, for messages.
        variance: of the step, by which the gradient moves its mean; or why there is none.
    """
    one = torch.ones_like(levels.alpha)
    before = {"x0_grad": x0_shift(levels) / columns.get("x0_scale", one)}
    return {
        "epsilon": finite_or_reason(before, one, one, timesteps),
        "epsilon_after_clip": GOES_ON,
        "mean": variance if isinstance(variance, str) else {"out_grad": variance},
    }
