"""Makes a case's tensors in the interpreter's memory, where each allows only what a step may do to it."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fastguide import ROW_COLUMNS
from fastguide.step.operator import StepArguments
from tests.support.device_code import placed
from tests.support.ptx.cases import DTYPES, STEPS, Case
from tests.support.ptx.memory import INITIALISED, INPUT, READ, WRITE, Memory

SPECIAL_VALUES = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 6e-8, 65504.0, 3e38, -3e38, 1e-7)
BAD_INDICES = {0: -1, 2: STEPS, 3: 2**40, 4: 2**63 - 1, 5: -(2**40)}  # by sample
CHANGED = READ | WRITE | INITIALISED


class Placement:
    """A case's tensors. ``arguments`` are the operator's."""

    def __init__(self, memory: Memory, case: Case) -> None:
        self.memory, self.case = memory, case
        self.random = random.Random(case.seed)
        self.generator = torch.Generator().manual_seed(case.seed)
        memory.clear()
        self.index = self.random.randrange(STEPS)
        inputs = self._elementwise_inputs()
        rows, weights = self._table("rows", self._rows(), INPUT), self._table("weights", self._weights(), INPUT)
        indices = self._indices()
        self.arguments = StepArguments(
            **self._outputs(inputs["sample"]),
            **inputs,
            rows=rows,
            weights=weights,
            index=self.index,
            indices=indices,
            **self._noise(),
            **self._cursor(),
        )

    # -- Values --

    def _values(self, shape: tuple[int, ...], name: str) -> Tensor:
        g, whole = self.generator, self.case.values == "whole"
        if name == "mask":
            choice = torch.randint(0, 2 if whole else 3, shape, generator=g).float()
            return torch.where(choice == 2, torch.rand(shape, generator=g), choice)
        if whole:
            ends = torch.randint(0, 2, shape, generator=g).float()  # of variances: 1, and nearly 0
            return -400 * ends if name == "variance" else torch.randint(-2, 3, shape, generator=g).float()
        values = torch.randn(shape, generator=g)
        if name == "variance":
            return values.clamp(-1, 1)
        if self.case.values == "special":
            special = torch.tensor(SPECIAL_VALUES)
            choice = torch.randint(0, 12 * len(special), shape, generator=g)
            values = torch.where(choice < len(special), special[choice.clamp(max=len(special) - 1)], values)
        return values

    def _rows(self) -> Tensor:
        if self.case.values == "whole":
            rows = placed.rows()
            rows[:, ROW_COLUMNS.index("in_timestep")] = torch.arange(STEPS) * 17.0 + 3
            return rows
        rows = torch.empty(STEPS, len(ROW_COLUMNS)).uniform_(-1.5, 1.5, generator=self.generator)
        for row in rows:
            if self.case.values == "pure":
                chosen = dict.fromkeys(ROW_COLUMNS, 0.0) | {"out_noise": 1.0, "clip": 1.0, "hist_slot": -1.0}
            else:
                chosen = {"clip": self.random.choice([1.0, 2.5, torch.inf]), "in_scale": self.random.uniform(0.2, 2)}
                chosen["in_timestep"] = self.random.choice([981.0, 37.0, 0.0, 12.0])
                chosen["hist_slot"] = float(self.random.randrange(-1, self.case.slots))
                may_be_zero = ("out_pred", "out_noise", "out_var_grad", "out_anchor", "hist_sample", "x0_noise")
                may_be_zero += ("out_hist_0", "out_hist_1", "out_hist_2")
                chosen |= {name: 0.0 for name in may_be_zero if self.random.random() < 0.12}
            for name, value in chosen.items():
                row[ROW_COLUMNS.index(name)] = value
        return rows

    def _weights(self) -> Tensor:
        scales, columns = self.case.scales, max(self.case.count, 1) + 1
        steps = STEPS if scales in ("per step", "both") else 1
        samples = self.case.batch if scales in ("per sample", "both") else 1
        if self.case.values == "whole":
            return torch.randint(0, 3, (steps, samples, columns), generator=self.generator).float()
        return torch.randn(steps, samples, columns, generator=self.generator)

    # -- Places --

    def _dtype(self, of_model: bool) -> torch.dtype:
        if self.case.dtype is None:
            return self.random.choice(DTYPES)
        return self.case.model or self.case.dtype if of_model else self.case.dtype

    def _place(
        self, name: str, flags: int, of_model: bool = False, copies: int = 1, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Make an elementwise tensor of so many batches, in a buffer of other values."""
        case, dtype = self.case, dtype or self._dtype(of_model)
        item, batch = dtype.itemsize, copies * case.batch
        offset = self.random.randrange(8) if case.offset is None else case.offset
        stride = case.size + self.random.randrange(9) if case.stride is None else case.stride
        place = self.memory.allocate(((batch - 1) * stride + case.size) * item, name, offset * item)
        shape, strides = (batch, case.size), (stride, 1)
        if case.channels > 1:
            shape, strides = (batch, case.channels, case.size // case.channels), (stride, 1, case.channels)
        self.memory.bytes[place : self.memory.used] = 0x3A
        view = self.memory.tensor(place, shape, strides, dtype)
        view.copy_(self._values(shape, name))
        for sample in range(batch):
            self.memory.allow(place + sample * stride * item, case.size * item, flags)
        return view

    def _table(self, name: str, values: Tensor, flags: int) -> Tensor:
        """Place values as torch's allocator would."""
        place = self.memory.allocate(values.numel() * values.itemsize, name)
        view = self.memory.tensor(place, values.shape, values.stride(), values.dtype)
        view.copy_(values)
        self.memory.allow(place, values.numel() * values.itemsize, flags)
        return view

    # -- Arguments --

    def _elementwise_inputs(self) -> dict:
        case = self.case
        sample = self._place("sample", CHANGED if case.in_place else INPUT)
        if case.together and case.count > 1:
            predictions = [self._place("predictions", INPUT, True, case.count)]
        else:
            predictions = [self._place(f"prediction {k}", INPUT, True) for k in range(case.count)]
        given = {"sample": sample, "predictions": predictions}
        if case.gradient:
            given["gradient"] = self._place("gradient", INPUT, True)
        if case.variance:
            given["variance"] = self._place("variance", 0 if case.variance_is_unused else INPUT, True)
            if case.variance_is_unused:
                given["variance"].fill_(torch.nan)
        if case.noise == "given":
            given["noise"] = self._place("noise", INPUT)
        if case.anchored:
            given["anchor"] = self._place("anchor", INPUT)
        if case.slots:
            given["history"] = self._place("history", CHANGED, copies=case.slots, dtype=torch.float32)
        if case.masked:
            given |= {name: self._place(name, INPUT) for name in ("mask", "known", "known_noise")}
        return {"gradient": None, "variance": None, "noise": None} | given

    def _outputs(self, sample: Tensor) -> dict:
        case = self.case
        return {
            "out": sample if case.in_place else self._place("out", WRITE),
            "original": self._place("original", WRITE) if case.original else None,
            "staged": self._place("staged", WRITE, True, case.copies) if case.copies else None,
        }

    def _indices(self) -> Tensor | None:
        case = self.case
        chosen = {"int": None, "one": torch.tensor(self.index), "per sample": torch.arange(case.batch) % STEPS}
        self.indices = chosen[case.indices]
        if self.indices is None:
            return None
        stored = self.indices.clone()
        self.bad = [k for k in BAD_INDICES if k < case.batch] if case.bad else []
        for sample in self.bad:
            stored[sample] = BAD_INDICES[sample]
        return self._table("indices", stored, INPUT)

    bad: tuple[int, ...] | list[int] = ()
    """Samples whose index is in no table."""
    indices: Tensor | None = None
    """Indices in the table."""

    def _noise(self) -> dict:
        case, draw = self.case, self.random
        if case.noise == "portable":
            seeds = [draw.getrandbits(63) - 2**62 for _ in range(case.batch)]
            return {"seeds": self._table("seeds", torch.tensor(seeds[0] if case.one_seed else seeds), INPUT)}
        if case.noise != "torch":
            return {}
        seed, offset = draw.getrandbits(64) - 2**63, 4 * draw.choice([0, 4, 2**31, 2**32 - 1, 2**33 + 5])
        philox = torch.tensor([seed, offset])
        if case.state:
            philox = self._table("state", torch.tensor([seed, offset, 0]), CHANGED)
        return {"philox": philox, "philox_threads": case.threads}

    def _cursor(self) -> dict:
        case, draw = self.case, self.random
        if not case.cursor:
            return {}
        count = 1 if case.cursor == "one" else case.batch
        state = torch.zeros(count, 4, dtype=torch.int64)
        for row in state:
            end = draw.choice([0, 1, 2, 3]) if case.ended else STEPS
            index = draw.randrange(max(end, 1)) if case.launches == 1 else 0
            row[:3] = torch.tensor([index, end, draw.randrange(index + 1)])
            if case.ended and draw.random() < 0.4:
                row[0] = end
        found = {"cursor": self._table("cursor", state, CHANGED)}
        if case.timestep:
            b = case.batch
            many = draw.choice([1, b, 2 * b, 150, 333] if count == 1 else [b, 2 * b, 5 * b, 9 * b])
            values = torch.full((many,), 555, dtype=getattr(torch, case.timestep))
            found["timestep"] = self._table("timestep", values, WRITE)
        return found
