"""Return what diffusers' own step returns, but compute the predicted original sample when it is read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddim_cogvideox,
    scheduling_ddim_inverse,
    scheduling_ddim_parallel,
    scheduling_ddpm,
    scheduling_ddpm_parallel,
    scheduling_dpm_cogvideox,
    scheduling_edm_euler,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_heun_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete,
    scheduling_lcm,
    scheduling_lms_discrete,
    scheduling_repaint,
    scheduling_scm,
    scheduling_tcd,
    scheduling_unclip,
)
from torch import Tensor
from torch.utils._pytree import tree_map


class LazyOriginal(Tensor):
    """A predicted x_0 in a tuple: a tensor without memory, until more than its shape, dtype and device is asked for."""

    _predict: Callable[[], Tensor]
    _value: Tensor | None = None
    _computed_at: int = 0

    def is_edited(self) -> bool:
        """Tell whether it has been written to since it was computed."""
        return self._value is not None and (self._value.is_inference() or self._value._version != self._computed_at)

    @classmethod
    def of(cls, prev_sample: Tensor, predict_original: Callable[[], Tensor], dtype: torch.dtype | None = None) -> Any:
        """Return the x_0 of a step, with the shape and device of its next sample, and that one's dtype or another."""
        shape, device = prev_sample.shape, prev_sample.device
        original: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype or prev_sample.dtype, device=device)
        original._predict = predict_original
        return original

    @staticmethod
    def _computed(value: Any) -> Any:
        if not isinstance(value, LazyOriginal):
            return value
        if value._value is None:
            value._value = value._predict()
            value._computed_at = 0 if value._value.is_inference() else value._value._version
        return value._value

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*arguments, **(keywords or {}))
        return function(*tree_map(cls._computed, arguments), **tree_map(cls._computed, keywords or {}))

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]


_METADATA = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")}
_METADATA |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex}


class _Lazy:
    """Mix this into an output type of diffusers: it holds ``prev_sample``, and becomes that type when more is read.

    A dataclass with a property for ``pred_original_sample`` is not enough: diffusers' ``BaseOutput`` is an OrderedDict
    besides, whose ``__post_init__`` reads every field to store it as an item, and torch knows it as a pytree node. So
    each way of reading a dictionary that may need x_0 (``_READERS``) computes it first, and then is diffusers' own.
    """

    plain: Any
    """diffusers' own type."""
    _fields: tuple[str, str]
    """The names of the next sample and of the predicted x_0, or of what is in its place."""

    def __init__(
        self, prev_sample: Tensor, predict_original: Callable[[], Tensor] | None = None, **fields: Any
    ) -> None:
        if predict_original is None:  # torch.utils._pytree makes one of its fields
            object.__setattr__(self, "__class__", self.plain)
            self.__init__(prev_sample, **fields)  # type: ignore[misc]
        else:  # past diffusers' __setattr__, which reads the dictionary
            self.__dict__.update(prev_sample=prev_sample, _predict_original=predict_original)

    def _become(self, original: Tensor) -> Any:
        """Become diffusers' own output, with this x_0."""
        fields = {"prev_sample": self.__dict__.pop("prev_sample"), self._fields[1]: original}
        del self.__dict__["_predict_original"]
        object.__setattr__(self, "__class__", self.plain)
        self.__init__(**fields)  # type: ignore[misc]
        return self

    def _complete(self) -> Any:
        return self._become(self.__dict__["_predict_original"]())

    def __getitem__(self, key: Any) -> Any:
        wanted: Any = key if isinstance(key, str) else self._fields[key]
        if wanted == "prev_sample":
            return self.__dict__["prev_sample"]
        return (self.__dict__["prev_sample"],) if wanted == ("prev_sample",) else self._complete()[key]

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a field, as a dictionary does."""
        if not isinstance(self, _Lazy):  # reading the default has made it diffusers' own
            return OrderedDict.get(self, key, default)
        return self[key] if key in self._fields else default

    def keys(self) -> Any:
        """Return the fields' names, as a dictionary does."""
        return OrderedDict.fromkeys(self._fields).keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: Any) -> bool:
        return key in self._fields

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self._fields[1]:
            self._become(value)
        else:
            self.__dict__[name] = value

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._fields:
            setattr(self, key, value)
        else:
            self._complete()[key] = value


def _completing(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return getattr(self._complete(), name)(*arguments, **keywords)

    method.__name__ = name
    return method


_READERS = (
    *("__delitem__", "__eq__", "__ior__", "__ne__", "__or__", "__reduce__", "__reduce_ex__", "__repr__", "__ror__"),
    *("clear", "copy", "items", "move_to_end", "pop", "popitem", "setdefault", "to_tuple", "update", "values"),
)
for _name in _READERS:
    setattr(_Lazy, _name, _completing(_name))


def lazy(plain: Any, second: str = "pred_original_sample") -> Any:
    """Return the lazy type of one of diffusers' output types, and of the name of its second field."""

    def read(self: Any) -> Tensor:
        value: Tensor = getattr(self._complete(), second)
        return value

    read.__doc__ = "The predicted x_0, or what is in its place, computed now."
    members = {"plain": plain, "_fields": ("prev_sample", second), second: property(read), "__module__": __name__}
    return type(f"Lazy{plain.__name__}", (_Lazy, plain), members)


LazyEulerOutput = lazy(scheduling_euler_discrete.EulerDiscreteSchedulerOutput)
LazyEulerAncestralOutput = lazy(scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput)
LazyHeunOutput = lazy(scheduling_heun_discrete.HeunDiscreteSchedulerOutput)
LazyKDPM2Output = lazy(scheduling_k_dpm_2_discrete.KDPM2DiscreteSchedulerOutput)
LazyKDPM2AncestralOutput = lazy(scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteSchedulerOutput)
LazyLMSOutput = lazy(scheduling_lms_discrete.LMSDiscreteSchedulerOutput)
LazyEDMEulerOutput = lazy(scheduling_edm_euler.EDMEulerSchedulerOutput)
LazyCogVideoXOutput = lazy(scheduling_ddim_cogvideox.DDIMSchedulerOutput)
LazyCogVideoXDPMOutput = lazy(scheduling_dpm_cogvideox.DDIMSchedulerOutput)
LazyUnCLIPOutput = lazy(scheduling_unclip.UnCLIPSchedulerOutput)
LazyRePaintOutput = lazy(scheduling_repaint.RePaintSchedulerOutput)
LazySCMOutput = lazy(scheduling_scm.SCMSchedulerOutput)
LazyLCMOutput = lazy(scheduling_lcm.LCMSchedulerOutput, "denoised")
LazyTCDOutput = lazy(scheduling_tcd.TCDSchedulerOutput, "pred_noised_sample")
LazyDDIMOutput = lazy(scheduling_ddim.DDIMSchedulerOutput)
LazyDDIMInverseOutput = lazy(scheduling_ddim_inverse.DDIMSchedulerOutput)
LazyDDIMParallelOutput = lazy(scheduling_ddim_parallel.DDIMParallelSchedulerOutput)
LazyDDPMOutput = lazy(scheduling_ddpm.DDPMSchedulerOutput)
LazyDDPMParallelOutput = lazy(scheduling_ddpm_parallel.DDPMParallelSchedulerOutput)
