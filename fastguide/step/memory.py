"""How tensors lie in memory: layouts within a sample, overlaps, and allocation (large CPU tensors in huge pages).

Linux lends huge pages on request. torch asks for them, for all of its tensors, only in processes with
THP_MEM_ALLOC_ENABLE=1.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of samples, predictions, gradients, variances, noise and outputs, in any combination."""

_LARGE = 2**25
"""Bytes from which on glibc maps every allocation anew: a fault for each small page takes longer than the step."""
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it
if os.environ.get("FASTGUIDE_HUGE_PAGES") == "0":
    _HUGE_PAGES = None
_madvise = None if _HUGE_PAGES is None else ctypes.CDLL(None).madvise


# ---- New tensors ----


def empty_like(sample: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new tensor in the sample's layout within a sample, with the samples one after the other."""
    if sample.is_contiguous():
        return _in_huge_pages(torch.empty_like(sample, dtype=dtype))
    strides = (sample.numel() // max(sample.shape[0], 1), *sample.stride()[1:])
    return empty_strided(sample.shape, strides, dtype or sample.dtype, sample.device)


def empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor, as torch's function of this name does."""
    return _in_huge_pages(torch.empty_strided(shape, strides, dtype=dtype, device=device))


def needs_no_advice(sample: Tensor) -> bool:
    """Tell whether a new tensor like the sample is just what ``torch.empty_like`` returns."""
    return sample.is_contiguous() and (_madvise is None or sample.nbytes < _LARGE)


def _in_huge_pages(new: Tensor) -> Tensor:
    """Advise the system, which may do as it likes: no values depend on it.

    An allocator that reuses the memory for other tensors leaves the advice in force.
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


# ---- Layouts ----


def dense_within_sample(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether the elements of one sample fill one block of memory, in any order of the dimensions."""
    left, expected = [], 1
    for size, stride in zip(shape[1:], strides[1:], strict=True):
        if size == 0:
            return True
        if size > 1:
            left.append((stride, size))
    while left:  # not sorted: torch.compile cannot where sizes are symbols
        found = -1
        for place, (stride, _) in enumerate(left):
            if stride == expected:
                found = place
                break
        if found < 0:
            return False
        expected *= left.pop(found)[1]
    return True


def dense(batch: Tensor) -> Tensor:
    """Return the batch if the elements of each sample fill one block of memory; otherwise a contiguous copy."""
    filled = batch.is_contiguous() or dense_within_sample(batch.shape, batch.stride())
    return batch if filled else batch.contiguous()


def same_layout(tensor: Tensor, sample: Tensor) -> bool:
    """Tell whether a tensor of the sample's inner shape has its elements in the sample's order."""
    inner = tensor.stride()[1:]
    if inner == sample.stride()[1:] or (tensor.is_contiguous() and sample.is_contiguous()):
        return True
    return (
        not tensor.numel()
        or all(  # a dimension of one element has no order
            size <= 1 or ours == theirs
            for size, ours, theirs in zip(tensor.shape[1:], inner, sample.stride()[1:], strict=True)
        )
    )


def in_layout_of(sample: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor in the sample's layout; it is copied only if it has another."""
    if tensor.stride()[1:] == sample.stride()[1:] or same_layout(tensor, sample):
        return tensor
    return torch.empty_like(sample, dtype=tensor.dtype).copy_(tensor)


def in_blocks(tensor: Tensor, blocks: int) -> Tensor:
    """Return a view of a tensor that is dense within a sample: (batch, blocks, elements of a block), as they lie."""
    inner = tensor.stride()[1:]
    order = sorted(range(1, tensor.dim()), key=lambda k: (-inner[k - 1], tensor.shape[k] > 1))
    blocked: Tensor = tensor.permute(0, *order).flatten(1).unflatten(1, (blocks, -1))
    return blocked


def counted_layout(sample: Tensor) -> bool:
    """Tell whether streams of noise can count its elements: each sample is contiguous or channels_last."""
    if sample.is_contiguous():
        return True
    shape, strides = sample.shape[1:], sample.stride()[1:]
    if _dense_in_order(shape, strides):
        return True
    return len(shape) > 1 and _dense_in_order((*shape[1:], shape[0]), (*strides[1:], strides[0]))


def _dense_in_order(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


# ---- Overlaps ----


def extent(tensor: Tensor) -> int:
    """Return the number of bytes from the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.itemsize if tensor.numel() else 0


def overlaps(first: Tensor, second: Tensor) -> bool:
    """Tell whether the memory of two tensors, from the first to the last element, has a byte in common."""
    begin, other = first.data_ptr(), second.data_ptr()  # 0 without memory: meta tensors
    return begin != 0 and other < begin + extent(first) and begin < other + extent(second)


def element_for_element(out: Tensor, tensor: Tensor) -> bool:
    """Tell whether two tensors that overlap do so harmlessly: each element is the other's, or no element is shared."""
    if out.data_ptr() == 0:  # without memory: meta tensors
        return True
    batch = out.shape[0]
    run, other_run = (out.numel() // batch * t.itemsize for t in (out, tensor))
    stride, other_stride = (t.stride(0) * t.itemsize if batch > 1 else 0 for t in (out, tensor))
    distance = tensor.data_ptr() - out.data_ptr()
    if stride != other_stride or tensor.shape != out.shape:
        return False
    if distance == 0:
        return out.itemsize == tensor.itemsize
    # else interleaved, as two channel groups of one tensor are
    return stride > 0 and distance % stride >= run and stride - distance % stride >= other_run
