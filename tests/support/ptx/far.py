"""Steps the last elements of tensors of 2^31 to 2^34 elements: there is memory for nothing else of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastguide import ROW_COLUMNS
from fastguide.step.backends import reference
from fastguide.step.noise import _normals, _philox
from tests.support import device_code
from tests.support.ptx.cases import STEPS
from tests.support.ptx.expected import torch_noise
from tests.support.ptx.launch import Launch
from tests.support.ptx.memory import INPUT, WRITE, Memory
from tests.support.ptx.parse import PtxError
from tests.support.ptx.races import races
from tests.support.ptx.step import Library

PLACED = 5120  # elements, in whole or single tiles of every kernel
COMPUTED = 2048  # so many of them must be right
BLOCKS = 44  # the last so many blocks are run: single elements are 128 a block
TORCH_THREADS = 256
SEED, OFFSET = -(2**62) + 12345, 2**34 + 8
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


@dataclass(frozen=True)
class FarCase:
    """A step of two predictions whose last sample ends far from where its tensors begin."""

    size: int
    batch: int = 1
    stride: int = 0  # 0: the size
    noise: str = "none"
    dtype: torch.dtype = torch.float32
    channels: int = 1

    @property
    def first(self) -> int:
        """Return the place in the last sample of the first element that has memory."""
        return max(self.size - PLACED, 0)


def far_cases() -> Iterator[FarCase]:
    """Yield cases beyond what 31, 32 and 34 bits count."""
    for noise, dtype in itertools.product(("none", "given", "portable", "torch"), (torch.float32, torch.bfloat16)):
        own = {"noise": noise, "dtype": dtype}
        for size in (2**31 + 2056, 2**32 + 1029):
            yield FarCase(size, **own)
        for size, stride in ((1032, 2**31 + 8), (1032, 2**33 + 8), (1029, 2**30 + 5)):
            yield FarCase(size, 3, stride, **own)
        if noise in ("given", "portable"):
            yield FarCase(2**34 + 4104, **own)
        if noise == "portable":
            yield FarCase(2**34 + 4104, channels=8, **own)
        if noise == "torch":  # the most that are computed in vectors
            yield FarCase(2**31 - 8, **own)
            yield FarCase(2**29 - 8, 4, **own)


class FarStep:
    """A case's tensors in memory, and its launch."""

    def __init__(self, memory: Memory, case: FarCase) -> None:
        memory.clear()
        self.memory, self.case = memory, case
        self.count = case.size - case.first
        self.generator = torch.Generator().manual_seed(case.size % 1000)
        self.plain: dict = {"batch": case.batch, "elements_per_sample": case.size, "channels": case.channels}
        self.tensors = {name: self._place(name, INPUT) for name in ("sample", "prediction 0", "prediction 1")}
        self.tensors["out"] = self._place("out", WRITE)
        self.plain["predictions"] = [self.plain.pop(f"prediction {k}") for k in range(2)]
        rows = torch.empty(STEPS, len(ROW_COLUMNS)).uniform_(-1.5, 1.5, generator=self.generator)
        rows[:, ROW_COLUMNS.index("out_noise")] = 0.75
        self.rows = self._table("rows", rows)
        self.weights = self._table("weights", torch.randn(1, 1, 3, generator=self.generator))
        self.plain |= {"rows": self.rows.data_ptr(), "weights": self.weights.data_ptr(), "steps": STEPS, "index": 1}
        self.noise = self._noise()

    def _place(self, name: str, flags: int) -> Tensor:
        """Make the last elements of a tensor that begins at a multiple of 16 bytes, where there is no memory."""
        case, item = self.case, self.case.dtype.itemsize
        stride = case.stride or case.size
        begins = ((case.batch - 1) * stride + case.first) * item
        place = self.memory.allocate(self.count * item, name, begins % 16)
        self.memory.allow(place, self.count * item, flags)
        view = self.memory.tensor(place, (self.count,), (1,), case.dtype)
        view.copy_(torch.randn(self.count, generator=self.generator))
        address = self.memory.base + place - begins
        self.memory.unplaced.append((address, address + begins))
        self.plain[name] = (address, stride, device_code.ELEMENTS[case.dtype])
        return view

    def _table(self, name: str, values: Tensor) -> Tensor:
        place = self.memory.allocate(values.numel() * values.itemsize, name)
        self.memory.allow(place, values.numel() * values.itemsize, INPUT)
        view = self.memory.tensor(place, values.shape, values.stride(), values.dtype)
        view.copy_(values)
        return view

    def _noise(self) -> Tensor | None:
        """Return the noise of the elements that have memory."""
        case = self.case
        place = torch.arange(case.first, case.size)
        counted = place % case.channels * (case.size // case.channels) + place // case.channels
        if case.noise == "given":
            return self._place("noise", INPUT)
        if case.noise == "portable":
            seeds = torch.randint(-(2**62), 2**62, (case.batch,), generator=self.generator)
            self.plain |= {"seeds": self._table("seeds", seeds).data_ptr(), "seeds_stride": 1}
            return _portable(counted, int(seeds[-1]))
        if case.noise == "torch":
            self.plain |= {"seed": SEED % 2**64, "offset": OFFSET, "threads": TORCH_THREADS}
            element = counted + (case.batch - 1) * case.size
            values, _ = torch_noise(element, TORCH_THREADS, torch.tensor([SEED, OFFSET]))
            return torch.from_numpy(values).float().to(case.dtype)
        return None

    def run(self, library: Library) -> list[str]:
        """Run the last blocks, and return what was wrong."""
        recorded = device_code.record(self.plain)
        code = library.code(recorded.kernel)
        launch = Launch(self.memory, code, recorded.blocks, recorded.threads, recorded.parameters)
        launch.run([range(max(recorded.blocks - BLOCKS, 0), recorded.blocks)])
        wrong = launch.findings + races(launch)
        times = np.zeros(self.count, np.int64)
        item, begin = self.case.dtype.itemsize, self.memory.place_of(self.tensors["out"])
        for access in launch.trace.accesses:
            for part in range(0, access.size, item) if access.kind == "write" else ():
                np.add.at(times, (access.places + part - begin) // item, 1)
        if (times > 1).any() or (times[-COMPUTED:] != 1).any():
            wrong.append(f"elements were written {times.min()} to {times.max()} times")
        return wrong + self._compare(torch.from_numpy(times == 1))

    def _compare(self, computed: Tensor) -> list[str]:
        sample, first, second = (
            self.tensors[name].float()[None] for name in ("sample", "prediction 0", "prediction 1")
        )
        wanted = torch.empty_like(sample)
        noise = None if self.noise is None else self.noise.float()[None]
        step = (sample, [first, second], self.rows, self.weights, 1, None, None, None, noise)
        reference.guided_step(wanted, None, None, *step)
        wanted, got = wanted[0][computed], self.tensors["out"][computed]
        fine = (got.float() - wanted).abs() <= TOLERANCES[self.case.dtype] * (1 + wanted.abs())
        return [] if fine.all() else [f"{int((~fine).sum())} of {len(fine)} elements differ from the reference"]


def _portable(counted: Tensor, seed: int) -> Tensor:
    block = counted // 4
    key = (torch.full_like(block, seed & 0xFFFFFFFF), torch.full_like(block, seed >> 32 & 0xFFFFFFFF))
    counter = (block & 0xFFFFFFFF, block >> 32, torch.ones_like(block), torch.zeros_like(block))
    words = _philox(counter, key)
    normals = torch.stack((*_normals(words[0], words[1]), *_normals(words[2], words[3])), -1)
    return normals.gather(1, (counted % 4)[:, None])[:, 0]


def run_far(memory: Memory, library: Library, case: FarCase) -> list[str]:
    """Run a case, and return what was wrong."""
    try:
        return FarStep(memory, case).run(library)
    except PtxError as error:
        return [f"error: {error}"]
