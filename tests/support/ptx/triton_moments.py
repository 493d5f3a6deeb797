"""Runs the PTX that Triton compiles of its kernel that makes weights: right, without races, and the same in any order.

TRITON_INTERPRET=0 python -m tests.support.ptx.triton_moments
"""

from __future__ import annotations

import sys

import torch

import fastguide
from fastguide import AdaptiveProjected, ClassifierFree
from fastguide.guidance.encoded import PART, scratch_numbers
from fastguide.step.backends import reference
from fastguide.step.operator import StepArguments
from tests.support.ptx.launch import Launch
from tests.support.ptx.placed import Placed
from tests.support.ptx.races import races
from tests.support.ptx.triton_step import report, same

TABLE = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10)
CURSOR = torch.tensor([[4, 10, 0, 0], [7, 7, 0, 0], [9, 10, 0, 0]])  # the second one is finished
CASES = {  # guidance, shape, dtype of predictions
    "several parts, and a finished sample": (ClassifierFree([1.0, 7.5, 3.0], guidance_rescale=0.7), (3, PART + 24),
                                             torch.bfloat16),
    "a weight of the sample": (AdaptiveProjected(7.5, norm_threshold=3.0, base="cond", space="original"),
                               (2, PART + 8), torch.float32),
    "more parts than are read at once": (ClassifierFree(7.5, guidance_rescale=0.7), (1, 65 * PART), torch.bfloat16),
}  # fmt: skip


def inputs(guidance, shape, dtype):
    """The operator's tensors, and its predictions: each the first half of what a model returned."""
    generator = torch.Generator().manual_seed(shape[-1])
    first, x = torch.randn(2, *shape, generator=generator)
    others = (first + 0.2 * torch.randn(shape, generator=generator) for _ in range(guidance.num_predictions - 1))
    program, parameters = guidance.weights_from.on(x.device)
    batch, terms = len(x), len(guidance.weights_from.program.weights)
    tensors = {
        "out": torch.zeros_like(x), "sample": x, "rows": TABLE.device_rows(None, torch.float32),
        "weights": guidance.weights(x.device, torch.float32), "program": program, "parameters": parameters,
        "made": torch.full((batch, terms + 1), torch.nan), "cursor": CURSOR[:batch],
        "scratch": torch.zeros(scratch_numbers(terms, batch, x[0].numel()), dtype=torch.float64),
    }  # fmt: skip
    return tensors, [torch.cat([p, p], 1).to(dtype) for p in (first, *others)]


def arguments_of(placed, tensors, returned):
    """The operator's arguments, in the interpreter's memory."""
    size = tensors["sample"].shape[1]
    fields = {name: placed(name, tensor.contiguous()) for name, tensor in tensors.items()}
    fields["predictions"] = [placed(f"prediction {k}", p)[:, :size] for k, p in enumerate(returned)]
    return StepArguments(**(dict.fromkeys(StepArguments._fields) | {"index": 0, "philox_threads": 0} | fields))


def made_by(kernels, tensors, returned, order, check_races=False):
    """The weights, the last sample's sums of parts, and what was found in two launches, one behind the other.

    Races are looked for in the first one, which takes most of the time.
    """
    placed = Placed()
    a = arguments_of(placed, tensors, returned)
    prepared = kernels.prepare_all(a)[0]
    blocks = None if order == "at once" else [[block] for block in reversed(range(prepared.blocks))]
    launches, made = [], []
    for _ in range(2):
        a.made.fill_(torch.nan)
        launches.append(Launch(placed.memory, *prepared[1:]).run(blocks))
        made.append(a.made.clone())
    found = [text for launch in launches for text in launch.findings] + (races(launches[0]) if check_races else [])
    if not same(*made):
        found.append("another launch makes other weights")
    batch, terms = len(a.made), a.made.shape[1] - 1
    return made[0], a.scratch[: -batch * (terms + 2)].view(batch, -1)[-1], found


def last_alone(tensors, returned):
    """The last sample's part of the tensors."""
    sample, parameters = tensors["sample"][-1:], tensors["parameters"]
    numbers = scratch_numbers(tensors["made"].shape[1] - 1, 1, sample.numel())
    alone = {name: tensors[name][-1:] for name in ("out", "sample", "made", "cursor")}
    alone |= {"scratch": torch.zeros(numbers, dtype=torch.float64)}
    alone |= {"parameters": parameters[:, -1:], "weights": tensors["weights"][:, -1:]}
    return tensors | alone, [each[-1:] for each in returned]


def wrong_of(kernels, name):
    """What was found, and what differs: from the reference, in another order of blocks, and of a sample alone."""
    tensors, returned = inputs(*CASES[name])
    made, sums, found = made_by(kernels, tensors, returned, "at once", len(tensors["sample"]) > 2)
    for order, given in (("one by one", (tensors, returned)), ("at once", last_alone(tensors, returned))):
        again, sums_again, also = made_by(kernels, *given, order)
        found += also
        if not same(made[-len(again) :], again) or not torch.equal(sums, sums_again):
            found.append(f"{len(again)} samples have other weights or sums, {order}")
    plain = arguments_of(lambda _, tensor: tensor.clone(), tensors, returned)
    live = plain.cursor[:, 0] < plain.cursor[:, 1]
    reference.guided_step(*plain._replace(cursor=None, indices=plain.cursor[:, 0]))
    expected = torch.where(live[:, None], plain.made, torch.nan)
    if not torch.allclose(made, expected, rtol=1e-6, atol=1e-6, equal_nan=True):
        found.append(f"weights: {made.tolist()} instead of {expected.tolist()}")
    return found


if __name__ == "__main__":
    sys.exit(report(CASES, wrong_of))
