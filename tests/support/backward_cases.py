"""Steps of every kind whose gradients are compared: what autograd calls a backward pass with, on any device."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, History, Inpainting, StepTable
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.backward import Gradients
from fastguide.step.operator import StepArguments
from tests.step.test_gradients import SCHEDULE

CLIPPED = fastguide.ddpm(SCHEDULE, 6, clip_sample_range=1.0)
LEARNED = fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range", clip_sample_range=1.0)
MULTISTEP = fastguide.dpm_solver(SCHEDULE, 6, algorithm_type="sde-dpmsolver++")
_ONES = torch.ones(4, dtype=torch.float64)
ALONE = StepTable.from_columns(torch.arange(4).flip(0), {"out_noise": 0.5 * _ONES, "out_sample": _ONES})
CASES = {  # table, form of the classifier's gradient, predictions, index, dtypes of state and model
    "no clip": (fastguide.ddim(SCHEDULE, 6), None, 2, 3, torch.float32, torch.float32),
    "clipped, rows of their own": (CLIPPED, "mean", 3, torch.tensor([1, 3]), torch.float32, torch.bfloat16),
    "learned variance": (LEARNED, "mean", 1, torch.tensor([4, 0]), torch.float32, torch.float32),
    "history": (MULTISTEP, "epsilon", 2, 2, torch.float32, torch.float16),
    "anchor": (fastguide.heun(SCHEDULE, 6), "epsilon", 5, 3, torch.float32, torch.float32),
    "16 bits": (CLIPPED, None, 2, 3, torch.bfloat16, torch.bfloat16),
    "no prediction": (ALONE, None, 0, 2, torch.float16, torch.float16),
}
SHAPES = {"less than a vector": (2, 5), "ragged": (2, 3, 9, 43), "vectors": (2, 4, 24, 12), "whole tiles": (2, 2048)}


def gradients_of(name, shape, backend, device="cpu"):
    """Return the gradients of all inputs of a step in the middle of a loop."""
    table, form, count, index, state, dtype = CASES[name]
    table = table.to(device)
    index = index.to(device) if isinstance(index, torch.Tensor) else index
    generator = torch.Generator().manual_seed(0)
    inputs = []

    def draw(dtype=state):
        inputs.append((0.7 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_())
        return inputs[-1]

    def numbers(*values):
        inputs.append(torch.tensor(values, device=device, requires_grad=True))
        return inputs[-1]

    scales = [numbers(1.5, -2.0) for _ in range(max(count - 1, 0))]
    guidance = ClassifierFree(*scales) if count == 2 else Composed(scales) if count > 2 else None
    options = {}
    if form is not None:
        of_classifier = Classifier(None, numbers(0.5, -1.0), form)
        guidance = of_classifier if guidance is None else guidance + of_classifier
        options["gradient"] = draw()
    options |= {"noise": draw()} if table.adds_noise_anywhere else {}
    options |= {"variance": draw(dtype)} if table.learned_variance else {}
    x, original = draw(), torch.empty(shape, dtype=state, device=device)
    if table.history_slots:
        history = History(table, x)
        entries = torch.randn(history.entries.shape, generator=generator).to(device).requires_grad_()
        inputs.append(entries)
        options |= {"history": history.continued(entries.clone(), index), "anchor": draw()}
    elif form is not None:
        mask = torch.rand(shape, generator=generator).round(decimals=1).to(device)
        options["inpainting"] = Inpainting(mask, draw(), draw())
    predictions = [draw(dtype) for _ in range(count)]
    y = fastguide.guided_step(table, index, x, predictions, guidance, original=original, backend=backend, **options)
    loss = (y * torch.randn(shape, generator=generator).to(device)).sum() + original.square().sum()
    if "history" in options:
        loss = loss + options["history"].entries.square().sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def backward_call(name, shape):
    """Return what the native backend's backward pass is called with, and has filled."""
    native, found = BACKENDS["native"], []

    def remember(*arguments, **gradients):
        found.append((StepArguments(*arguments), Gradients(**gradients)))
        native.backward(*arguments, **gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "native", native._replace(backward=remember))
        gradients_of(name, shape, "native")
    (call,) = found
    return call
