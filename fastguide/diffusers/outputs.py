"""What a step returns: diffusers' own types, with the predicted original sample computed when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers.schedulers.scheduling_ddim as _ddim
import diffusers.schedulers.scheduling_ddim_inverse as _ddim_inverse
import diffusers.schedulers.scheduling_ddim_parallel as _ddim_parallel
import diffusers.schedulers.scheduling_ddpm as _ddpm
import diffusers.schedulers.scheduling_ddpm_parallel as _ddpm_parallel
from torch import Tensor

Original = Callable[[], Tensor]


def _completing(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return getattr(self._complete(), name)(*arguments, **keywords)

    method.__name__ = name
    return method


_OF_A_DICTIONARY = (
    *("__contains__", "__eq__", "__getitem__", "__iter__", "__len__", "__ne__", "__or__", "__reduce__"),
    *("__reduce_ex__", "__repr__", "__reversed__", "__ror__", "__setitem__"),
    *("copy", "get", "items", "keys", "move_to_end", "to_tuple", "values"),
)


def _lazy(plain: Any) -> Any:
    """A subclass of an output type that becomes that type as soon as more than ``prev_sample`` is asked of it."""

    def initialize(self: Any, prev_sample: Tensor, original: Original | None = None, **fields: Any) -> None:
        if original is None:  # as torch.utils._pytree puts one together again
            object.__setattr__(self, "__class__", plain)
            plain.__init__(self, prev_sample, **fields)
        else:
            self.__dict__.update(prev_sample=prev_sample, _original=original)

    def complete(self: Any) -> Any:
        prev_sample, original = self.__dict__.pop("prev_sample"), self.__dict__.pop("_original")()
        object.__setattr__(self, "__class__", plain)
        plain.__init__(self, prev_sample=prev_sample, pred_original_sample=original)
        return self

    members: dict[str, Any] = {name: _completing(name) for name in _OF_A_DICTIONARY}
    members |= {"__init__": initialize, "_complete": complete, "__module__": __name__, "__doc__": plain.__doc__}
    members["plain"] = plain
    members["__setattr__"] = _completing("__setattr__")
    members["pred_original_sample"] = property(lambda self: self._complete().pred_original_sample)
    return type(plain.__name__, (plain,), members)


LazyDDIMOutput = _lazy(_ddim.DDIMSchedulerOutput)
LazyDDIMInverseOutput = _lazy(_ddim_inverse.DDIMSchedulerOutput)
LazyDDPMOutput = _lazy(_ddpm.DDPMSchedulerOutput)
LazyDDIMParallelOutput = _lazy(_ddim_parallel.DDIMParallelSchedulerOutput)
LazyDDPMParallelOutput = _lazy(_ddpm_parallel.DDPMParallelSchedulerOutput)


class LazyPair(tuple[Tensor, ...]):
    """``(prev_sample, pred_original_sample)``, as ``return_dict=False`` asks for, the second computed when it is read.

    A tuple of one, for what looks past Python's methods; everything else sees two.
    """

    _original: Original | None
    _pair: tuple[Tensor, Tensor] | None

    def __new__(cls, prev_sample: Tensor, original: Original) -> LazyPair:
        """With a function of no arguments for the second."""
        pair = super().__new__(cls, (prev_sample,))
        pair._original, pair._pair = original, None
        return pair

    def _complete(self) -> tuple[Tensor, Tensor]:
        if self._pair is None:
            assert self._original is not None
            self._pair = (super().__getitem__(0), self._original())
            self._original = None
        return self._pair

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0) if index == 0 else self._complete()[index]

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._complete())

    def __repr__(self) -> str:
        return repr(self._complete())

    def __eq__(self, other: object) -> bool:
        return self._complete() == other

    def __ne__(self, other: object) -> bool:
        return self._complete() != other

    def __hash__(self) -> int:
        return hash(self._complete())

    def __contains__(self, value: object) -> bool:
        return value in self._complete()

    def __add__(self, other: Any) -> Any:
        return self._complete() + other

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self._complete()),)
