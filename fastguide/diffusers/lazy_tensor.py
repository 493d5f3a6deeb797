"""Stand for a tensor of a pipeline's, which is computed only when more than its shape, dtype and device is asked for.

A subclass of ``Tensor`` would do the same, for ten times the price: torch spends 2 us on an empty one, and 9 us on each
function that one is given to. So this is an object of Python's own, which answers torch's functions, operators and
attributes as the tensor does. It is no ``Tensor`` for ``isinstance``, because C++ would believe that and read another
type's memory; so it is given to the code of pipelines alone, which does not ask.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

_OWN = frozenset(("__torch_function__", "__torch_dispatch__", "__deepcopy__"))
_COMPARED = frozenset(("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"))
_OF_OBJECTS = frozenset(vars(object)) - _COMPARED - {"__repr__", "__format__", "__reduce__", "__reduce_ex__"}


class LazyTensor:
    """Stand for a tensor; a subclass says what it is like, and computes it."""

    __slots__ = ("__weakref__", "_value")
    __array_priority__ = Tensor.__array_priority__  # numpy's numbers leave their operators to it
    rules: ClassVar[dict[Any, Callable[..., Any]]] = {}
    """torch's functions that need not compute it, with what is called in their place."""
    take_dim: ClassVar[set[Any]] = set()
    """Those of them that take ``dim=`` as well."""
    take_keywords: ClassVar[set[Any]] = set()
    """Those of them that take any keywords."""

    _value: Tensor | None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # a tensor's, which are set below

    def like(self) -> Tensor:
        """Return a tensor of the same shape, dtype and device."""
        raise NotImplementedError(type(self).__name__)

    def _compute(self) -> Tensor:
        raise NotImplementedError(type(self).__name__)

    def computed(self, by: str = "") -> Tensor:
        """Return the tensor itself, the same one each time; ``by``: the operation that asks."""
        value = self._value
        if value is None:
            value = self._value = self._compute()
        return value

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        rule = cls.rules.get(function) if arguments else None  # rules take what they are of by its position
        if rule is not None and (
            not keywords or function in cls.take_keywords or (function in cls.take_dim and keywords.keys() == {"dim"})
        ):
            return rule(*arguments, **(keywords or {}))
        name = getattr(function, "__name__", str(function)).strip("_")
        return function(*plain(arguments, name), **plain(keywords or {}, name))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.computed("deepcopy").__deepcopy__(memo)
        return copied


def plain(value: Any, by: str = "") -> Any:
    """Return a value, or a list, tuple or dictionary of them, with tensors in the place of lazy ones.

    ``by``: the operation that asks for them.
    """
    kind = type(value)
    if kind is Tensor or value is None:
        return value
    if issubclass(kind, LazyTensor):
        return value.computed(by)
    if kind is tuple or kind is list:
        return kind([plain(element, by) for element in value])
    return {name: plain(element, by) for name, element in value.items()} if kind is dict else value


# ---- What is answered without computing it, and the operators, which Python looks up in the class ----


def _of_like(name: str) -> property:
    return property(lambda self: getattr(self.like(), name))


def _of_computed(name: str) -> property:
    return property(lambda self: getattr(self.computed(name), name))


def _settable(name: str) -> property:
    return property(
        lambda self: getattr(self.computed(name), name), lambda self, value: setattr(self.computed(name), name, value)
    )


def _method_of_like(name: str) -> Callable[..., Any]:
    return lambda self, *arguments, **keywords: getattr(self.like(), name)(*arguments, **keywords)


def _method(name: str) -> Callable[..., Any]:
    by = name.strip("_")
    return lambda self, *arguments, **keywords: getattr(self.computed(by), name)(
        *plain(arguments, by), **plain(keywords, by)
    )


for _name in dir(Tensor):
    if _name.startswith("__") and _name not in _OWN | _OF_OBJECTS and callable(getattr(Tensor, _name)):
        setattr(LazyTensor, _name, _method(_name))
for _name in ("requires_grad", "grad", "data"):
    setattr(LazyTensor, _name, _settable(_name))
for _name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu"):
    setattr(LazyTensor, _name, _of_like(_name))
    LazyTensor.rules[getattr(Tensor, _name).__get__] = operator.attrgetter(_name)
for _name in ("size", "dim", "numel", "__len__", "is_floating_point", "is_complex"):
    setattr(LazyTensor, _name, _method_of_like(_name))
    LazyTensor.rules[getattr(Tensor, _name)] = _method_of_like(_name)
for _name in ("numel", "is_floating_point", "is_complex"):
    LazyTensor.rules[getattr(torch, _name)] = _method_of_like(_name)
# A class with __getattr__ would do without these, and each of its slots would take Python six times as long to read
for _name in ("__cuda_array_interface__", *dir(Tensor)):
    if _name not in vars(LazyTensor) and (not _name.startswith("__") or _name == "__cuda_array_interface__"):
        setattr(LazyTensor, _name, _of_computed(_name))
