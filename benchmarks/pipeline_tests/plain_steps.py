"""Watch the steps of a plain call: count them and those with guidance, or round their samples anew.

Steps are watched in the schedulers' classes, not in the schedulers: some pipelines copy theirs, and a copy's step has
to be its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

MODELS = ("unet", "transformer", "transformer_2", "image_unet", "prior", "decoder")
"""The names that pipelines have for what predicts."""
_STEPS = ("step", "step_pred", "batch_step_no_noise")
"""The names that schedulers have for what leads from one timestep to another."""
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class StepCounter:
    """Counts the steps of schedulers, and those whose predictions are more than their samples.

    It knows nothing of how fastguide traces: a step has guidance if the models have predicted for a larger batch than
    the sample's, in one call or in several, since the step before; or if the halves of a prediction differ and those of
    the model output do not, as DiT's, whose sample is there twice. It has none if its model output is zero, as a
    pipeline gives it that wants a scheduler to go on and no sample.
    """

    def __init__(self) -> None:
        self.made = 0
        """The steps."""
        self.guided = 0
        """Those of several predictions."""
        self._predicted = 0
        self._halves_differ = False
        self._is_over = True

    @contextlib.contextmanager
    def watching(self, schedulers: Iterable[Any], models: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Count the steps of these schedulers and of their copies, and the predictions of these models."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(steps_wrapped(schedulers, self._counting))
            for model in models:
                stack.callback(model.register_forward_hook(self._predict).remove)
            yield

    def _predict(self, model: torch.nn.Module, arguments: Any, output: Any) -> None:
        """Add the batch of what a model predicted: the first dimension, or the length of a list.

        A call that fills a cache of keys and values, as AnyFlow's before each chunk of frames, predicts None.
        """
        if self._is_over:
            self._predicted, self._halves_differ, self._is_over = 0, False, False
        if not isinstance(output, torch.Tensor):
            output = output.sample if hasattr(output, "sample") else output[0]
        if output is not None:
            self._predicted += len(output)
            self._halves_differ |= isinstance(output, torch.Tensor) and _are_halves_equal(output) is False

    def _counting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(step)

        @functools.wraps(step)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            given = signature.bind(*arguments, **keywords).arguments
            self.made += 1
            output = given["model_output"]
            is_there_twice = self._halves_differ and _are_halves_equal(output) is True
            self.guided += (is_there_twice or self._predicted > len(given["sample"])) and bool(output.any())
            self._is_over = True
            return step(*arguments, **keywords)

        return counted


def _are_halves_equal(output: torch.Tensor) -> bool | None:
    """Tell whether the halves of a batch are equal; ``None``: it has none."""
    return None if len(output) % 2 else torch.equal(*output.chunk(2))


def rounding(seed: int, step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a scheduler's step that changes each sample by as much as rounding does, to see what becomes of it."""
    signature, generator = inspect.signature(step), torch.Generator().manual_seed(seed)

    @functools.wraps(step)
    def rounded(*arguments: Any, **keywords: Any) -> Any:
        given = signature.bind(*arguments, **keywords)
        sample = given.arguments["sample"]
        apart = torch.randn(sample.shape, generator=generator) * torch.finfo(sample.dtype).eps / 2
        given.arguments["sample"] = (sample * (1 + apart)).to(sample.dtype)
        return step(*given.args, **given.kwargs)

    return rounded


@contextlib.contextmanager
def steps_wrapped(schedulers: Iterable[Any], wrap: Wrap) -> Iterator[None]:
    """Wrap the steps of these schedulers' classes; a step that another makes is part of that one."""
    within = False

    def outermost(step: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = wrap(step)

        @functools.wraps(step)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            nonlocal within
            if within:
                return step(*arguments, **keywords)
            within = True
            try:
                return wrapped(*arguments, **keywords)
            finally:
                within = False

        return watched

    with contextlib.ExitStack() as stack:
        for kind in {type(scheduler) for scheduler in schedulers}:
            for name in _STEPS:
                if hasattr(kind, name):
                    stack.callback(_put_back, kind, name, vars(kind).get(name))
                    setattr(kind, name, outermost(getattr(kind, name)))
        yield


def _put_back(kind: type, name: str, before: Any) -> None:
    """Give a class its own step back, or leave it to the class that it is derived from."""
    if before is None:
        delattr(kind, name)
    else:
        setattr(kind, name, before)
