"""Time two processes that share the predictions or the samples of a loop against one, model and all, on the CPU."""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.spawn import spawn

from fastguide import ClassifierFree, Composed, Guidance, NoiseSchedule, Sampler, ddim
from fastguide.sampling.distributed.dimension import Dimension

from ..report import machine
from .loops import LATENTS, MODELS, denoiser
from .timing import Times, describe

PROCESSES, STEPS = 2, 10
ONE, PREDICTIONS, SAMPLES = "Sampler, one process", "Sampler, shared predictions", "Sampler, shared samples"
AT_ONCE = "Sampler, shared predictions, no overlap"
CONVOLUTIONS = "convolutions"
_FEWEST, _COUNTED = 5, 3  # turns that count, of three each
_AGREEMENT = 1e-4  # relative: a model's sums depend on its batch


class Convolutions(torch.nn.Module):
    """A model that takes few times as long as sending its output; it is called like diffusers' models."""

    def __init__(self) -> None:
        super().__init__()
        layers = torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 4, 3, padding=1)
        self.layers = torch.nn.Sequential(*layers)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Predict the noise."""
        return (self.layers(sample) + encoder_hidden_states.mean((1, 2))[:, None, None, None],)


class Workload(NamedTuple):
    """A loop."""

    model: str
    conditions: int
    batch: int
    batched: bool

    @property
    def title(self) -> str:
        """The name in tables."""
        calls = "in one batch" if self.batched else "one by one"
        shape = (self.batch, *self.shape)
        return f"ranks: {self.model}, {self.conditions + 1} predictions {calls}, {shape}, {STEPS} steps"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return (4, 128, 128) if self.model == CONVOLUTIONS else LATENTS[self.model][1:]

    @property
    def guidance(self) -> Guidance:
        """Plain classifier-free guidance, or composed."""
        return ClassifierFree(5.0) if self.conditions == 1 else Composed([5.0] * self.conditions)


WORKLOADS = (
    Workload("tiny UNet", 1, 1, True),
    Workload("tiny UNet", 1, 8, True),
    Workload("small DiT", 1, 8, True),
    Workload("tiny UNet", 3, 1, False),
    Workload(CONVOLUTIONS, 3, 1, False),
)


def titles() -> list[str]:
    """Return the names of all loops."""
    return [workload.title for workload in WORKLOADS]


def measure(title: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of a loop, which two processes of their own measure."""
    (workload,) = (each for each in WORKLOADS if each.title == title)
    row = {"suite": "ranks", "workload": title}
    if not dist.is_available() or not dist.is_gloo_available():
        yield row | {"contender": "all", "status": "not run", "reason": "torch has no torch.distributed with gloo"}
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_process, (workload, seconds, folder), nprocs=PROCESSES)
        except Exception as error:  # of one of the processes
            yield row | {"contender": PREDICTIONS, "status": "failed", "reason": describe(error)}
            return
        yield from json.loads(Path(folder, "rows.json").read_text())


def _process(rank: int, workload: Workload, seconds: float, folder: str) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // PROCESSES, 1))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    rows = of_this_rank(workload, seconds)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def of_this_rank(workload: Workload, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of a loop: called by each of the processes of a group, of which the first one's clock counts."""
    row: dict[str, Any] = {"suite": "ranks", "workload": workload.title, "threads": torch.get_num_threads()}
    try:
        loop = Loop(workload)
    except ImportError:
        return [row | {"contender": "all", "status": "not run", "reason": "diffusers is not installed"}]
    calls = loop.contenders()
    reference = calls[ONE]()
    rows = []
    for name in list(calls):
        difference = (calls[name]() - reference).norm() / reference.norm()
        dist.broadcast(difference, 0)  # the first process alone has a reference
        if not difference < _AGREEMENT:
            del calls[name]
            reason = f"differs from one process by {difference:.1e}"
            rows.append(row | {"contender": name, "status": "wrong", "reason": reason})
    turns = _in_turns(calls, seconds)
    gather = loop.seconds_of_a_gather()
    times = {name: Times.of([turn.seconds for turn in of_one]) for name, of_one in turns.items()}
    used = {name: statistics.median(turn.processor_seconds for turn in of_one) for name, of_one in turns.items()}
    for name, found in times.items():
        more: dict[str, Any] = {"faster_than_one": times[ONE].median / found.median}
        more |= {"processor_seconds": used[name], "less_of_the_processor": used[ONE] / used[name]}
        more["others"] = statistics.median(turn.others for turn in turns[name])
        if name in (PREDICTIONS, AT_ONCE):
            more |= {"bytes_sent_a_step": loop.bytes_sent, "seconds_of_gathers_a_step": gather}
        rows.append(row | {"contender": name, "status": "ok", **found.fields, **more})
    return rows


class Loop:
    """A model, its inputs, and a sampler for each way of sharing them."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        network: Any = _network(workload.model)
        dit = workload.model.endswith("DiT")
        options = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if dit else {}

        def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            output: Tensor = network(x, timestep=t, encoder_hidden_states=y, return_dict=False, **options)[0]
            return output

        self.model = model
        generator = torch.Generator().manual_seed(1)
        width = MODELS.get(workload.model, {}).get("cross_attention_dim", 32) if not dit else 32
        self.x_T = torch.randn(workload.batch, *workload.shape, generator=generator)
        uncond, *cond = torch.randn(workload.conditions + 1, workload.batch, 77, width, generator=generator)
        self.conditions = {"uncond": uncond, "cond": cond if len(cond) > 1 else cond[0]}
        self.meshes = {
            name: init_device_mesh("cpu", shape, mesh_dim_names=("data", "guidance"))
            for name, shape in ((PREDICTIONS, (1, PROCESSES)), (SAMPLES, (PROCESSES, 1)))
        }

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """Return the ways; the first process alone does something in one of them."""
        first, alone = dist.get_rank() == 0, self._sampler(None)
        calls: dict[str, Callable[[], Tensor]] = {ONE: lambda: self._called(alone) if first else self.x_T}
        shared = self._sampler(self.meshes[PREDICTIONS])
        calls[PREDICTIONS] = lambda: self._called(shared)
        if not self.workload.batched:
            calls[AT_ONCE] = lambda: self._called_without_overlap(shared)
        if self.workload.batch > 1:
            by_samples = self._sampler(self.meshes[SAMPLES])
            calls[SAMPLES] = lambda: self._called(by_samples)
        return calls

    def _sampler(self, mesh: DeviceMesh | None) -> Sampler:
        table, batched = ddim(NoiseSchedule.scaled_linear(), STEPS), self.workload.batched
        return Sampler(self.model, table, self.workload.guidance, batched=batched, mesh=mesh)

    def _called(self, sampler: Sampler) -> Tensor:
        x_0: Tensor = sampler(self.x_T, **self.conditions)
        return x_0

    def _called_without_overlap(self, sampler: Sampler) -> Tensor:
        with _waiting_at_once():
            return self._called(sampler)

    @property
    def places(self) -> int:
        """Predictions that each process sends at a step."""
        return -(-(self.workload.conditions + 1) // PROCESSES)

    @property
    def bytes_sent(self) -> int:
        """What each process sends to the other one at a step."""
        return self.places * self.x_T.nbytes

    def seconds_of_a_gather(self) -> float:
        """Return the median seconds of a step's all-gathers alone, which nothing overlaps."""
        gathers = 1 if self.workload.batched else self.places
        ranks = Dimension(self.meshes[PREDICTIONS], "guidance")
        mine = torch.zeros(self.places // gathers * self.x_T.numel())
        found = []
        for _ in range(30):
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(gathers):
                ranks.all_gather(mine, "what is timed")
            found.append(time.perf_counter() - begin)
        return Times.of(found).median


def _network(model: str) -> torch.nn.Module:
    if model != CONVOLUTIONS:
        return denoiser(model, torch.device("cpu"))
    torch.manual_seed(0)
    return Convolutions().eval()


@contextmanager
def _waiting_at_once() -> Iterator[None]:
    """Let each all-gather end before what comes after its begin."""
    begin = Dimension.begin_all_gather

    def begin_and_end(self: Dimension, out: Tensor, mine: Tensor, what: str) -> Any:
        work = begin(self, out, mine, what)
        self.end(work, what)
        return work

    Dimension.begin_all_gather = begin_and_end  # type: ignore[method-assign]
    try:
        yield
    finally:
        Dimension.begin_all_gather = begin  # type: ignore[method-assign]


class Turn(NamedTuple):
    """A call that was timed."""

    seconds: float
    processor_seconds: float
    """What the process that takes most takes of its processor."""
    others: float
    """The share of all processors that others used meanwhile."""


def _in_turns(calls: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[Turn]]:
    """Time each call again and again, in turns of changing order, which is the same on all ranks.

    Two processes need two processors, which others may use: of each call, the third of its turns counts in which others
    used least.
    """
    found: dict[str, list[Turn]] = {name: [] for name in calls}
    shuffled, names = random.Random(0), list(calls)
    end = time.perf_counter() + seconds * len(calls) * _COUNTED
    goes_on = torch.ones(1)
    while goes_on.item():
        shuffled.shuffle(names)
        for name in names:
            found[name].append(_turn(calls[name]))
        goes_on[0] = float(time.perf_counter() < end or len(found[ONE]) < _FEWEST * _COUNTED)
        dist.broadcast(goes_on, 0)
    counted = len(found[ONE]) // _COUNTED
    return {name: sorted(turns, key=lambda turn: turn.others)[:counted] for name, turns in found.items()}


def _turn(call: Callable[[], Tensor]) -> Turn:
    dist.barrier()
    before, begin, used = machine.ticks(), time.perf_counter(), time.process_time()
    call()
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    after = machine.ticks()
    all_used, most = torch.tensor([used]), torch.tensor([used])
    dist.all_reduce(all_used)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return Turn(seconds, most.item(), machine.share_of_others(before, after, all_used.item()))
