"""Steps a case by interpreted PTX, and compares: with the same code compiled for the host, and with the reference."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguide.step.operator import StepArguments
from tests.support import device_code
from tests.support.machine_code import demangled
from tests.support.ptx.cases import Case
from tests.support.ptx.expected import OUTPUTS, Expected, Wanted, equal, errors, expected
from tests.support.ptx.generate import Code, code_of
from tests.support.ptx.launch import Launch
from tests.support.ptx.memory import GRANULE, WRITE, Memory
from tests.support.ptx.parse import Module, PtxError
from tests.support.ptx.placement import Placement
from tests.support.ptx.races import races

OTHERS = ("moments_kernel", "groups_kernel", "thresholds_kernel", "backward_kernel")


class Prepared(NamedTuple):
    """A kernel and the launch that a step makes of it."""

    name: str
    code: Code
    blocks: int
    threads: int
    parameters: bytes
    shared_bytes: int = 0


class Library:
    """The kernels of the native library's PTX, and the launches that a step makes of them."""

    def __init__(self, text: str) -> None:
        self.module = Module(text)
        mangled = list(self.module.sources)
        self.mangled = dict(zip(demangled(mangled), mangled, strict=True))
        self._codes: dict[str, Code] = {}

    @property
    def kernels(self) -> set[str]:
        """The names of the kernels that step, but not of others that are launched before, or on the way back."""
        return {name for name in self.mangled if not name.startswith(OTHERS)}

    def changed(self, name: str, change: Callable[[str], str]) -> Library:
        """Return a library in which one kernel's text is another."""
        other, mangled = copy(self), self.mangled[name]
        other.module = copy(self.module)
        other.module.sources = self.module.sources | {mangled: change(self.module.sources[mangled])}
        other._codes = {}
        return other

    def code(self, name: str) -> Code:
        if name not in self._codes:
            if name not in self.mangled:
                raise PtxError(f"there is no {name} in the PTX: the library was built of other sources")
            self._codes[name] = code_of(self.module, self.mangled[name])
        return self._codes[name]

    def prepare(self, a: StepArguments, case: Case) -> Prepared:
        recorded = device_code.record(plain_arguments(a, case))
        return Prepared(
            recorded.kernel, self.code(recorded.kernel), recorded.blocks, recorded.threads, recorded.parameters
        )


@dataclass
class Totals:
    """What comparisons have found so far."""

    launches: int = 0
    elements: int = 0
    compared_with_host: int = 0
    equal_to_reference: int = 0
    accesses: int = 0
    instructions: int = 0
    worst: float = 0.0
    """The largest error, in units of 2^-24 of the terms' magnitudes and half a unit in the last place."""
    worst_case: str = ""
    kernels: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Which basic blocks of which kernels were executed."""
    failures: list[tuple[str, list[str]]] = field(default_factory=list)


@dataclass
class Comparison:
    """Runs cases. ``prepare`` makes a launch of a case's arguments; ``host``: the code is compiled for the host too."""

    prepare: Callable[[StepArguments, Case], Prepared]
    host: bool = True
    memory: Memory = field(default_factory=Memory)
    totals: Totals = field(default_factory=Totals)

    def run(self, case: Case) -> list[str]:
        """Step a case as often as it says, and return what was wrong."""
        wrong: list[str] = []
        try:
            placement = Placement(self.memory, case)
            for launch in range(case.launches):
                wrong = wrong or [f"launch {launch}: {text}" for text in self._step(placement)]
        except (PtxError, RuntimeError) as error:  # of the interpreter, or of the same code on the host
            wrong = [f"error: {error}"]
        if wrong:
            self.totals.failures.append((str(case), wrong))
        return wrong

    def _step(self, placement: Placement) -> list[str]:
        case, a, memory = placement.case, placement.arguments, self.memory
        wanted = expected(placement)
        before = memory.bytes[: memory.used].copy()
        on_host = self._on_host(a, case) if self.host else {}
        memory.bytes[: memory.used] = before
        prepared = self.prepare(a, case)
        launch = Launch(memory, *prepared[1:])
        launch.run(waves_of(case, prepared.blocks), 3 if case.waves == "mixed" else 1)
        self._count(prepared, launch)
        wrong = launch.findings + races(launch)
        changed = np.flatnonzero(memory.bytes[: memory.used] != before)
        changed = changed[memory.flags[changed // GRANULE] & WRITE == 0]
        wrong += [f"changed what is no output: {memory.name_of(int(place))}" for place in changed[:1]]
        wrong += self._written_once(launch, a, wanted)
        for name, output in wanted.outputs.items():
            wrong += self._compare(name, getattr(a, name), output, wanted.live, on_host.get(name), case)
        return wrong + _wrong_positions(a, wanted)

    def _on_host(self, a: StepArguments, case: Case) -> dict[str, Tensor]:
        """Return what the code makes of it that is compiled for the host and runs in a loop over threads."""
        device_code.module().launch(plain_arguments(a, case), 1, None)
        return {name: getattr(a, name).clone() for name in OUTPUTS if getattr(a, name) is not None}

    def _count(self, prepared: Prepared, launch: Launch) -> None:
        self.totals.launches += 1
        self.totals.instructions += launch.instructions
        self.totals.accesses += sum(len(access.places) for access in launch.trace.accesses)
        self.totals.kernels[prepared.name].update(launch.executed)

    def _written_once(self, launch: Launch, a: StepArguments, wanted: Expected) -> list[str]:
        """Check that each element of a sample that goes on is written once, and no other one."""
        written = np.zeros(self.memory.used // GRANULE, np.int64)
        for access in launch.trace.accesses:
            for part in range(0, access.size, GRANULE) if access.kind == "write" else ():
                np.add.at(written, (access.places + part) // GRANULE, 1)
        wrong = []
        for name in wanted.outputs.keys() - {"history"}:  # of which a row names the slot
            output = getattr(a, name)
            granules = output.itemsize // GRANULE
            begins = self.memory.place_of(output) // GRANULE + np.arange(len(output)) * output.stride(0) * granules
            times = written[begins[:, None] + np.arange(output[0].numel() * granules)]
            due = np.resize(wanted.live.numpy(), len(output)).astype(np.int64)
            for sample, place in np.argwhere(times != due[:, None])[:1]:
                count = f"{times[sample, place]} times instead of {due[sample]}"
                wrong.append(f"{name}: sample {sample} has its element at {place // granules} written {count}")
        return wrong

    def _compare(
        self, name: str, got: Tensor, wanted: Wanted, live: Tensor, host: Tensor | None, case: Case
    ) -> list[str]:
        wrong, totals = [], self.totals
        live = live.repeat(len(got) // case.batch).view(-1, *[1] * (got.dim() - 1)).expand(got.shape)
        same = equal(got, wanted.rounded)
        totals.elements += got.numel()
        totals.equal_to_reference += int(same.sum())
        if host is not None and case.exact:
            totals.compared_with_host += got.numel()
            wrong += _differences(name, got, host, equal(got, host), "the same code on the host")
        if case.equals_reference:
            wrong += _differences(name, got, wanted.rounded, same, "the reference, exactly")
        fine, units = errors(got, wanted, case)
        fine = torch.where(live, fine, same)
        wrong += _differences(name, got, wanted.exact, fine, "the reference")
        if got.dtype == torch.float32 and case.values != "special" and live.any():
            worst = float(units[live].max())
            if worst > totals.worst:
                totals.worst, totals.worst_case = worst, str(case)
        return wrong


def plain_arguments(a: StepArguments, case: Case) -> dict:
    """Return a step's arguments as the launch takes them."""
    return {**device_code.arguments_of(*a), "few_tiles": case.few_tiles}


def waves_of(case: Case, blocks: int) -> list[list[int]] | None:
    """Return which blocks run side by side: all, each alone, or up to four groups; drawn in any order."""
    if case.waves == "together":
        return None
    draw = random.Random(case.seed)
    order = draw.sample(range(blocks), blocks)
    if case.waves == "one by one":
        return [[block] for block in order]
    ends = [0, *sorted(draw.randrange(blocks + 1) for _ in range(3)), blocks]
    return [order[begin:end] for begin, end in pairwise(ends) if begin < end]


def _differences(name: str, got: Tensor, wanted: Tensor, fine: Tensor, what: str) -> list[str]:
    if fine.all():
        return []
    wrong = (~fine).nonzero()
    place = tuple(wrong[0].tolist())
    values = f"{got[place].item()!r} instead of {wanted[place].item()!r}"
    return [f"{name}: {len(wrong)} of {fine.numel()} elements differ from {what}, first {list(place)}: {values}"]


def _wrong_positions(a: StepArguments, wanted: Expected) -> list[str]:
    """Compare the cursor, the timesteps, and the state of torch's stream."""
    wrong = []
    for name in ("cursor", "timestep"):
        got, due = getattr(a, name), getattr(wanted, name)
        if got is not None and not torch.equal(got, due):
            wrong.append(f"{name}: {got.tolist()} instead of {due.tolist()}")
    if wanted.state is not None and a.philox.tolist() != wanted.state:
        wrong.append(f"state: {a.philox.tolist()} instead of {wanted.state}")
    return wrong
