"""Return diffusers' own output types from a step, but compute the predicted original sample when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddim_inverse,
    scheduling_ddim_parallel,
    scheduling_ddpm,
    scheduling_ddpm_parallel,
)
from torch import Tensor


class _Lazy:
    """Mix this into an output type of diffusers: it holds ``prev_sample``, and becomes that type when more is read.

    A dataclass with a property for ``pred_original_sample`` is not enough: diffusers' ``BaseOutput`` is an OrderedDict
    besides, whose ``__post_init__`` reads every field to store it as an item, and torch knows it as a pytree node. So
    each way of reading a dictionary (``_DICTIONARY_METHODS``) computes x_0 first, and then is diffusers' own.
    """

    plain: Any
    """diffusers' own type."""

    def __init__(
        self, prev_sample: Tensor, predict_original: Callable[[], Tensor] | None = None, **fields: Any
    ) -> None:
        if predict_original is None:  # torch.utils._pytree makes one of its fields
            object.__setattr__(self, "__class__", self.plain)
            self.__init__(prev_sample, **fields)  # type: ignore[misc]
        else:  # past diffusers' __setattr__, which reads the dictionary
            self.__dict__.update(prev_sample=prev_sample, _predict_original=predict_original)

    def _complete(self) -> Any:
        """Compute x_0, and become diffusers' own output."""
        prev_sample, original = self.__dict__["prev_sample"], self.__dict__["_predict_original"]()
        self.__dict__.clear()
        object.__setattr__(self, "__class__", self.plain)
        self.__init__(prev_sample, pred_original_sample=original)  # type: ignore[misc]
        return self

    @property
    def pred_original_sample(self) -> Tensor:
        """The predicted x_0, computed now."""
        original: Tensor = self._complete().pred_original_sample
        return original

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, str)) and key in (0, "prev_sample"):
            return self.__dict__["prev_sample"]
        return self._complete()[key]


def _completing(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return getattr(self._complete(), name)(*arguments, **keywords)

    method.__name__ = name
    return method


_DICTIONARY_METHODS = (
    *("__contains__", "__eq__", "__iter__", "__len__", "__ne__", "__or__", "__reduce__", "__reduce_ex__", "__repr__"),
    *("__reversed__", "__ror__", "__setattr__", "__setitem__", "clear", "copy", "get", "items", "keys", "move_to_end"),
    *("popitem", "to_tuple", "values"),
)
for _name in _DICTIONARY_METHODS:
    setattr(_Lazy, _name, _completing(_name))


def _lazy(plain: Any) -> Any:
    """Return the lazy type of one of diffusers' output types."""
    return type(f"Lazy{plain.__name__}", (_Lazy, plain), {"plain": plain, "__module__": __name__})


LazyDDIMOutput = _lazy(scheduling_ddim.DDIMSchedulerOutput)
LazyDDIMInverseOutput = _lazy(scheduling_ddim_inverse.DDIMSchedulerOutput)
LazyDDIMParallelOutput = _lazy(scheduling_ddim_parallel.DDIMParallelSchedulerOutput)
LazyDDPMOutput = _lazy(scheduling_ddpm.DDPMSchedulerOutput)
LazyDDPMParallelOutput = _lazy(scheduling_ddpm_parallel.DDPMParallelSchedulerOutput)
