"""The targets of ``python -m benchmarks.gradients``: memory of recorded steps and runs, over autograd's in torch."""

from __future__ import annotations

from functools import partial

from ..measure.gradient_memory import PLAIN, RUN, STEP
from .targets import Measured, Run, Target


def most_memory(run: Run, part: str, begins: str, within: str = "") -> Measured:
    """Return the largest part of fastguide's memory over that of the formula in torch, of workloads of such titles."""
    which = f"{part}_of_fastguide_over_this"
    titles = [row.get("workload", "") for row in run.rows if row.get("contender") == PLAIN]
    found = [title for title in titles if title.startswith(begins) and within in title]
    return max(Measured(run.value(title, PLAIN, which), title) for title in found or [begins])


def memory_targets() -> list[Target]:
    """Return the targets."""
    return [
        Target(
            "a recorded step: memory of its own, beside the next sample and the gradients, over autograd's, at most",
            partial(most_memory, part="own", begins=STEP),
            at_most=1 / 3,
        ),
        Target(
            "the same, all of it",
            partial(most_memory, part="peak", begins=STEP),
            at_most=1 / 3,
            cause="the next sample and the gradients that were asked for are most of both",
            known_to=0.87,
        ),
        Target(
            "a recorded run of a model of two convolutions, with checkpoints: memory over a plain loop's",
            partial(most_memory, part="peak", begins=RUN, within="two convolutions"),
            at_most=1 / 3,
        ),
    ]
