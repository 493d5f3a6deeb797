"""Test the memory of recorded steps: what is counted, that both sides compute the same, and what is promised."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gradients
from benchmarks.measure import gradient_memory
from benchmarks.measure.allocations import Memory, memory_of
from benchmarks.report import targets
from benchmarks.report.memory_targets import memory_targets


def test_every_byte_is_counted_once():
    x = torch.randn(64, 1024).requires_grad_()
    y, size = torch.randn(64, 1024), x.nbytes

    def forward():
        return ((2 * x).clamp(-1, 1) * x,)  # the clamp keeps 2 * x, the product what was clamped and x

    used = memory_of(forward, [x], [y])
    assert used == memory_of(forward, [x], [y])  # on a busy machine, too
    assert 0 <= used.kept - 2 * size < 256
    assert used.kept_of_the_caller_s == size
    assert used.own >= used.kept
    assert used.peak >= used.own + size


@pytest.fixture
def in_float64():
    """Let what is drawn be float64, the same each time: a clip makes of rounding in float32 another gradient."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", gradient_memory.steps())
def test_both_steps_compute_the_same(name):
    compare(gradient_memory.recorded_step(gradient_memory.steps()[name], (2, 3, 8, 8)))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["ddim, clipped", "dpm++ 2m"])
def test_all_runs_compute_the_same(name):
    compare(
        gradient_memory.recorded_run(gradient_memory.runs()[f"{name}, a model of one multiplication"], (2, 4, 8, 8))
    )


def compare(recorded):
    outputs = {name: forward() for name, forward in recorded.contenders.items()}
    first, *others = (
        (*output, *torch.autograd.grad(output, recorded.inputs, recorded.came)) for output in outputs.values()
    )
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            # predictions may be of 16 bits, and so are their gradients then; weights of moments are float32
            relative = 1.6e-2 if theirs.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative * float(theirs.abs().max()))


def test_the_largest_ratio_is_judged():
    rows = []
    for title, own in ((f"{gradient_memory.STEP}, a", 10), (f"{gradient_memory.STEP}, b", 40)):
        found = {gradient_memory.OURS: Memory(0, 0, own, 80), gradient_memory.PLAIN: Memory(0, 0, 100, 100)}
        rows += gradients._memory_rows({"suite": "gradients", "workload": title}, found)
    own, peak, run = targets.judged(rows, "cpu", memory_targets())
    assert (own["status"], own["measured"], own["slowest"]) == ("missed", 0.4, f"{gradient_memory.STEP}, b")
    assert (peak["status"], peak["measured"]) == ("missed", 0.8)
    assert peak["reason"].startswith("the next sample and the gradients")
    assert run["status"] == "not run"
