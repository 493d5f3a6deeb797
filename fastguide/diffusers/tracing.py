"""Trace the outputs of a pipeline's models, where the pipeline's own methods call them."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import diffusers
import torch
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from .scheduler_step import SchedulerStep
from .traced import Fusion, traced

_MODELS = ("unet", "transformer", "transformer_2", "image_unet", "prior", "decoder")
"""The names that pipelines have for what predicts."""


def trace_models(
    pipelines: Iterable[tuple[str, Any]], fusion: Fusion, hooks: list[Any], left_alone: dict[str, str]
) -> list[str]:
    """Trace the models whose guidance may go to a fused step.

    Args:
        pipelines: each with what its parts' names begin with.
        fusion: the pipelines' own, whose ``callers`` become their methods.
        hooks: to which each model's hook is added.
        left_alone: to which models that stay as they are, are added, with the reason.

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
            if isinstance(pipe, diffusers.DiTPipeline):
                left_alone[path + name] = "DiTPipeline combines parts of channels by itself; only its step is fused"
            else:
                wrapped = isinstance(model, torch._dynamo.OptimizedModule)  # which keeps no attributes of its own
                trace = functools.partial(_trace, fusion)
                hooks.append(model.register_forward_hook(trace) if wrapped else _Call(model, fusion))
                tried.append(path + name)
    return tried


class _Call:
    """Trace a model in the place where torch keeps what ``model.compile()`` made.

    A forward hook takes three times as long, and would be in the graph of a model that is compiled in place.
    """

    def __init__(self, model: torch.nn.Module, fusion: Fusion) -> None:
        before = model._compiled_call_impl
        self._model, self._before, self._fusion = model, before, fusion
        self._function: Callable[..., Any] = model._call_impl if before is None else before
        model._compiled_call_impl = self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the model's output, traced if a pipeline's own code asked for it."""
        output, fusion = self._function(*arguments, **keywords), self._fusion
        if not fusion.tries or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_tracing():
            return output
        frame = sys._getframe(2)  # who called Module.__call__
        return _traced(fusion, output, frame if id(frame.f_code) in fusion.callers else sys._getframe(1))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Call:
        """Trace the copy of the model, which has none of what ``model.compile()`` made."""
        return _Call(copy.deepcopy(self._model, memo), copy.deepcopy(self._fusion, memo))

    def remove(self) -> None:
        """Stop tracing; of several pipelines that share a model, each for itself."""
        self._fusion = _NEVER
        model = self._model
        while isinstance(model._compiled_call_impl, _Call) and model._compiled_call_impl._fusion is _NEVER:
            model._compiled_call_impl = model._compiled_call_impl._before


_NEVER = Fusion()
_NEVER.tries = False


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


def _trace(fusion: Fusion, module: torch.nn.Module, arguments: Any, output: Any) -> Any:
    """Return a model's output traced: a forward hook."""
    if not fusion.tries or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_tracing():
        return output
    return _traced(fusion, output, sys._getframe(_CALLER))


def _traced(fusion: Fusion, output: Any, frame: Any) -> Any:
    """Return a model's output, or the first of several, traced if a pipeline's own code is what called the model.

    ``frame``: of the caller, or of torch's functions between it and the model.
    """
    while id(frame.f_code) not in fusion.callers:
        if frame.f_back is None or not frame.f_globals.get("__name__", "").startswith("torch."):
            return output
        frame = frame.f_back  # through a wrapper, as torch.compile makes one
    kind = type(output)
    if kind is tuple and output:
        return (_of_first(output[0], fusion), *output[1:])
    if kind is Tensor:
        return traced(output, fusion)
    if isinstance(output, BaseOutput) and len(output):
        name = next(iter(output))
        setattr(output, name, _of_first(output[name], fusion))
    elif type(getattr(output, "sample", None)) is Tensor:
        output.sample = traced(output.sample, fusion)
    return output


def _of_first(first: Any, fusion: Fusion) -> Any:
    """Return a tensor traced, or each of a list of them, one a sample; anything else as it is."""
    if type(first) is Tensor:
        return traced(first, fusion)
    if type(first) is list and first and all(type(each) is Tensor for each in first):
        return [traced(each, fusion) for each in first]
    return first
