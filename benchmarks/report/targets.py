"""Judge a run by the project's targets: each is a ratio within the run, or a time of the host.

A target is a function from the run to the measured value. Without a row that it needs it raises ``_MissingError``, and
the target is not run; if a row of ours is wrong or failed, it raises ``_BrokenError``, and the target is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..contenders.registry import COMPILED, is_ours
from ..measure import moments
from ..measure.pipelines import title as pipeline_title
from ..measure.solvers import DOUBLED, DROP_IN, large_title, small_title

Row = dict[str, Any]

_SMALL = "SD 512, ddim, classifier-free, (1, 4, 64, 64), float32"
_SMALL_NOISY = "SD 512, ddpm, classifier-free, (1, 4, 64, 64), float32"
_LARGE = "pixels, ddim, classifier-free, (64, 3, 256, 256), float32"
_SOLVERS = {"flow Euler": 4.0, "Euler": 4.0, "DPM++ 2M": 10.0, "UniPC 2": 25.0, "LMS 4": 200.0}
"""How many times faster than diffusers' a small loop has to be."""
_DROP_IN_STEPS = {
    "flow Euler": 4.0, "Euler": 4.0, "DPM++ 2M": 8.0, "UniPC 2": 20.0, "DEIS 3": 20.0, "LMS 4": 100.0,
    "SA-Solver": 20.0,
}  # fmt: skip
"""How many times faster than diffusers' scheduler's fastguide's has to be, step by step."""
_CAUSES: dict[str, Any] = {
    "flow Euler": {
        "cause": "the kernel is a third, and waits for the second-level cache; the rest: torch's new tensor, Python",
        "known_to": 3.6,
    },
}
"""What is known about misses of these, and down to where."""
_PIPELINES = {"Euler": 1.5, "flow Euler": 1.5, "DPM++ 2M": 3.0, "UniPC": 8.0}
"""How many times faster a pipeline whose model costs nothing has to be with each scheduler."""
_GUIDERS = {"rescaled": 10.0, "projected": 15.0, "tangential": 20.0}
"""How many times faster than diffusers' guider and step one with weights from moments has to be."""
_LARGE_SOLVERS = ("DPM++ 2M", "UniPC 2", "DPM++ 3M")
_ACCELERATED = "fastguide, accelerate(pipe)"
_BANDWIDTH_BYTES = 256e6  # of a step that shows a GPU's bandwidth
_SLACK = 1.02  # two runs of one program differ by that
_MEMORY_BOUND = 1e8  # bytes of a step that waits for the memory, where two runs differ by some percent


def _pipeline(scheduler: str, guidance: str = "classifier-free") -> str:
    return pipeline_title(scheduler, guidance, (1, 4, 64, 64))


_PIPELINE, _RESCALED = _pipeline("DDIM"), _pipeline("DDIM", "rescaled")


class _MissingError(Exception):
    """A row that a target needs was not measured."""


class _BrokenError(Exception):
    """A row of fastguide's that a target needs is wrong, or failed."""


class Measured(NamedTuple):
    """The value of a target; of a largest ratio also the workload and its bytes."""

    value: float
    workload: str | None = None
    bytes: int = 0


class Run:
    """The rows of a run, looked up by workload and contender."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def value(self, workload: str, contender: str, which: str = "seconds") -> float:
        """Return a measured value of a contender.

        Raises:
            _BrokenError: the contender is ours, and wrong or failed.
            _MissingError: it was not measured.
        """
        found = [r for r in self.rows if (r.get("workload"), r.get("contender")) == (workload, contender)]
        for row in found:
            if row["status"] == "ok":
                return float(row[which])
            if row["status"] in ("wrong", "failed") and is_ours(contender):
                raise _BrokenError(f"{contender} is {row['status']}: {row['reason']}")
        raise _MissingError(f"{contender!r} of {workload!r}")

    def fastest_compiled(self, workload: str, out: str = "") -> float:
        """Return the seconds of torch.compile's fastest mode; a mode that should have run and did not is missing."""
        names = {f"{mode}{out}" for mode in COMPILED}
        found = [r for r in self.rows if r.get("workload") == workload and r.get("contender") in names]
        broken = [r for r in found if r["status"] != "ok" and (r["status"] != "not run" or r.get("raised"))]
        if broken:
            raise _MissingError(f"{broken[0]['contender']!r} of {workload!r}: {broken[0]['reason']}")
        measured = [float(r["seconds"]) for r in found if r["status"] == "ok"]
        if not measured:
            raise _MissingError(f"'torch.compile{out}' of {workload!r}")
        return min(measured)

    def times_faster(self, workload: str, ours: str, rival: str) -> Measured:
        """Return the rival's time over ours."""
        return Measured(self.value(workload, rival) / self.value(workload, ours))


def large_step_over_copy(run: Run) -> Measured:
    """Return the time of the large step into an output over ``copy_``'s."""
    return Measured(run.value(_LARGE, "fastguide out=") / run.value(_LARGE, "copy_ of the same bytes"))


def slowest_large_solver(run: Run) -> Measured:
    """Return the largest time over ``copy_``'s, of large calls with a history."""
    ratios = []
    for workload in map(large_title, _LARGE_SOLVERS):
        step, copy = (run.value(workload, name) for name in ("fastguide out=", "copy_ of the same bytes"))
        ratios.append(Measured(step / copy, workload, int(run.value(workload, "fastguide out=", "bytes"))))
    return max(ratios)


def slowest_over_compile(run: Run, out: str) -> Measured:
    """Return the largest time over torch.compile's fastest, of all workloads of the run: none may be missing."""
    workloads = dict.fromkeys(row["workload"] for row in run.rows if row["suite"] == "steps")
    if not workloads:
        raise _MissingError("a workload with torch.compile")
    ratios, missing = [], []
    for workload in workloads:
        try:
            ratio = run.value(workload, f"fastguide{out}") / run.fastest_compiled(workload, out)
            ratios.append(Measured(ratio, workload, int(run.value(workload, f"fastguide{out}", "bytes"))))
        except _MissingError as error:
            missing.append(error)
    if missing and not (ratios and max(ratios).value > _SLACK):  # a workload that misses the target is reported anyway
        raise missing[0]
    return max(ratios)


def small_step_over_compile(run: Run) -> Measured:
    """Return how many times faster than torch.compile's fastest mode the small step is."""
    return Measured(run.fastest_compiled(_SMALL) / run.value(_SMALL, "fastguide"))


def small_noisy_step(run: Run) -> Measured:
    """Return the microseconds of a small DDPM step through the scheduler, less those of torch's noise."""
    seconds = run.value(_SMALL_NOISY, "fastguide's scheduler") - run.value(_SMALL_NOISY, "torch's noise alone")
    return Measured(1e6 * seconds)


def accuracy(run: Run) -> Measured:
    """Return diffusers' error over ours after 50 DDIM steps of a bfloat16 model."""
    errors = {
        row["contender"]: row["error"]
        for row in run.rows
        if row["suite"] == "accuracy"
        and row["status"] == "ok"
        and (row["solver"], row["dtype"]) == ("ddim", "bfloat16")
    }
    if not {"fastguide", "diffusers"} <= errors.keys():
        raise _MissingError("the accuracy of fastguide and diffusers")
    return Measured(float(errors["diffusers"] / errors["fastguide"]))


def host_time(run: Run) -> Measured:
    """Return the microseconds of the host per step of the loop itself."""
    return Measured(1e6 * run.value("an idle model, DDIM", "Sampler, host time a step"))


def tracing(run: Run) -> Measured:
    """Return the microseconds a step by which a pipeline that is accelerated exceeds guidance written into its step."""
    seconds = run.value(_PIPELINE, _ACCELERATED) - run.value(_PIPELINE, "fastguide, step(guidance_scale=)")
    return Measured(1e6 * seconds / 50)


def over_diffusers_guider(run: Run, name: str) -> Measured:
    """Return how many times faster than diffusers' guider and scheduler a step with weights from moments is."""
    return run.times_faster(moments.title(name, (8, 4, 128, 128)), "fastguide", "diffusers")


def over_the_plain_step(run: Run, shape: tuple[int, ...]) -> Measured:
    """Return the time of a step with rescaled guidance over that of a plain one, each from cold caches."""
    return Measured(run.value(moments.title("rescaled", shape), moments.PLAIN, moments.RATIO))


def smallest_share_of_copy(run: Run) -> Measured:
    """Return the smallest bandwidth over ``copy_``'s, of all steps without noise that move 256 MB or more."""
    # The workloads of all contenders' rows: a kernel of ours that failed has no bytes
    large = {r["workload"]: r for r in run.rows if r["suite"] == "steps" and r.get("bytes", 0) >= _BANDWIDTH_BYTES}
    shares = [run.value(w, "fastguide out=", "share_of_copy") for w, row in large.items() if not row["adds_noise"]]
    if not shares:
        raise _MissingError("a step of 256 MB or more")
    return Measured(min(shares))


def small_step_in_a_graph(run: Run) -> Measured:
    """Return the microseconds of the small step in a CUDA graph."""
    return Measured(1e6 * run.value(_SMALL, "fastguide out=, in a graph"))


def unet_loop(run: Run, rival: str) -> Measured:
    """Return how many times faster than a rival the loop over a tiny UNet is."""
    return run.times_faster("tiny UNet, 50 steps", "Sampler, a graph of a step", rival)


class Target(NamedTuple):
    """A promise, the function that measures it, the bound, and whether the value may be at most or at least that."""

    name: str
    measure: Callable[[Run], Measured]
    at_most: float | None = None
    at_least: float | None = None
    cause: str = ""  # what is known about a miss on the CPU
    known_to: float = 0.0  # the cause is known for values on the better side of this only

    def met(self, value: float) -> bool:
        """Return whether a value keeps the promise."""
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)

    def explained(self, value: float) -> bool:
        """Return whether the cause of a miss by this much is known."""
        return value < self.known_to if self.at_most is not None else value > self.known_to

    @property
    def expected(self) -> str:
        """The bound, for tables."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


def targets(device: str) -> list[Target]:
    """Return the targets for a type of device."""
    found = [*_step_targets(), *_solver_targets(), *_moments_targets(), *_pipeline_targets()]
    return found if device == "cpu" else [*found, *_gpu_targets()]


def _step_targets() -> list[Target]:
    return [
        Target("a large step into out=, over copy_ of the same bytes", large_step_over_copy, at_most=1.15),
        Target(
            "a step into out=, over torch.compile of the same formula, where it is slowest",
            lambda run: slowest_over_compile(run, " out="),
            at_most=_SLACK,
        ),
        Target(
            "a step into a new output, over torch.compile of the same formula, where it is slowest",
            lambda run: slowest_over_compile(run, ""),
            at_most=_SLACK,
        ),
        Target(
            "a small step: times faster than torch.compile",
            small_step_over_compile,
            at_least=3,
            cause="the rest is Python, whose code the model has evicted from the caches",
            known_to=1.5,
        ),
        Target(
            "a small DDIM step through fastguide's scheduler: times faster than diffusers",
            lambda run: run.times_faster(_SMALL, "fastguide's scheduler", "diffusers"),
            at_least=6,
            cause="the rest is Python, whose code the model has evicted from the caches",
            known_to=5,
        ),
        Target(
            "a small DDPM step through fastguide's scheduler, less torch's noise alone, in us",
            small_noisy_step,
            at_most=15,
            cause="the rest is Python, whose code the model has evicted from the caches",
            known_to=30,
        ),
        Target(
            "50 DDIM steps of a bfloat16 model: times nearer to float64 than diffusers",
            accuracy,
            at_least=5,
            cause="the rest is the rounding of the model's own output",
            known_to=3,
        ),
        Target("host time of the loop per step, in us", host_time, at_most=10),
    ]


def _solver_targets() -> list[Target]:
    return [
        Target(
            "a large call with a history into out=, over copy_ of the same bytes", slowest_large_solver, at_most=1.15
        ),
        *(
            Target(
                f"a small loop of {name}: times faster than diffusers",
                lambda run, name=name: run.times_faster(small_title(name), "fastguide", "diffusers"),  # type: ignore[misc]
                at_least=least,
                **_CAUSES.get(name, {}),
            )
            for name, least in _SOLVERS.items()
        ),
        *(
            Target(
                f"steps of {name} through fastguide's scheduler: times faster than diffusers'",
                lambda run, name=name: run.times_faster(small_title(name), DROP_IN, DOUBLED),  # type: ignore[misc]
                at_least=least,
                **_CAUSES.get(name, {}),
            )
            for name, least in _DROP_IN_STEPS.items()
        ),
    ]


def _moments_targets() -> list[Target]:
    return [
        *(
            Target(
                f"a step with {name} guidance, (8, 4, 128, 128): times faster than diffusers' guider and step",
                partial(over_diffusers_guider, name=name),
                at_least=least,
            )
            for name, least in _GUIDERS.items()
        ),
        *(
            Target(
                f"a step with rescaled guidance, {shape}: over the plain step",
                partial(over_the_plain_step, shape=shape),
                at_most=most,
            )
            for shape, most in (((2, 4, 64, 64), 1.5), ((64, 3, 256, 256), 1.25))
        ),
        Target(
            "a small step with rescaled guidance: times faster than the same formula compiled",
            lambda run: run.times_faster(moments.title("rescaled", (2, 4, 64, 64)), "fastguide", moments.COMPILED),
            at_least=2,
        ),
    ]


def _pipeline_targets() -> list[Target]:
    return [
        *(
            Target(
                f"the same pipeline with {name}: times faster than diffusers",
                lambda run, name=name: run.times_faster(_pipeline(name), _ACCELERATED, "diffusers"),  # type: ignore[misc]
                at_least=least,
            )
            for name, least in _PIPELINES.items()
        ),
        Target(
            "a pipeline whose model costs nothing, accelerated: times faster than diffusers",
            lambda run: run.times_faster(_PIPELINE, _ACCELERATED, "diffusers"),
            at_least=2.5,
        ),
        Target(
            "the same with rescaled guidance, which is found in what the pipeline computes",
            lambda run: run.times_faster(_RESCALED, _ACCELERATED, "diffusers"),
            at_least=1.0,
        ),
        Target(
            "what finding a pipeline's guidance costs a step, in us",
            tracing,
            at_most=15,
            cause="the hook's and the operators' own Python, whose code the step has evicted from the caches",
            known_to=40,
        ),
    ]


def _gpu_targets() -> list[Target]:
    return [
        Target(
            "steps of 256 MB or more into out=: bandwidth over that of copy_", smallest_share_of_copy, at_least=0.92
        ),
        Target("a small step in a graph, in us", small_step_in_a_graph, at_most=3),
        Target(
            "a tiny UNet's loop of 50 steps: times faster than diffusers",
            lambda run: unet_loop(run, "diffusers"),
            at_least=3,
        ),
        Target(
            "a tiny UNet's loop of 50 steps: times faster than diffusers, compiled model",
            lambda run: unet_loop(run, "diffusers, compiled model"),
            at_least=1.3,
        ),
    ]


def judged(rows: Sequence[Row], device: str, promises: Sequence[Target] | None = None) -> list[Row]:
    """Return a row for each target: met, missed with the cause, or not run with the row that it needs.

    ``promises``: the targets; ``None``: those of ``python -m benchmarks`` for a type of device.
    """
    run, found = Run(rows), []
    for target in targets(device) if promises is None else promises:
        row: Row = {"suite": "targets", "target": target.name, "expected": target.expected}
        try:
            measured = target.measure(run)
        except _MissingError as missing:
            found.append(row | {"status": "not run", "reason": f"needs {missing}"})
            continue
        except _BrokenError as broken:
            found.append(row | {"status": "missed", "reason": str(broken)})
            continue
        row["measured"] = measured.value
        if measured.workload is not None:
            row["slowest"] = measured.workload
        if target.met(measured.value):
            found.append(row | {"status": "met"})
        else:
            found.append(row | {"status": "missed", "reason": _cause(target, measured, device)})
    return found


def _cause(target: Target, measured: Measured, device: str) -> str:
    """Return the known cause of a miss of this size; everything else is unexplained."""
    if device == "cpu" and target.cause and target.explained(measured.value):
        return target.cause
    if device == "cpu" and measured.bytes > _MEMORY_BOUND and measured.value < 1.1:
        return "the step waits for the memory, where two runs differ by some percent"
    return "unexplained"
