"""What fastguide promises, and whether this run kept it: ratios within the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..contenders.registry import COMPILED, is_ours

Row = dict[str, Any]

_SMALL = "SD 512, ddim, classifier-free, (1, 4, 64, 64), float32"
_SMALL_NOISY = "SD 512, ddpm, classifier-free, (1, 4, 64, 64), float32"
_LARGE = "pixels, ddim, classifier-free, (64, 3, 256, 256), float32"
_GREAT = 256e6  # bytes of a step that shows a GPU's bandwidth
_SLACK = 1.02  # two runs of one program differ by that


_WHY: dict[str, tuple[Callable[[float], bool], str]] = {
    # What is known of targets that are missed on the CPU, as long as they are missed by no more than was looked into
    "a small step:": (lambda v: v > 1.25, "what is left are checks and the dispatcher, whose code a model has evicted"),
    "a small DDIM step through": (lambda v: v > 1.5, "so many times less is about what copy_ takes"),
    "a small DDPM step through": (lambda v: v < 80, "what is left is Python's, whose code a model has evicted"),
    "50 DDIM steps": (lambda v: v > 3, "what is left is the rounding of the model's own output"),
}
_WAITING = 1e8  # bytes of a step that waits for the memory, where two runs differ by some percent
_WAITS = (lambda v: v < 1.1, "it waits for the memory, where two runs differ by some percent")


class _Slowest(NamedTuple):
    """The largest of several ratios, of which workload it is, and how many bytes that moves."""

    ratio: float
    workload: str
    bytes: int


class _MissingError(Exception):
    """A row that a target needs was not measured."""


class _BrokenError(Exception):
    """A row of fastguide's that a target needs is wrong, or failed."""


def judged(rows: Sequence[Row], device: str) -> list[Row]:
    """A row for each target: met, missed, or why it was not measured."""
    found = []
    for name, expected, measure, met in _targets(rows, device):
        row: Row = {"suite": "targets", "target": name, "expected": expected}
        try:
            found_value = measure()
        except _MissingError as missing:
            found.append(row | {"status": "not run", "reason": f"needs {missing}"})
            continue
        except _BrokenError as broken:
            found.append(row | {"status": "missed", "reason": str(broken)})
            continue
        slowest = found_value if isinstance(found_value, _Slowest) else None
        value = found_value.ratio if isinstance(found_value, _Slowest) else found_value
        where = {} if slowest is None else {"slowest": slowest.workload}
        status = {"status": "met"} if met(value) else {"status": "missed", "reason": _why(name, value, device, slowest)}
        found.append(row | {"measured": value} | where | status)
    return found


def _why(name: str, value: float, device: str, slowest: _Slowest | None) -> str:
    reasons = [known for beginning, known in _WHY.items() if name.startswith(beginning)]
    if slowest is not None and slowest.bytes > _WAITING:
        reasons.append(_WAITS)
    said = [reason for known, reason in reasons if device == "cpu" and known(value)]
    return said[0] if said else "unexplained"


Measure = Callable[[], "float | _Slowest"]


def _targets(rows: Sequence[Row], device: str) -> list[tuple[str, str, Measure, Callable[[float], bool]]]:
    def seconds(workload: str, contender: str, which: str = "seconds") -> float:
        for row in rows:
            if (row.get("workload"), row.get("contender")) == (workload, contender) and row["status"] == "ok":
                return float(row[which])
            of_it = (row.get("workload"), row.get("contender")) == (workload, contender)
            if of_it and row["status"] in ("wrong", "failed") and is_ours(contender):
                raise _BrokenError(f"{contender} is {row['status']}: {row['reason']}")
        raise _MissingError(f"{contender!r} of {workload!r}")

    def fastest_compiled(workload: str, out: str = "") -> float:
        """Of its modes, each of which has to be there unless it is none for this device."""
        names = {f"{mode}{out}" for mode in COMPILED}
        found = [r for r in rows if r.get("workload") == workload and r.get("contender") in names]
        measured = [float(r["seconds"]) for r in found if r["status"] == "ok"]
        broken = [r for r in found if r["status"] != "ok" and (r["status"] != "not run" or r.get("raised"))]
        if broken:
            raise _MissingError(f"{broken[0]['contender']!r} of {workload!r}: {broken[0]['reason']}")
        if not measured:
            raise _MissingError(f"'torch.compile{out}' of {workload!r}")
        return min(measured)

    def slowest_beside_compile(out: str) -> _Slowest:
        """Beside the fastest of its modes, on every workload that was asked for: none may be missing."""
        asked = dict.fromkeys(row["workload"] for row in rows if row["suite"] == "steps")
        if not asked:
            raise _MissingError("a workload with torch.compile")
        ratios, missing = [], []
        for workload in asked:
            try:
                ratio = seconds(workload, f"fastguide{out}") / fastest_compiled(workload, out)
                ratios.append(_Slowest(ratio, workload, int(seconds(workload, f"fastguide{out}", "bytes"))))
            except _MissingError as error:
                missing.append(error)
        if missing and not (ratios and max(ratios).ratio > _SLACK):  # a miss is one also if others are missing
            raise missing[0]
        return max(ratios)

    def accuracy() -> float:
        errors = {
            row["contender"]: row["error"]
            for row in rows
            if row["suite"] == "accuracy"
            and row["status"] == "ok"
            and (row["solver"], row["dtype"]) == ("ddim", "bfloat16")
        }
        if not {"fastguide", "diffusers"} <= errors.keys():
            raise _MissingError("the accuracy of fastguide and diffusers")
        return float(errors["diffusers"] / errors["fastguide"])

    def least_share_of_copy() -> float:
        # The rows of the others, too: a kernel that failed shows as broken
        great = {row["workload"]: row for row in rows if row["suite"] == "steps" and row.get("bytes", 0) >= _GREAT}
        shares = [seconds(w, "fastguide out=", "share_of_copy") for w, row in great.items() if not row["adds_noise"]]
        if not shares:
            raise _MissingError("a step of 256 MB or more")
        return min(shares)

    host = 30.0 if device == "cpu" else 10.0
    found: list[tuple[str, str, Measure, Callable[[float], bool]]] = [
        (
            "a large step into out=, over copy_ of the same bytes",
            "<= 1.15",
            lambda: seconds(_LARGE, "fastguide out=") / seconds(_LARGE, "copy_ of the same bytes"),
            lambda v: v <= 1.15,
        ),
        (
            "a step into out=, over torch.compile of the same formula, where it is slowest",
            f"<= {_SLACK}",
            lambda: slowest_beside_compile(" out="),
            lambda v: v <= _SLACK,
        ),
        (
            "a step into a new output, over torch.compile of the same formula, where it is slowest",
            f"<= {_SLACK}",
            lambda: slowest_beside_compile(""),
            lambda v: v <= _SLACK,
        ),
        (
            "a small step: times faster than torch.compile",
            ">= 3",
            lambda: fastest_compiled(_SMALL) / seconds(_SMALL, "fastguide"),
            lambda v: v >= 3,
        ),
        (
            "a small DDIM step through fastguide's scheduler: times faster than diffusers",
            ">= 20",
            lambda: seconds(_SMALL, "diffusers") / seconds(_SMALL, "fastguide's scheduler"),
            lambda v: v >= 20,
        ),
        (
            "a small DDPM step through fastguide's scheduler, less torch's noise alone, in us",
            "<= 25",
            lambda: (
                1e6 * (seconds(_SMALL_NOISY, "fastguide's scheduler") - seconds(_SMALL_NOISY, "torch's noise alone"))
            ),
            lambda v: v <= 25,
        ),
        (
            "50 DDIM steps of a bfloat16 model: times nearer to float64 than diffusers",
            ">= 5",
            accuracy,
            lambda v: v >= 5,
        ),
        (
            "what the loop costs the host a step, in us",
            f"<= {host:g}",
            lambda: 1e6 * seconds("an idle model, DDIM", "Sampler, host time a step"),
            lambda v: v <= host,
        ),
    ]
    if device != "cpu":
        found += [
            (
                "steps of 256 MB or more into out=: bandwidth over that of copy_",
                ">= 0.92",
                least_share_of_copy,
                lambda v: v >= 0.92,
            ),
            (
                "a small step in a graph, in us",
                "<= 3",
                lambda: 1e6 * seconds(_SMALL, "fastguide out=, in a graph"),
                lambda v: v <= 3,
            ),
        ]
        for rival, least in (("diffusers", 3.0), ("diffusers, compiled model", 1.3)):
            found.append(
                (
                    f"a tiny UNet's loop of 50 steps: times faster than {rival}",
                    f">= {least:g}",
                    lambda rival=rival: (
                        seconds("tiny UNet, 50 steps", rival)  # type: ignore[misc]
                        / seconds("tiny UNet, 50 steps", "Sampler, a graph of a step")
                    ),
                    lambda v, least=least: v >= least,  # type: ignore[misc]
                )
            )
    return found
