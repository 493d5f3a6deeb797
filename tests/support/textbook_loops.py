"""Whole sampling loops of the textbook's formulas: in float64 the truth, in a smaller dtype plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tests.support.step_inputs import errors
from tests.support.textbook import (
    ddim_step,
    ddpm_step,
    guided_original_and_epsilon,
    guided_prediction,
    inpainted,
    leading_timesteps,
    linear_alphas_cumprod,
    log_probability_gradient,
    noised,
)

Condition: TypeAlias = "Tensor | Mapping[str, Tensor] | None"
Scale: TypeAlias = "float | list[float]"
"""One for all samples, or one for each."""


@dataclass(frozen=True)
class Loop:
    """What a loop does, in the papers' terms: a linear schedule of 1000 timesteps, and what is done at some of them."""

    model: Callable[[torch.dtype], Callable[..., Tensor]]
    """The model that computes in a dtype."""
    solver: str
    """``ddim`` or ``ddpm``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the textbook's step: clip, eta, variance type."""
    model_dtype: torch.dtype | None = None
    """What the model computes in, and its input is rounded to; ``None``: as the loop."""
    steps: int = 6
    begin: int = 0
    """The first step; from 1 on, the loop starts from the image, if there is one, at that step's level."""
    conditions: list[Condition] = field(default_factory=lambda: [None])
    """Of each prediction: the unconditional one's first, if there are several."""
    scales: Callable[[int], Sequence[Scale]] = lambda step: ()
    """At a step, of each conditional prediction."""
    classifier: Callable[[Tensor, Tensor], Tensor] | None = None
    labels: Tensor | None = None
    classifier_scale: float = 0.0
    form: str | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    noise: list[Tensor] = field(default_factory=list)
    """Of the steps from ``begin`` on, except the last."""


@dataclass(frozen=True)
class States:
    """The first sample and the one after each step, and the x_0 that each step predicts."""

    samples: Tensor
    originals: Tensor


@torch.no_grad()
def run(loop: Loop, x_T: Tensor, dtype: torch.dtype) -> States:
    """Return a loop's states, with every operation outside of the model in ``dtype``."""
    timesteps = leading_timesteps(loop.steps)
    levels = [*linear_alphas_cumprod()[timesteps].tolist(), 1.0]
    model = loop.model(loop.model_dtype or dtype)
    image, mask, x_T = (None if given is None else given.to(dtype) for given in (loop.image, loop.mask, x_T))
    x = x_T if loop.begin == 0 or image is None else noised(image, x_T, levels[loop.begin])
    samples, originals = [x], []
    for step in range(loop.begin, loop.steps):
        a, a_prev = levels[step : step + 2]
        t = torch.full((len(x),), timesteps[step])
        m, v = _prediction_and_variance(loop, model, x, t, step)
        sg = None
        if loop.classifier is not None:
            sg = loop.classifier_scale * log_probability_gradient(loop.classifier, x, t, loop.labels)
        clip = loop.settings.get("clip")
        originals.append(guided_original_and_epsilon("epsilon", x, m, a, clip, loop.form, sg, False)[0])
        last = step == loop.steps - 1
        z = loop.noise[step - loop.begin].to(dtype) if loop.noise and not last else None
        if loop.solver == "ddpm":
            x = ddpm_step(x, m, a, a_prev, last=last, form=loop.form, sg=sg, v=v, z=z, **loop.settings)
        else:
            x = ddim_step(x, m, a, a_prev, form=loop.form, sg=sg, z=z, **loop.settings)
        if mask is not None:
            x = inpainted(x, image, mask, x_T, a_prev)
        samples.append(x)
    return States(torch.stack(samples), torch.stack(originals))


def _prediction_and_variance(
    loop: Loop, model: Callable[..., Tensor], x: Tensor, t: Tensor, step: int
) -> tuple[Tensor, Tensor | None]:
    """Return the guided prediction, and the learned variance, which is the conditional prediction's."""
    outputs = []
    for condition in loop.conditions:
        given = x.to(loop.model_dtype or x.dtype)
        if condition is None:
            output = model(given, t)
        elif isinstance(condition, Mapping):
            output = model(given, t, **condition)
        else:
            output = model(given, t, condition)
        outputs.append(output.to(x.dtype))
    variance = None
    if loop.settings.get("variance_type") == "learned_range":
        variance = outputs[-1].chunk(2, 1)[1]
        outputs = [output.chunk(2, 1)[0] for output in outputs]
    scales = [torch.tensor(scale, dtype=x.dtype).reshape(-1, 1, 1, 1) for scale in loop.scales(step)]
    return guided_prediction(outputs, scales), variance


def assert_loop(samples: Tensor, originals: Tensor, loop: Loop, x_T: Tensor) -> None:
    """Compare every state of a run with the truth; they are as exact as plain torch in the dtype of ``x_T``."""
    allowed = _Allowed(loop, x_T)
    assert samples.shape == allowed.truth.samples.shape
    assert originals.shape == allowed.truth.originals.shape
    for step in range(len(samples)):
        allowed.check("samples", step, samples[step])
    for step in range(len(originals)):
        allowed.check("originals", step, originals[step])


def assert_last(sample: Tensor, loop: Loop, x_T: Tensor) -> None:
    """Compare the sample that a run ends with, as ``assert_loop`` does."""
    _Allowed(loop, x_T).check("samples", -1, sample)


class _Allowed:
    """The truth, and the error that each of its states may have.

    Twice plain torch's root mean square, and, as the largest error is a noisy measure, eight times its largest; or one
    unit in the last place, where that is nearly exact. Float64's plain error is estimated from float32's. A model of
    its own dtype rounds: two loops whose inputs differ in their last digits part where these are next to a tie. Half
    of the difference that all its roundings make is allowed.
    """

    def __init__(self, loop: Loop, x_T: Tensor) -> None:
        self.truth = run(loop, x_T, torch.float64)
        self._plain = run(loop, x_T.float(), torch.float32)
        self._eps = torch.finfo(x_T.dtype).eps
        self._exact = None
        if loop.model_dtype is not None:
            rounded = loop.model(loop.model_dtype)
            exact = replace(loop, model=lambda dtype: copy.deepcopy(rounded).to(dtype), model_dtype=None)
            self._exact = run(exact, x_T, torch.float64)

    def check(self, name: str, step: int, got: Tensor) -> None:
        truth, plain = (getattr(states, name)[step] for states in (self.truth, self._plain))
        assert got.shape == truth.shape
        allowed = self._allowed(truth, plain)
        if self._exact is not None:
            roundings = errors(getattr(self._exact, name)[step], truth)
            allowed = tuple(max(a, r / 2) for a, r in zip(allowed, roundings, strict=True))
        found = errors(got, truth)
        assert found[0] <= allowed[0], f"{name}[{step}]: root mean square of the errors {found}, allowed {allowed}"
        assert found[1] <= allowed[1], f"{name}[{step}]: largest of the errors {found}, allowed {allowed}"

    def _allowed(self, truth: Tensor, plain: Tensor) -> tuple[float, ...]:
        factor = self._eps / torch.finfo(torch.float32).eps
        sizes = errors(truth, torch.zeros_like(truth))
        return tuple(
            max(times * factor * error, self._eps * size)
            for times, error, size in zip((2, 8), errors(plain, truth), sizes, strict=True)
        )
