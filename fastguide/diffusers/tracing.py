"""Trace the outputs of a pipeline's models, where the pipeline's own methods call them."""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import CodeType
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, is_grad_enabled
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling

from .scheduler_step import SchedulerStep
from .traced import Fusion, traced

_MODELS = ("unet", "transformer", "transformer_2", "image_unet", "prior", "decoder")
"""The names that pipelines have for what predicts."""


def trace_models(pipelines: Iterable[tuple[str, Any]], fusion: Fusion, traces: list[Traces]) -> list[str]:
    """Trace the models whose guidance may go to a fused step.

    Args:
        pipelines: each with what its parts' names begin with.
        fusion: the pipelines' own, whose ``callers`` become their methods.
        traces: to which those of each model are added.

    Returns:
        The names of the models that are traced.
    """
    tried = []
    seen: set[int] = set()
    for path, pipe in pipelines:
        if not any(isinstance(part, SchedulerStep) for part in vars(pipe).values()):
            continue
        fusion.callers.update(_methods(pipe))
        for name in _MODELS:
            model = getattr(pipe, name, None)
            if not isinstance(model, torch.nn.Module) or id(model) in seen:
                continue
            seen.add(id(model))
            traces.append(_watch_of(model).trace(model, fusion))
            tried.append(path + name)
    return tried


class Traces:
    """One pipeline's part in the tracing of a model; when it is gone, the model is traced for the others alone."""

    def __init__(self, watch: _Watch, model: torch.nn.Module, fusion: Fusion) -> None:
        self._watch, self._model, self.fusion = watch, weakref.ref(model), fusion
        watch.traces.append(weakref.ref(self))
        weakref.finalize(self, _leave_unless_watched, watch, self._model).atexit = False

    def remove(self) -> None:
        """Stop tracing for this pipeline."""
        self._watch.traces = [other for other in self._watch.traces if other() is not self]
        _leave_unless_watched(self._watch, self._model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Traces:
        """Trace the copy of the model for the copy of the pipeline."""
        model = copy.deepcopy(self._model(), memo)
        assert model is not None
        return _watch_of(model).trace(model, copy.deepcopy(self.fusion, memo))


def _leave_unless_watched(watch: _Watch, model: weakref.ref[torch.nn.Module]) -> None:
    """Leave a model as it was if nobody traces it any more."""
    watch.traces = [each for each in watch.traces if each() is not None]
    left = model()
    if left is not None and not watch.traces:
        watch.leave(left)


class _Watch(ABC):
    """What watches a model's calls, for all pipelines that have it."""

    def __init__(self) -> None:
        self.traces: list[weakref.ref[Traces]] = []

    def trace(self, model: torch.nn.Module, fusion: Fusion) -> Traces:
        """Trace the model for one more pipeline."""
        return Traces(self, model, fusion)

    @abstractmethod
    def leave(self, model: torch.nn.Module) -> None:
        """Leave the model as it was."""

    def traced(self, output: Any, frame: Any) -> Any:
        """Return a model's output, traced if the code of a pipeline asked for it.

        ``frame``: of the caller, or of torch's functions between it and the model.
        """
        if is_grad_enabled() or is_compiling() or is_tracing():
            return output
        while True:
            code, tries, newest = id(frame.f_code), False, None
            for each in self.traces:
                traces = each()
                if traces is not None and traces.fusion.tries:
                    tries = True
                    if code in traces.fusion.callers and (newest is None or traces.fusion.run > newest.run):
                        newest = traces.fusion
            if newest is not None:
                return _with_traced(output, newest)
            if not tries or frame.f_back is None or not frame.f_globals.get("__name__", "").startswith("torch."):
                return output
            frame = frame.f_back  # through a wrapper, as torch.compile makes one


class _Call(_Watch):
    """Watch a model from the place where torch keeps what ``model.compile()`` made.

    A forward hook takes three times as long, and would be in the graph of a model that is compiled in place.
    """

    def watch(self, model: torch.nn.Module) -> _Call:
        """Take the place of the model's call."""
        self._model, self._before = weakref.ref(model), model._compiled_call_impl
        model._compiled_call_impl = self
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the model's output, traced if a pipeline's own code asked for it."""
        if self._before is None:
            model = self._model()
            assert model is not None  # whose call this is
            output = model._call_impl(*arguments, **keywords)
        else:
            output = self._before(*arguments, **keywords)
        return self.traced(output, sys._getframe(2))  # who called Module.__call__

    def leave(self, model: torch.nn.Module) -> None:
        """Leave the model as it was."""
        if model._compiled_call_impl is self:
            model._compiled_call_impl = self._before


class _Hook(_Watch):
    """Watch a compiled model that wraps another by a forward hook, as it keeps no attributes of its own."""

    def watch(self, model: torch.nn.Module) -> _Hook:
        """Become a hook of the model."""
        self._handle = model.register_forward_hook(self)
        return self

    def __call__(self, module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        """Return the model's output, traced if a pipeline's own code asked for it."""
        return self.traced(output, sys._getframe(_CALLER))

    def leave(self, model: torch.nn.Module) -> None:
        """Leave the model as it was."""
        self._handle.remove()


def _watch_of(model: torch.nn.Module) -> _Watch:
    """Return what watches a model, a new one if nothing does."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        hooks = [hook for hook in model._forward_hooks.values() if isinstance(hook, _Hook)]
        return hooks[0] if hooks else _Hook().watch(model)
    call = model._compiled_call_impl
    return call if isinstance(call, _Call) else _Call().watch(model)


def _methods(pipe: Any) -> dict[int, CodeType]:
    """Return the code of a pipeline's own methods, by identity, as the hash of code takes long."""
    members = (member for cls in type(pipe).__mro__ for member in vars(cls).values())
    functions = (inspect.unwrap(getattr(member, "__func__", member)) for member in members)
    return {id(f.__code__): f.__code__ for f in functions if inspect.isfunction(f)}


def _frames_to_caller() -> int:
    """Return how many of Python's frames are between a module's forward hook and who calls the module."""
    module, here, frames = torch.nn.Identity(), sys._getframe(0), []

    def hook(*_: Any) -> None:
        frame: Any = sys._getframe(0)
        while frame is not here:
            frames.append(frame)
            frame = frame.f_back

    module.register_forward_hook(hook)
    module(None)
    return len(frames)


_CALLER = _frames_to_caller()  # to ask for the frames between them would take 10 us at each call


def _with_traced(output: Any, fusion: Fusion) -> Any:
    """Return a model's output, traced: all tensors of a tuple, or the first of another output."""
    kind = type(output)
    if kind is tuple and len(output) == 1 and type(output[0]) is Tensor:
        return (traced(output[0], fusion),)
    if kind is tuple and output:
        return (_of_first(output[0], fusion), *[_of_tensor(each, fusion) for each in output[1:]])
    if kind is Tensor:
        return traced(output, fusion)
    if isinstance(output, BaseOutput) and len(output):
        name = next(iter(output))
        setattr(output, name, _of_first(output[name], fusion))
    elif type(getattr(output, "sample", None)) is Tensor:
        output.sample = traced(output.sample, fusion)
    return output


def _of_tensor(each: Any, fusion: Fusion) -> Any:
    return traced(each, fusion) if type(each) is Tensor else each


def _of_first(first: Any, fusion: Fusion) -> Any:
    """Return a tensor traced, or each of a list of them, one a sample; anything else as it is."""
    if type(first) is Tensor:
        return traced(first, fusion)
    if type(first) is list and first and all(type(each) is Tensor for each in first):
        samples = [traced(each, fusion) for each in first]
        for sample in samples:
            sample.source.alone = True
        return samples
    return first
