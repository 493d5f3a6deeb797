"""A pipeline's guidance, noted instead of computed: ``uncond + guidance_scale * (cond - uncond)`` of a model's output.

A pipeline that is accelerated gets its model's output as a ``Traced`` tensor. Halving that, and the three operations of
classifier-free guidance, are written down in a ``Guided`` tensor, which the scheduler's step takes apart. Any other
operation computes what was noted, with the pipeline's own operations, and goes on with a plain tensor.
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

    def __post_init__(self) -> None:
        self._versions = self._written()

    def _written(self) -> tuple[int, int]:
        return self.uncond._version, self.cond._version

    def output(self) -> Output:
        """What a step takes; refused if it is not what the model returned any more."""
        if self._written() != self._versions:
            raise RuntimeError(
                "the model's output was written to after guidance had been taken from it; "
                "fastguide.diffusers.restore() undoes the acceleration, which this pipeline does not bear"
            )
        return (self.uncond, self.cond) if self.whole is None else self.whole


class Traced(Tensor):
    """A model's output, or one of a pair of predictions: the same memory as the plain tensor."""

    _whole: Tensor | None
    _pair: Pair | None
    _half: int

    @classmethod
    def of(cls, output: Tensor) -> Tensor:
        """The output that may be halved, traced."""
        traced = output.as_subclass(cls)
        traced._whole, traced._pair = output, None
        return traced

    @classmethod
    def both(cls, pair: Pair) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional prediction, traced."""
        uncond, cond = pair.uncond.as_subclass(cls), pair.cond.as_subclass(cls)
        for half, traced in enumerate((uncond, cond)):
            traced._whole, traced._pair, traced._half = None, pair, half
        return uncond, cond

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        return _function(function, arguments, keywords or {})


class Guided(Tensor):
    """``scale * (cond - uncond)``, or, if ``complete``, that and ``uncond``: without memory of its own."""

    pair: Pair
    scale: Scale | None
    complete: bool
    _value: Tensor | None

    @staticmethod
    def __new__(cls, pair: Pair, scale: Scale | None, complete: bool) -> Guided:
        """A scale of None: not multiplied yet."""
        like = pair.uncond
        guided: Guided = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        guided.pair, guided.scale, guided.complete, guided._value = pair, scale, complete, None
        return guided

    def computed(self) -> Tensor:
        """What was noted, by the operations that were."""
        if self._value is None:
            self.pair.output()
            uncond, cond = self.pair.uncond, self.pair.cond
            value = cond - uncond if self.scale is None else self.scale * (cond - uncond)
            self._value = uncond + value if self.complete else value
        return self._value

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


def resolved(output: Tensor, sample: Tensor, guidance_scale: Any) -> tuple[Output, Any]:
    """A step's model output and guidance scale, with what was noted of them taken apart.

    Raises:
        TypeError: the output or the sample is no tensor.
    """
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
    if not isinstance(output, Tensor):
        hint = "; its .sample is one" if isinstance(getattr(output, "sample", None), Tensor) else ""
        hint = "; its [0] is one" if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else hint
        raise TypeError(f"model_output: expected a tensor, got {type(output).__name__}{hint}")
    if type(output) is Guided and output.complete and guidance_scale is None and output.shape == sample.shape:
        scale = 1.0 if output.scale is None else output.scale
        return output.pair.output(), scale.reshape(-1) if isinstance(scale, Tensor) else scale
    return _plain(output), guidance_scale


def _plain(value: Any) -> Any:
    if isinstance(value, Guided):
        return value.computed()
    return value.as_subclass(Tensor) if isinstance(value, Traced) else value


def _function(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    rule = _RULES.get(function)
    if rule is not None and not keywords:
        with torch._C.DisableTorchFunctionSubclass():
            noted = rule(*arguments)
        if noted is not None:
            return noted
    if function in _OF_METADATA:
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
    return Guided(pair, None, False) if in_order else None


def _scaled(first: Any, second: Any) -> Any:
    guided, scale = (first, second) if type(first) is Guided else (second, first)
    if type(guided) is not Guided or guided.complete or guided.scale is not None:
        return None
    if isinstance(scale, (Guided, Traced)):
        return None
    if isinstance(scale, Tensor):
        one_a_sample = (guided.shape[0], *[1] * (guided.dim() - 1))
        fits = not scale.requires_grad and (scale.dim() == 0 or tuple(scale.shape) == one_a_sample)
        fits = fits and scale.device == guided.device
        return Guided(guided.pair, scale, False) if fits and torch.result_type(scale, guided) == guided.dtype else None
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    return Guided(guided.pair, float(scale), False) if number else None


def _sum(first: Any, second: Any) -> Any:
    guided, prediction = (first, second) if type(first) is Guided else (second, first)
    if type(guided) is not Guided or guided.complete or getattr(prediction, "_pair", None) is not guided.pair:
        return None
    scale = 1.0 if guided.scale is None else guided.scale
    return Guided(guided.pair, scale + prediction._half, True)  # from the conditional one: the paper's own form


def _names(*names: str) -> list[Any]:
    return [getattr(where, name) for name in names for where in (torch, Tensor) if hasattr(where, name)]


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_names("chunk"), _halves),
    **dict.fromkeys(_names("sub", "__sub__", "subtract"), _difference),
    **dict.fromkeys(_names("mul", "__mul__", "__rmul__", "multiply"), _scaled),
    **dict.fromkeys(_names("add", "__add__", "__radd__"), _sum),
}
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad")
_OF_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES}
_OF_METADATA |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex}
