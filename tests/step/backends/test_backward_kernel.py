"""The CUDA kernel of a step's backward pass: compiled for the host, and interpreted from its PTX, without races."""

from __future__ import annotations

import re

import pytest
import torch

from fastguide.solvers.table import ROW_COLUMNS
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.backward import Gradients
from fastguide.step.operator import StepArguments
from tests.support import device_code
from tests.support.backward_cases import CASES, SHAPES, backward_call
from tests.support.device_code import backward as kernel
from tests.support.ptx.placed import Placed

pytestmark = [
    pytest.mark.xdist_group("ptx"),  # one process reads the PTX
    pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}"),
    pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here"),
]
TENSORS = (*Gradients._fields[:4], *Gradients._fields[5:-2])
"""All but the gradients of predictions and of weights, and the CPU's bits of a clip."""


def outputs_of(b):
    """Return the tensors that are written, by name."""
    named = {name: getattr(b, name) for name in TENSORS[3:] if getattr(b, name) is not None}
    return named | {f"prediction {k}": grad for k, grad in enumerate(b.grad_predictions)}


def emptied(b):
    """Return the same with outputs that hold nothing yet."""
    new = {name: torch.full_like(grad, torch.nan) for name, grad in outputs_of(b).items() if hasattr(b, name)}
    each = tuple(torch.full_like(grad, torch.nan) for grad in b.grad_predictions)
    weights = None if b.grad_weights is None else torch.full_like(b.grad_weights, torch.nan)
    return b._replace(**new, grad_predictions=each, grad_weights=weights)


def check(a, b, wanted):
    """To the bit, but where an exponential or the order of a sum differs."""
    close = {"rtol": 0, "atol": 0} if a.variance is None else {"rtol": 1e-6, "atol": 1e-6}
    for name, grad in outputs_of(b).items():
        torch.testing.assert_close(
            grad, outputs_of(wanted)[name], **close, msg=lambda text, name=name: f"{name}: {text}"
        )
    if wanted.grad_weights is not None:
        torch.testing.assert_close(b.grad_weights, wanted.grad_weights, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_the_same_code_compiled_for_the_host_is_the_cpu_s(name, shape):
    a, wanted = backward_call(name, shape)
    for order in (1, 2):
        b = emptied(wanted)
        accesses = kernel.guided_step_backward(*a, order=order, **b._asdict())
        assert (accesses > 0) == (shape[-1] % 8 == 0 or (len(shape) > 2 and shape[-1] % 4 == 0)), accesses
        check(a, b, wanted)


def test_an_index_that_is_not_in_the_table_is_nan_and_what_has_no_coefficient_may_be_anything():
    a, wanted = backward_call("clipped, rows of their own", (2, 64))
    b = emptied(wanted)
    kernel.guided_step_backward(*a._replace(indices=torch.tensor([6, 3])), **b._asdict())
    assert bool(b.grad_sample[0].isnan().all())
    assert not bool(b.grad_sample[1].isnan().any())
    a, wanted = backward_call("no clip", (2, 64))
    rows = a.rows.clone()
    rows[:, [ROW_COLUMNS.index("out_x0"), ROW_COLUMNS.index("out_sample")]] = 0.0
    infinite = wanted._replace(grad_out=torch.full_like(wanted.grad_out, torch.inf))
    results = []
    for run in (BACKENDS["native"].backward, kernel.guided_step_backward):
        results.append(emptied(infinite))
        run(*a._replace(rows=rows), **results[-1]._asdict())
    check(a, *results)
    assert bool(results[1].grad_sample.isfinite().all())


# ---- Interpreted ----


def placed_call(name, shape):
    """Return a call whose tensors are in the interpreter's memory, and the sums of its tiles."""
    a, wanted = backward_call(name, shape)
    placed = Placed()

    def place(name, tensor):
        return placed(name, tensor.contiguous()) if isinstance(tensor, torch.Tensor) else tensor

    read = {name: place(name, value) for name, value in a._asdict().items() if name not in ("out", "predictions")}
    predictions = [place(f"prediction {k}", p) for k, p in enumerate(a.predictions)]
    b = emptied(wanted)
    moved = {name: place(name, getattr(b, name)) for name in TENSORS}
    moved["grad_predictions"] = tuple(place("grad_predictions", grad) for grad in b.grad_predictions)
    b = b._replace(**moved)
    sums = place("grad_weights", kernel.sums_of(b, a.out[0].numel()))
    return placed, StepArguments(**read, out=b.grad_out, predictions=predictions), b, sums, wanted


@pytest.mark.parametrize("waves", ["at once", "one by one"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_interpreted(library, name, waves):
    placed, a, b, sums, wanted = placed_call(name, SHAPES["ragged" if waves == "at once" else "whole tiles"])
    launch = kernel.record(sums, *a, **b._asdict())
    blocks = None if waves == "at once" else [[block] for block in reversed(range(launch.blocks))]
    assert placed.launch(library, launch, blocks) == []
    if sums is not None:
        b.grad_weights.copy_(sums.sum(1))
    check(a, b, wanted)


def test_the_interpreter_finds_a_missing_barrier(library):
    """The test above has teeth."""
    placed, a, b, sums, _ = placed_call("no clip", SHAPES["ragged"])
    launch = kernel.record(sums, *a, **b._asdict())

    def changed(text):
        barriers = re.findall(r"bar\.sync[^;]*;", text)
        assert len(barriers) >= 2
        return re.sub(r"bar\.sync[^;]*;", "", text)

    assert any("race" in text for text in placed.launch(library.changed(launch.kernel, changed), launch))
