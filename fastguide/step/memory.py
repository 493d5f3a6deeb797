"""New tensors for what a step writes; large ones on the CPU in huge pages, where Linux lends them on request.

torch asks for them, for all of its tensors, in processes with THP_MEM_ALLOC_ENABLE=1 alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 2**25
"""Bytes from which on glibc maps every allocation anew: a fault for each small page takes longer than the step."""
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it
if os.environ.get("FASTGUIDE_HUGE_PAGES") == "0":
    _HUGE_PAGES = None
_madvise = None if _HUGE_PAGES is None else ctypes.CDLL(None).madvise


def empty_like(sample: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor in the sample's layout within a sample, samples one after the other."""
    if sample.is_contiguous():
        return _in_huge_pages(torch.empty_like(sample, dtype=dtype))
    strides = (sample.numel() // max(sample.shape[0], 1), *sample.stride()[1:])
    return empty_strided(sample.shape, strides, dtype or sample.dtype, sample.device)


def empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor, as torch's function of this name."""
    return _in_huge_pages(torch.empty_strided(shape, strides, dtype=dtype, device=device))


def _in_huge_pages(new: Tensor) -> Tensor:
    """Advise the system, which may do as it likes: no values depend on it.

    An allocator that keeps the memory for other tensors keeps the advice with it.
    """
    # Without memory there is nothing to advise: a compiled or fake tensor's size may not even be a number
    if _madvise is None or torch.compiler.is_compiling() or type(new) is not Tensor:
        return new
    if new.nbytes < _LARGE or new.device.type != "cpu":
        return new
    begin = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (new.data_ptr() + new.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _HUGE_PAGES)
    return new
