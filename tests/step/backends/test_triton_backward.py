"""The Triton kernel's gradients, in its interpreter, are the reference's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, History, Inpainting
from tests.step.test_gradients import SCHEDULE
from tests.support import triton_interpreter

pytestmark = pytest.mark.skipif(
    not triton_interpreter.INTERPRETED, reason="Triton is not installed, or a GPU is there: it runs there"
)
TABLES = {
    "ddim": fastguide.ddim(SCHEDULE, 6),
    "ddpm": fastguide.ddpm(SCHEDULE, 6, clip_sample_range=1.0),
    "learned": fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range", clip_sample_range=1.0),
    "dpm": fastguide.dpm_solver(SCHEDULE, 6, algorithm_type="sde-dpmsolver++"),
    "heun": fastguide.heun(SCHEDULE, 6),
}
SHAPE = (2, 3, 9, 43)  # a whole tile and a tail


def gradients(backend, table, form, count, index, state):
    """Of all that requires one, by name, of a step in the middle of a loop."""
    generator = torch.Generator().manual_seed(0)

    def draw(dtype=torch.float32):
        return (0.7 * torch.randn(SHAPE, generator=generator)).to(dtype).requires_grad_()

    inputs = {"x": draw(state), "g": draw(), "z": draw(), "v": draw(), "xa": draw(), "known": draw(), "zk": draw()}
    inputs |= {f"p{k}": draw(torch.bfloat16 if k else torch.float32) for k in range(count)}
    inputs["scale"] = torch.tensor([1.5, 3.0], requires_grad=True)
    inputs["s"] = torch.tensor([0.5, -1.0], requires_grad=True)
    guidance = Classifier(None, inputs["s"], form)
    if count > 1:
        scales = [inputs["scale"] / k for k in range(1, count)]
        guidance = (ClassifierFree(*scales) if count == 2 else Composed(scales)) + guidance
    history = History(table, inputs["x"])
    entries = torch.randn(history.entries.shape, generator=generator).requires_grad_()
    history = history.continued(entries.clone(), index if isinstance(index, int) else None)
    original = torch.empty(SHAPE)
    mask = torch.rand(SHAPE, generator=generator).round(decimals=1)
    options = {"noise": inputs["z"]} if table.adds_noise_anywhere else {}
    options |= {"variance": inputs["v"]} if table.learned_variance else {}
    if table.history_slots:
        options |= {"anchor": inputs["xa"]}
    else:
        options |= {"inpainting": Inpainting(mask, inputs["known"], inputs["zk"])}
    predictions = [inputs[f"p{k}"] for k in range(count)]
    y = fastguide.guided_step(
        table, index, inputs["x"], predictions, guidance, gradient=inputs["g"], history=history, original=original,
        backend=backend, **options,
    )  # fmt: skip
    weigh = torch.randn((3, *SHAPE), generator=generator)
    loss = (
        (y * weigh[0]).sum()
        + (original * weigh[1]).sum()
        + (history.entries * weigh[2].repeat(3, 1, 1, 1)[: len(entries)]).sum()
    )
    inputs["history"] = entries
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {name: grad for name, grad in zip(inputs, found, strict=True) if grad is not None}


@pytest.mark.parametrize(
    ("name", "form", "count", "state"),
    [
        ("ddim", "epsilon", 2, torch.float32),
        ("ddpm", "mean", 3, torch.bfloat16),
        ("learned", "mean", 1, torch.float32),
        ("dpm", "epsilon", 2, torch.float32),
        ("heun", "epsilon", 2, torch.float32),
    ],
)
def test_gradients_are_the_reference_s(name, form, count, state):
    table, index = TABLES[name], 2 if TABLES[name].history_slots else torch.tensor([1, 3])
    expected = gradients("reference", table, form, count, index, state)
    got = gradients("triton", table, form, count, index, state)
    assert got.keys() == expected.keys()
    assert {"x", "g", "p0", "s"} <= got.keys()
    for key, grad in got.items():
        assert grad.dtype == expected[key].dtype
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=2e-5 if state == torch.float32 else 1e-3)


def test_nothing_to_do():
    x = torch.zeros(0, 3, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    y = fastguide.guided_step(TABLES["ddim"], 2, x, [x, x], ClassifierFree(scale), backend="triton")
    grads = torch.autograd.grad(y.sum(), [x, scale])
    assert grads[0].shape == (0, 3)
    assert grads[1].tolist() == [0.0]


def test_it_compiles_for_a_gpu_and_stores_16_bytes_at_a_time():
    """For real: the interpreter takes more than the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).resolve().parents[2] / "support" / "compile_triton_backward.py"
    environment["PYTHONPATH"] = str(script.parents[2])
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 4, run.stdout
