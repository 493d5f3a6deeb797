"""What a step returns: diffusers' own types, with the predicted original sample computed when it is read."""

from __future__ import annotations

from collections.abc import Callable
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
    *("__contains__", "__eq__", "__iter__", "__len__", "__ne__", "__or__", "__reduce__"),
    *("__reduce_ex__", "__repr__", "__reversed__", "__ror__", "__setitem__"),
    *("clear", "copy", "get", "items", "keys", "move_to_end", "popitem", "to_tuple", "values"),
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
        prev_sample, original = self.__dict__["prev_sample"], self.__dict__["_original"]()
        self.__dict__.clear()
        object.__setattr__(self, "__class__", plain)
        plain.__init__(self, prev_sample=prev_sample, pred_original_sample=original)
        return self

    def item(self: Any, key: Any) -> Any:
        if isinstance(key, (int, str)) and key in (0, "prev_sample"):
            return self.__dict__["prev_sample"]
        return self._complete()[key]

    members: dict[str, Any] = {name: _completing(name) for name in _OF_A_DICTIONARY}
    members |= {"__init__": initialize, "_complete": complete, "__module__": __name__, "__doc__": plain.__doc__}
    members |= {"plain": plain, "__getitem__": item}
    members["__setattr__"] = _completing("__setattr__")
    members["pred_original_sample"] = property(lambda self: self._complete().pred_original_sample)
    return type(plain.__name__, (plain,), members)


LazyDDIMOutput = _lazy(_ddim.DDIMSchedulerOutput)
LazyDDIMInverseOutput = _lazy(_ddim_inverse.DDIMSchedulerOutput)
LazyDDPMOutput = _lazy(_ddpm.DDPMSchedulerOutput)
LazyDDIMParallelOutput = _lazy(_ddim_parallel.DDIMParallelSchedulerOutput)
LazyDDPMParallelOutput = _lazy(_ddpm_parallel.DDPMParallelSchedulerOutput)
