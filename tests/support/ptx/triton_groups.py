"""Runs the PTX that Triton compiles of its step with weights of groups: right, without races, the same in any order.

TRITON_INTERPRET=0 python -m tests.support.ptx.triton_groups
"""

from __future__ import annotations

import sys

import torch

from fastguide.step.backends import reference
from tests.step.test_groups import ADDS_NOISE, GUIDANCES, grouped
from tests.support.ptx.launch import Launch
from tests.support.ptx.memory import INITIALISED, READ, WRITE
from tests.support.ptx.placed import Placed
from tests.support.ptx.races import races
from tests.support.ptx.triton_step import report, same

CURSOR = torch.tensor([[4, 10, 0, 0], [7, 7, 0, 0], [9, 10, 0, 0]])  # the second one is finished
CASES = {  # guidance, shape, dtype of the predictions
    "tokens, and a finished sample": ("normalized", (3, 20, 64), torch.bfloat16),
    "one element at a time": ("projected", (3, 5, 77), torch.bfloat16),
    "three terms, and the sample": ("three terms and deviations", (3, 45, 24), torch.float32),
    "several tiles a group": ("projected", (3, 1, 4104), torch.float16),
}


def inputs(name):
    """The operator's tensors, of the step of three samples, of which one is finished; noise is drawn."""
    torch.manual_seed(0)
    guidance, shape, dtype = CASES[name]
    groups = (shape[0], max(shape[1], 2), shape[2])  # one group would be a sample
    a = grouped(GUIDANCES[guidance], groups, dtype)
    a = a._replace(rows=ADDS_NOISE.device_rows(None, torch.float32), seeds=torch.tensor([1, 2, 3]), cursor=CURSOR)
    return a._replace(made=torch.full_like(a.made, torch.nan))


def of_samples(a, samples):
    """Some samples' part of the arguments."""
    groups = len(a.made) // len(a.sample)
    per_sample = {name: getattr(a, name)[samples] for name in ("sample", "out", "seeds", "cursor")}
    both = {name: getattr(a, name) for name in ("weights", "parameters")}
    per_sample |= {name: t[:, samples] if t.shape[1] > 1 else t for name, t in both.items()}
    made = a.made.view(-1, groups, a.made.shape[1])[samples].flatten(0, 1)
    return a._replace(**per_sample, made=made, predictions=[p[samples] for p in a.predictions])


def stepped(kernels, a, order, check_races=False):
    """The next sample and the weights, from one launch over memory of the interpreter; and what was found."""
    placed = Placed(sample=READ | WRITE | INITIALISED, cursor=READ | WRITE | INITIALISED)
    tensors = {name: t for name in a._fields if isinstance(t := getattr(a, name), torch.Tensor) and name != "out"}
    fields = {name: placed(name, tensor.contiguous()) for name, tensor in tensors.items()}
    fields["predictions"] = [placed(f"prediction {k}", p.contiguous()) for k, p in enumerate(a.predictions)]
    here = a._replace(**fields, out=fields["sample"])
    (prepared,) = kernels.prepare_all(here)
    blocks = None if order == "at once" else [[block] for block in reversed(range(prepared.blocks))]
    launch = Launch(placed.memory, *prepared[1:]).run(blocks)
    return (
        here.sample.clone(),
        here.made.clone(),
        launch.findings + (races(launch, agreeing=True) if check_races else []),
    )


def wrong_of(kernels, name):
    """What was found, and what differs: from the reference, in another order of blocks, and of a sample alone."""
    a = inputs(name)
    out, made, found = stepped(kernels, a, "at once", check_races=True)
    groups = len(made) // len(out)
    for order, given, first in (("one by one", a, 0), ("at once", of_samples(a, slice(2, 3)), 2)):
        out_again, made_again, also = stepped(kernels, given, order)
        found += also
        if not same(out[first:], out_again) or not same(made[first * groups :], made_again):
            found.append(f"{len(out_again)} samples have other bits, {order}")
    expected = a._replace(sample=a.sample.clone(), made=a.made.clone(), cursor=a.cursor.clone())
    expected = expected._replace(out=expected.sample)
    reference.guided_step(*expected)
    expected.made[groups : 2 * groups] = torch.nan  # of the finished sample, nothing is made
    scale = expected.out.abs().max()
    if not torch.allclose(made, expected.made, rtol=2e-6, atol=1e-6, equal_nan=True):
        found.append("weights are others")
    if not torch.allclose(out / scale, expected.out / scale, rtol=0, atol=1e-6):
        found.append(f"the next sample is off by {float((out - expected.out).abs().max())}")
    return found


if __name__ == "__main__":
    sys.exit(report(CASES, wrong_of))
