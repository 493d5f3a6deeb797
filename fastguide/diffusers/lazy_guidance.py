"""Compute tensors only when they are used: a pipeline's guidance, and the x_0 that a step predicts.

A pipeline that is accelerated gets its model's output as a ``Traced`` tensor. Halving that, and the three operations of
classifier-free guidance, ``uncond + guidance_scale * (cond - uncond)``, give a ``Guided`` tensor, which the scheduler's
step takes apart. Any other operation computes what was deferred, with the pipeline's own operations, and goes on with a
plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Scale = float | Tensor
Output = Tensor | tuple[Tensor, Tensor]
"""A model's output: one tensor, or the unconditional and the conditional prediction."""


@dataclass(eq=False)
class Pair:
    """Two predictions, and the tensor that holds both, ``[uncond, cond]``, if one does."""

    uncond: Tensor
    cond: Tensor
    whole: Tensor | None = None

    def versions(self) -> tuple[int, int]:
        """Return both tensors' version counters."""
        return self.uncond._version, self.cond._version

    def output(self) -> Output:
        """Return the model output as a scheduler's ``step`` takes it."""
        return (self.uncond, self.cond) if self.whole is None else self.whole


class Traced(Tensor):
    """A model's output, or one of a pair of predictions: the same memory as the plain tensor."""

    _whole: Tensor | None
    _pair: Pair | None
    _half: int

    @classmethod
    def of(cls, output: Tensor) -> Tensor:
        """Return a model's output, traced."""
        traced = output.as_subclass(cls)
        traced._whole, traced._pair = output, None
        return traced

    @classmethod
    def both(cls, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return the unconditional and the conditional prediction, traced."""
        uncond, cond = pair.uncond.as_subclass(cls), pair.cond.as_subclass(cls)
        for half, traced in enumerate((uncond, cond)):
            traced._whole, traced._pair, traced._half = None, pair, half
        return uncond, cond

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        return _function(function, arguments, keywords or {})


class Deferred(Tensor):
    """A tensor without memory, until something but its shape, dtype and device is asked for."""

    _value: Tensor | None

    @classmethod
    def like(cls, tensor: Tensor) -> Any:
        """Return a placeholder with the shape, dtype and device of a tensor."""
        deferred: Any = Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        deferred._value = None
        return deferred

    def _compute(self) -> Tensor:
        """Return what was deferred; each subclass has its own."""
        raise NotImplementedError(type(self).__name__)

    def computed(self) -> Tensor:
        """Return the tensor itself."""
        if self._value is None:
            self._value = self._compute()
            self._version_computed = self._value._version if not self._value.is_inference() else 0
        return self._value

    def is_unchanged(self) -> bool:
        """Tell whether nothing has been written to it since it was computed."""
        value = self._value
        return value is None or (not value.is_inference() and value._version == self._version_computed)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        return _function(function, arguments, keywords or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        return function(*tree_map(_plain, arguments), **tree_map(_plain, keywords or {}))


class DeferredCall(Deferred):
    """A function's result."""

    _function: Callable[[], Tensor]

    @classmethod
    def of(cls, like: Tensor, function: Callable[[], Tensor]) -> Any:
        """Return a placeholder for a function's result, with the shape, dtype and device of another tensor."""
        deferred: Any = cls.like(like)
        deferred._function = function
        return deferred

    def _compute(self) -> Tensor:
        return self._function()


class Guided(Deferred):
    """``scale * (cond - uncond)``, or, if ``complete``, that and ``uncond``."""

    pair: Pair
    scale: Scale | None
    complete: bool
    _versions: tuple[int, int]

    @classmethod
    def of_pair(cls, pair: Pair, scale: Scale | None, complete: bool, part: Guided | None = None) -> Guided:
        """Defer guidance of two predictions.

        ``scale``: ``None`` until the difference is multiplied; ``part``: the guidance that this one is made of.
        """
        guided: Guided = cls.like(pair.uncond)
        guided.pair, guided.scale, guided.complete = pair, scale, complete
        guided._versions = pair.versions() if part is None else part._versions
        return guided

    def output(self) -> Output:
        """Return the pair for a step, as it was when guidance was taken from it.

        Raises:
            RuntimeError: it has been written to since.
        """
        if self.pair.versions() != self._versions:
            raise RuntimeError(
                "the model's output was written to after guidance had been taken from it: expected plain tensors for "
                "that, as without fastguide.diffusers.accelerate() or a guider of fastguide's"
            )
        return self.pair.output()

    def _compute(self) -> Tensor:
        self.output()
        uncond, cond = self.pair.uncond, self.pair.cond
        value = cond - uncond if self.scale is None else self.scale * (cond - uncond)
        return uncond + value if self.complete else value


def resolved(output: Tensor, sample: Tensor, guidance_scale: Any) -> tuple[Output, Any]:
    """Return a step's model output and guidance scale; deferred guidance is taken apart into both.

    Raises:
        TypeError: the output or the sample is no tensor.
    """
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
    if not isinstance(output, Tensor):
        hint = "; its .sample is one" if isinstance(getattr(output, "sample", None), Tensor) else ""
        hint = "; its [0] is one" if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else hint
        raise TypeError(f"model_output: expected a tensor, got {type(output).__name__}{hint}")
    if guidance_scale is None and _is_complete(output) and output.shape == sample.shape:
        assert isinstance(output, Guided)
        scale = 1.0 if output.scale is None else output.scale
        return output.output(), scale.reshape(-1) if isinstance(scale, Tensor) else scale
    return _plain(output), guidance_scale


def _is_complete(output: Tensor) -> bool:
    return type(output) is Guided and output.complete and output.is_unchanged()


def _plain(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.computed()
    return value.as_subclass(Tensor) if isinstance(value, Traced) else value


def _function(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    rule = _RULES.get(function)
    if rule is not None and not keywords:
        with torch._C.DisableTorchFunctionSubclass():
            deferred = rule(*arguments)
        if deferred is not None:
            return deferred
    if function in _METADATA or (function in _AUTOGRAD and type(arguments[0]) is Traced):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **keywords)
    return function(*tree_map(_plain, arguments), **tree_map(_plain, keywords))


def _halves(output: Any, count: Any = None, dim: Any = 0) -> Any:
    whole = getattr(output, "_whole", None)
    if whole is not None and count == 2 and dim == 0 and len(whole) % 2 == 0:
        uncond, cond = whole.chunk(2)
        return Traced.both(Pair(uncond, cond, whole))
    return None


def _difference(cond: Any, uncond: Any) -> Any:
    pair = getattr(cond, "_pair", None)
    same = getattr(uncond, "_pair", None) is pair
    if not isinstance(pair, Pair) or not same:
        return None
    in_order = (cond._half, uncond._half) == (1, 0) and pair.cond.dtype == pair.uncond.dtype
    return Guided.of_pair(pair, None, False) if in_order else None


def _scaled(first: Any, second: Any) -> Any:
    guided, scale = (first, second) if type(first) is Guided else (second, first)
    if type(guided) is not Guided or guided.complete or guided.scale is not None or not guided.is_unchanged():
        return None
    if isinstance(scale, (Deferred, Traced)):
        return None
    if isinstance(scale, Tensor):
        one_a_sample = (guided.shape[0], *[1] * (guided.dim() - 1))
        fits = not scale.requires_grad and (scale.dim() == 0 or tuple(scale.shape) == one_a_sample)
        fits = fits and scale.device == guided.device
        if not fits or torch.result_type(scale, guided) != guided.dtype:
            return None
        return Guided.of_pair(guided.pair, scale, False, guided)
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    return Guided.of_pair(guided.pair, float(scale), False, guided) if number else None


def _sum(first: Any, second: Any) -> Any:
    guided, prediction = (first, second) if type(first) is Guided else (second, first)
    if type(guided) is not Guided or guided.complete or getattr(prediction, "_pair", None) is not guided.pair:
        return None
    if not guided.is_unchanged():
        return None
    scale = 1.0 if guided.scale is None else guided.scale
    scale = scale + prediction._half  # from the conditional one: the paper's own form
    return Guided.of_pair(guided.pair, scale, True, guided)


def _names(*names: str) -> list[Any]:
    return [getattr(where, name) for name in names for where in (torch, Tensor) if hasattr(where, name)]


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_names("chunk"), _halves),
    **dict.fromkeys(_names("sub", "__sub__", "subtract"), _difference),
    **dict.fromkeys(_names("mul", "__mul__", "__rmul__", "multiply"), _scaled),
    **dict.fromkeys(_names("add", "__add__", "__radd__"), _sum),
}
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad")
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES}
_METADATA |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex}
_AUTOGRAD = {Tensor.requires_grad_, *(getattr(Tensor, name).__set__ for name in ("requires_grad", "data"))}
