"""The figures of the hot launches: of the library's code now, and the committed ones that a test compares with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.machine_code import resource_usage

from .estimate import GPUS, WARP, Estimate, blocks, estimate
from .launches import HOT, Launch, Prepared, prepare
from .sass import compiler, read_kernels
from .trace import Trace, follow

ARCHITECTURE = "sm_90"
COMMITTED = Path(__file__).with_name("counts.json")
COMMAND = "python -m benchmarks.machine_code --write"
GROWTH = 1.05  # by which a count may exceed the committed one
IN_FLIGHT = 48 * 1024  # bytes of a multiprocessor
THREAD = 77  # of the block in the middle: in its third warp, as one of the first counts blocks


class Figures(NamedTuple):
    """What one thread does, and how many of them there are at a time."""

    kernel: str
    instructions: int  # that a thread issues
    elements: int  # that it computes
    loads: int  # bytes of elements that it loads before the first use of any
    narrowest: int  # bytes of its narrowest access to elements
    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int  # bytes of a block
    blocks: int  # on a multiprocessor
    in_flight: int  # bytes that these load at once
    estimates: dict[str, Estimate]  # by GPU

    @property
    def per_8_elements(self) -> float:
        """Instructions of a thread for 8 of its elements."""
        return self.instructions * 8 / self.elements


def measure(library: Path, launches: tuple[Launch, ...] = HOT) -> dict[str, Figures]:
    """Trace a thread of each launch; the figures by the launches' labels."""
    prepared = [prepare(launch) for launch in launches]
    kernels = read_kernels(library, ARCHITECTURE, sorted({p.recorded.kernel for p in prepared}))
    usage = {name: used for architecture, name, used in resource_usage(library) if architecture == ARCHITECTURE}
    found = {}
    for p in prepared:
        kernel = kernels[p.recorded.kernel]
        trace = follow(kernel, p.constants(ARCHITECTURE), p.memory(), p.recorded.blocks // 2, THREAD)
        found[p.launch.label] = _figures(p, trace, usage[p.recorded.kernel])
    return found


def _figures(p: Prepared, trace: Trace, used: Any) -> Figures:
    out = p.tensors["out"]
    elements = sum(store.size for store in trace.stores if store.region == "out") // out.element_size()
    resident = blocks(used.registers, used.shared, p.recorded.threads)
    warps = out.numel() / elements / WARP
    return Figures(
        kernel=p.recorded.kernel,
        instructions=trace.instructions,
        elements=elements,
        loads=trace.in_flight,
        narrowest=min(access.size for access in (*trace.loads, *trace.stores) if access.data),
        registers=used.registers,
        spilled=used.stack + used.local,
        shared=used.shared,
        blocks=resident,
        in_flight=resident * p.recorded.threads * trace.in_flight,
        estimates={gpu.name: estimate(gpu, p.bytes(), warps, trace.instructions) for gpu in GPUS},
    )


# ---- The committed figures ----


def record(library: Path, figures: dict[str, Figures]) -> dict[str, Any]:
    """Return what is committed of figures."""
    kept = ("instructions", "elements", "registers", "in_flight")
    counts = {label: {name: getattr(f, name) for name in kept} for label, f in figures.items()}
    return {"architecture": ARCHITECTURE, "compiler": compiler(library, ARCHITECTURE), "launches": counts}


def write(library: Path, figures: dict[str, Figures], file: Path = COMMITTED) -> None:
    """Commit figures: the next comparisons are with these."""
    file.write_text(json.dumps(record(library, figures), indent=2) + "\n")


def committed(file: Path = COMMITTED) -> dict[str, Any]:
    """Read the committed figures."""
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def worse(now: dict[str, Figures], before: dict[str, Any]) -> list[str]:
    """Say of each launch what is worse than in the committed figures, beyond what is allowed."""
    found = []
    if now.keys() != before["launches"].keys():
        found.append(f"other launches are committed: {sorted(now.keys() ^ before['launches'].keys())}")
    for label in sorted(now.keys() & before["launches"].keys()):
        figures, old = now[label], before["launches"][label]
        count = old["instructions"] * 8 / old["elements"]
        if figures.per_8_elements > count * GROWTH:
            by = f"{figures.per_8_elements / count - 1:.1%} above {count:.0f}"
            found.append(f"{label}: {figures.per_8_elements:.0f} instructions for 8 elements, {by}")
        if figures.in_flight < min(IN_FLIGHT, old["in_flight"]):
            found.append(
                f"{label}: {figures.registers} registers leave {figures.in_flight / 1024:.0f} kB in flight, "
                f"less than {min(IN_FLIGHT, old['in_flight']) / 1024:.0f} kB"
            )
    return [*found, f"if that is as it should be: {COMMAND}"] if found else []
