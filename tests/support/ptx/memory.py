"""The interpreter's memory: real memory, so that compiled code and torch can use the same addresses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

READ, WRITE, INITIALISED = 1, 2, 4
INPUT = READ | INITIALISED
GRANULE = 2
"""So many bytes have flags together."""
GUARD = 512
"""Bytes before and behind each buffer that nothing may touch."""
ELEMENTS = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.float16,
    torch.int64: np.int64,
}


class Memory:
    """Bytes from the address ``base`` on, and what may be done to each granule."""

    def __init__(self, size: int = 1 << 24) -> None:
        page = 4096
        raw = np.zeros(size + page, np.uint8)
        begin = -raw.ctypes.data % page
        self.bytes = raw[begin : begin + size]
        self.base = self.bytes.ctypes.data
        self.flags = np.zeros(size // GRANULE, np.uint8)
        self.used = 0
        self.buffers: list[tuple[int, int, str]] = []
        self.unplaced: list[tuple[int, int]] = []
        """Addresses of tensors' parts for which there is no memory: nothing is read or written there."""

    def clear(self) -> None:
        self.bytes[: self.used] = 0
        self.flags[: self.used // GRANULE] = 0
        self.used = 0
        self.buffers = []
        self.unplaced = []

    def allocate(self, size: int, name: str, offset: int = 0) -> int:
        """Return the place of so many bytes, ``offset`` behind a multiple of 256; nothing may be done to them yet."""
        place = -(-(self.used + GUARD) // 256) * 256 + offset
        if place + size + GUARD > len(self.bytes):
            raise MemoryError(f"{name}: the interpreter's memory is full")
        self.used = -(-(place + size + GUARD) // 256) * 256
        self.buffers.append((place, size, name))
        return place

    def allow(self, place: int, size: int, flags: int) -> None:
        self.flags[place // GRANULE : -(-(place + size) // GRANULE)] |= flags

    def tensor(self, place: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a view of memory."""
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        item = dtype.itemsize
        elements = torch.from_numpy(self.bytes[place : place + (last + 1) * item].view(ELEMENTS[dtype]))
        return elements.view(dtype).as_strided(shape, strides)

    def place_of(self, tensor: Tensor) -> int:
        return tensor.data_ptr() - self.base

    def name_of(self, place: int) -> str:
        for begin, size, name in self.buffers:
            if begin - GUARD <= place < begin + size + GUARD:
                return f"{name} at byte {place - begin} of {size}"
        return f"address {place + self.base:#x}, in no buffer"
