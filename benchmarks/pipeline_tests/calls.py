"""Accelerate a pipeline at each of its calls, and compare the call with a plain one from the same state."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from fastguide.diffusers import accelerate, restore

from .compare import copied, difference, varies
from .plain_steps import MODELS, StepCounter, rounding, steps_wrapped

Record = dict[str, Any]
_LARGE = 1e-4
"""The difference of outputs from which on it is seen whether rounding explains it."""
_DECODERS = ("vae", "audio_vae", "vqvae", "vqgan", "movq")
"""The names that pipelines have for what makes images, videos and sound of latents."""
_DRAWS = 4
"""How many plain calls with rounded samples are made for that: one in ten is several times as far off as the others."""


class Calls:
    """What a pipeline's call becomes: an accelerated one, and a record of it."""

    def __init__(self, compares: bool, record: Callable[[Record], None]) -> None:
        self._compares, self._record = compares, record
        self._within = False
        self._filled: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def watch(self) -> None:
        """Watch the calls of all pipeline classes, those of modules that are not yet imported too."""
        base: Any = diffusers.DiffusionPipeline
        pending = [base]
        while pending:
            cls = pending.pop()
            pending.extend(cls.__subclasses__())
            self.watch_class(cls)
        before = base.__init_subclass__

        def of_subclass(cls: Any, /, **keywords: Any) -> None:
            before(**keywords)
            self.watch_class(cls)

        base.__init_subclass__ = classmethod(of_subclass)

    def watch_class(self, cls: Any) -> None:
        """Watch the calls of one class, unless they are watched already or are those of another."""
        call = cls.__dict__.get("__call__")
        if call is None or hasattr(call, "watched_by"):
            return

        @functools.wraps(call)
        def watched(pipe: Any, *arguments: Any, **keywords: Any) -> Any:
            if self._within:  # of a combined pipeline, which is accelerated with those within it
                return call(pipe, *arguments, **keywords)
            self._within = True
            try:
                return self._accelerated(pipe, functools.partial(call, pipe), arguments, keywords)
            finally:
                self._within = False

        vars(watched)["watched_by"] = self
        cls.__call__ = watched

    def _accelerated(self, pipe: Any, call: Callable[..., Any], arguments: Any, keywords: Any) -> Any:
        record: Record = {"pipeline": type(pipe).__name__, "bits": _bits(pipe)}
        with contextlib.suppress(ValueError):  # it was not accelerated yet
            restore(pipe)
        kept = _Kept(arguments, keywords)
        if self._compares:
            self._fill(pipe)
            plain, error, steps = kept.plain(pipe, call)
            record["plain_steps"] = {"made": steps.made, "guided": steps.guided}
        done = accelerate(pipe)
        before = Counter(done.counts)
        output, found = None, None
        try:
            with _decoded(pipe) as latents:
                output = call(*arguments, **keywords)
        except Exception as raised:
            found = raised
            raise
        finally:
            record |= {"counts": dict(done.counts - before), "computed": dict(done.computed)}
            record |= {"left_alone": done.left_alone, "tried": done.tried}
            if self._compares and (error is not None or found is not None):
                record["errors"] = [_described(error), _described(found)]
            elif self._compares:
                made = output, latents
                record |= {"difference": difference(plain, made), "varies": varies(made)}
                if record["difference"] > _LARGE:
                    restore(pipe)
                    record["rounding"] = kept.rounding(pipe, call, plain)
                    accelerate(pipe)
            self._record(record)
        return output

    def _fill(self, pipe: Any) -> None:
        """Draw the weights that begin as zeros or as the memory was, so that the outputs depend on the inputs."""
        for model in vars(pipe).values():
            if isinstance(model, torch.nn.Module) and model not in self._filled:
                self._filled.add(model)
                generator = torch.Generator().manual_seed(0)
                for weights in model.parameters():
                    if weights.is_floating_point() and weights.device.type == "cpu" and weights.numel():
                        _draw(weights.detach(), generator)


def _bits(pipe: Any) -> int:
    """Return the bits of the narrowest number that a pipeline's models have weights in."""
    models = (each for each in vars(pipe).values() if isinstance(each, torch.nn.Module))
    kinds = {weights.dtype for model in models for weights in model.parameters() if weights.is_floating_point()}
    return min((torch.finfo(kind).bits for kind in kinds), default=32)


def _draw(weights: torch.Tensor, generator: torch.Generator) -> None:
    """Draw a matrix of zeros, and whatever is not finite."""
    is_matrix = weights.dim() > 1
    if (is_matrix and not weights.any()) or not weights.float().isfinite().all():
        drawn = torch.randn(weights.shape, generator=generator) * (weights[0].numel() if is_matrix else 1) ** -0.5
        weights.copy_(drawn.to(weights.dtype))


class _Kept:
    """What a call starts from: copies of its arguments, and the states of the generators that all share."""

    def __init__(self, arguments: Any, keywords: Any) -> None:
        self._arguments, self._keywords = copied(arguments), copied(keywords)
        self._states = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def plain(self, pipe: Any, call: Callable[..., Any]) -> tuple[Any, Exception | None, StepCounter]:
        """Call the pipeline with copies of its schedulers, and leave all random numbers for the next call.

        Returns:
            The output with what was decoded for it, the error, and the steps that were made.
        """
        counter = StepCounter()
        with _copied_schedulers(pipe) as schedulers, counter.watching(schedulers, _models(pipe)):
            output, error = self._called(pipe, call)
        return output, error, counter

    def rounding(self, pipe: Any, call: Callable[..., Any], plain: Any) -> float:
        """Call it likewise, with each sample that a scheduler gets changed by as much as rounding does.

        Returns:
            The largest difference of the outputs to that of the plain call; 0 if a call fails.
        """
        found = 0.0
        for seed in range(_DRAWS):
            with _copied_schedulers(pipe) as schedulers, steps_wrapped(schedulers, functools.partial(rounding, seed)):
                rounded, error = self._called(pipe, call)
            found = max(found, difference(plain, rounded)) if error is None else found
        return found

    def _called(self, pipe: Any, call: Callable[..., Any]) -> tuple[Any, Exception | None]:
        self._set_states()
        try:
            with _decoded(pipe) as latents:
                return (call(*copied(self._arguments), **copied(self._keywords)), latents), None
        except Exception as error:
            return None, error
        finally:
            self._set_states()

    def _set_states(self) -> None:
        torch.set_rng_state(self._states[0])
        np.random.set_state(self._states[1])
        random.setstate(self._states[2])


@contextlib.contextmanager
def _decoded(pipe: Any) -> Iterator[list[Any]]:
    """Keep what a pipeline's decoders are given, and yield it: it says more than what a decoder at its limits makes."""
    latents: list[Any] = []

    def watched(decode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(decode)
        def keeping(*arguments: Any, **keywords: Any) -> Any:
            latents.append(copied((*arguments, *keywords.values())[0]))
            return decode(*arguments, **keywords)

        return keeping

    decoders = {id(each): each for part in _pipelines(pipe) for name in _DECODERS if (each := vars(part).get(name))}
    with contextlib.ExitStack() as stack:
        for decoder in decoders.values():
            stack.enter_context(mock.patch.object(decoder, "decode", watched(decoder.decode)))
        yield latents


@contextlib.contextmanager
def _copied_schedulers(pipe: Any) -> Iterator[list[Any]]:
    """Put copies in the places of a pipeline's schedulers, and yield them."""
    parts = _pipelines(pipe)
    places = [(part, name, each) for part in parts for name, each in vars(part).items() if _is_scheduler(each)]
    try:
        for part, name, scheduler in places:
            setattr(part, name, copy.deepcopy(scheduler))
        yield [getattr(part, name) for part, name, _ in places]
    finally:
        for part, name, scheduler in places:
            setattr(part, name, scheduler)


def _pipelines(pipe: Any) -> list[Any]:
    """Return a pipeline and those within it."""
    return [pipe, *(each for each in vars(pipe).values() if isinstance(each, diffusers.DiffusionPipeline))]


def _models(pipe: Any) -> list[torch.nn.Module]:
    """Return the models that predict, of a pipeline and of those within it, each once."""
    models = (getattr(part, name, None) for part in _pipelines(pipe) for name in MODELS)
    return list({id(model): model for model in models if isinstance(model, torch.nn.Module)}.values())


def _is_scheduler(each: Any) -> bool:
    return isinstance(each, diffusers.SchedulerMixin)


def _described(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {str(error)[:300]}"
