"""How a loop's steps are made: eagerly, as replays of one captured step, or of the whole loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch

from .capture import Graphs, can_capture
from .state import Loop

Mode: TypeAlias = Literal["auto", "loop", "try", False]
MODES = get_args(Mode)


def check_mode(mode: Mode, device: torch.device) -> None:
    """Refuse what only a device with graphs can do."""
    if mode not in MODES:
        raise ValueError(f"cuda_graph: expected 'auto', 'loop', 'try' or False, got {mode!r}")
    if mode == "loop" and not can_capture(device):
        raise ValueError(f"cuda_graph: expected 'auto' or False for an x_T on {device}, which has no graphs")


def captures(mode: Mode, device: torch.device) -> bool:
    """Whether steps are captured there."""
    return mode is not False and can_capture(device)


def step_function(
    mode: Mode,
    loop: Loop,
    graphs: Graphs,
    write: Callable[[], None],
    conditional: tuple[bool, ...],
    steps: range,
    between: bool,
) -> Callable[[int], None]:
    """The function that makes a step of ``steps``, captured now if it is to be and is not yet.

    Args:
        mode: as ``cuda_graph`` of ``Sampler``.
        loop, graphs: the buffers, and the graphs on them.
        write: fills the buffers for a run; a capture spoils them.
        conditional: for each step, whether the unconditional prediction is left out.
        steps: of this run.
        between: whether something is done between the steps.
    """
    if mode == "loop" and steps:
        if between:
            raise ValueError(
                "cuda_graph: 'loop' replays all steps at once; expected 'auto' with a callback, progress, a check, "
                "the results of every step or a generator that the kernel does not draw from"
            )
        pattern = tuple(conditional[step] for step in steps)

        def all_steps() -> None:
            for flag in pattern:
                loop.step(flag)

        whole = graphs.get(pattern, all_steps, write)
        return lambda step: whole.replay() if step == steps.start else None
    made = single_steps(mode, loop, graphs, write)
    return lambda step: made[conditional[step]]()


def single_steps(mode: Mode, loop: Loop, graphs: Graphs, write: Callable[[], None]) -> dict[bool, Callable[[], None]]:
    """A step, and one without the unconditional prediction where steps may skip it; see ``step_function``."""
    flags = (False, True) if loop.kind.skips else (False,)

    def eager(flag: bool) -> Callable[[], None]:
        return lambda: loop.step(flag)

    if captures(mode, loop.kind.device) and not (mode == "try" and graphs.failed):
        try:
            return {flag: graphs.get(flag, eager(flag), write).replay for flag in flags}
        except RuntimeError as error:
            if mode != "try":
                raise
            warnings.warn(f"fastguide: running without a graph: {error}", RuntimeWarning, stacklevel=4)
    return {flag: eager(flag) for flag in flags}
