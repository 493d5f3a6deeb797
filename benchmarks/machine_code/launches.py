"""The launches whose instructions are counted: steps of a large batch, with tensors that nothing touches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastguide
from fastguide.guidance.weights import UNGUIDED
from fastguide.step.noise import TorchGrid
from tests.support.device_code import NAMES, Recorded, arguments_of, backward, record

from ..workloads import SCHEDULE
from .thread import Constants, Memory, Region

LARGE, SMALL = (64, 4, 512, 512), (1, 4, 64, 64)
STEPS, STEP = 50, 7
MULTIPROCESSORS, THREADS = 132, 2048  # of an H100 and an H200, whose number decides how torch draws its noise


SOLVERS: dict[str, Callable[[], fastguide.StepTable]] = {
    "DPM++ 2M": lambda: fastguide.dpm_solver(SCHEDULE, STEPS),
    "UniPC 2": lambda: fastguide.unipc(SCHEDULE, STEPS),
    "LMS 4": lambda: fastguide.lms(SCHEDULE, STEPS),
}


@dataclass(frozen=True)
class Launch:
    """A step's tensors and options; those of an element each are named in ``data``."""

    label: str
    predictions: int = 2
    noise: str = "none"  # none, given, portable, torch
    state: torch.dtype = torch.float32
    model: torch.dtype = torch.float32
    shape: tuple[int, ...] = LARGE
    clipped: bool = False
    cursor: bool = False
    copies: int = 0
    original: bool = False
    gradient: bool = False
    variance: bool = False
    masked: bool = False
    history: bool = False
    solver: str = ""  # of SOLVERS, whose row goes on from earlier calls; otherwise DDIM's, or with noise DDPM's
    few_tiles: int = 1024  # a launch of more has two vectors a thread, where its variant may
    offset: int = 0  # elements between a multiple of 16 bytes and each tensor
    backward: bool = False  # whether it is the way back: the gradients of the sample and the predictions


@dataclass(frozen=True)
class Prepared:
    """A launch as the library would make it; ``tensors`` keep its memory."""

    launch: Launch
    recorded: Recorded
    plain: dict[str, object]  # what it was recorded of
    tensors: dict[str, Tensor]
    data: tuple[str, ...]  # the names of those that are read or written element by element

    def memory(self) -> Memory:
        """Return the launch's memory."""
        return Memory(
            [Region(n, t.data_ptr(), t.numel() * t.element_size(), n in self.data) for n, t in self.tensors.items()]
        )

    def constants(self, architecture: str) -> Constants:
        """Return the launch's constant bank."""
        recorded = self.recorded
        return Constants(architecture, recorded.blocks, recorded.threads, recorded.parameters)

    def bytes(self) -> int:
        """Count what the step reads and writes: each element of each tensor once, of a history what its row names."""
        sizes = {name: self.tensors[name].numel() * self.tensors[name].element_size() for name in self.data}
        if self.launch.solver:
            row = {name: float(values[STEP]) for name, values in SOLVERS[self.launch.solver]().coefficients().items()}
            used = sum(row[f"out_hist_{slot}"] != 0 for slot in range(3)) + (row["hist_slot"] >= 0)
            sizes["history"] = used * self.tensors["sample"].numel() * self.tensors["history"].element_size()
        return sum(sizes.values())


BFLOAT16 = torch.bfloat16
HOT = (
    Launch("2 predictions, no noise, float32"),
    Launch("2 predictions, no noise, clipped, float32", clipped=True),
    Launch("2 predictions, no noise, float32 state, bfloat16 model", model=BFLOAT16),
    Launch("2 predictions, no noise, bfloat16", state=BFLOAT16, model=BFLOAT16),
    Launch("2 predictions, given noise, float32", noise="given"),
    Launch("2 predictions, given noise, bfloat16", noise="given", state=BFLOAT16, model=BFLOAT16),
    Launch("2 predictions, portable noise, float32", noise="portable"),
    Launch("2 predictions, portable noise, float32 state, bfloat16 model", noise="portable", model=BFLOAT16),
    Launch("2 predictions, portable noise, bfloat16", noise="portable", state=BFLOAT16, model=BFLOAT16),
    Launch(
        "2 predictions, portable noise, clipped, bfloat16",
        noise="portable",
        state=BFLOAT16,
        model=BFLOAT16,
        clipped=True,
    ),
    Launch("2 predictions, torch noise, float32", noise="torch"),
    Launch("2 predictions, torch noise, float32 state, bfloat16 model", noise="torch", model=BFLOAT16),
    Launch("2 predictions, torch noise, bfloat16", noise="torch", state=BFLOAT16, model=BFLOAT16),
    Launch("2 predictions, no noise, cursor, staged copies, bfloat16 model", model=BFLOAT16, cursor=True, copies=2),
    Launch(
        "2 predictions, torch noise, cursor, float32 state, bfloat16 model", noise="torch", model=BFLOAT16, cursor=True
    ),
    Launch("small, 2 predictions, no noise, float32", shape=SMALL),
    Launch("small, 2 predictions, no noise, cursor, bfloat16 model", model=BFLOAT16, cursor=True, shape=SMALL),
    Launch("2 predictions, DPM++ 2M's history, float32", solver="DPM++ 2M"),
    Launch("2 predictions, UniPC 2's history, float32", solver="UniPC 2"),
    Launch("2 predictions, LMS 4's history, float32", solver="LMS 4"),
    Launch("2 predictions, UniPC 2's history, float32 state, bfloat16 model", solver="UniPC 2", model=BFLOAT16),
    Launch("1 prediction, no noise, float32", predictions=1),
    Launch("1 prediction, no noise, bfloat16", predictions=1, state=BFLOAT16, model=BFLOAT16),
    Launch("backward, 2 predictions, float32", backward=True),
    Launch("backward, 2 predictions, clipped, float32", backward=True, clipped=True),
    Launch(
        "backward, 2 predictions, clipped, float32 state, bfloat16 model", backward=True, clipped=True, model=BFLOAT16
    ),
    Launch("backward, 2 predictions, clipped, bfloat16", backward=True, clipped=True, state=BFLOAT16, model=BFLOAT16),
)


def prepare(launch: Launch) -> Prepared:
    """Make a launch's tensors, of which those of the elements are not initialised, and record it."""
    if launch.backward:
        return _prepare_backward(launch)
    batch = launch.shape[0]
    tensors, predictions = elements(launch)
    data = (*tensors, *(f"prediction {k}" for k in range(len(predictions))))
    guidance = guidance_of(launch.predictions)
    table = table_of(launch.solver, launch.noise != "none", launch.clipped)
    tensors |= {
        "rows": table.device_rows("epsilon" if launch.gradient else None, torch.float32),
        "weights": guidance.weights(torch.device("cpu"), torch.float32).contiguous(),
    }
    if launch.noise == "portable":
        tensors["seeds"] = torch.arange(batch)
    if launch.noise == "torch":  # with a cursor the state is on the device
        tensors["philox"] = torch.tensor([5, 16, 0] if launch.cursor else [5, 16])
    if launch.cursor:
        cursor = fastguide.Cursor().start(table, STEP)
        tensors |= {"cursor": cursor.state, "timestep": cursor.timestep}
    elements_in_all = batch * tensors["sample"][0].numel()
    values: dict[str, object] = {
        **tensors,
        "predictions": predictions,
        "index": STEP,
        "philox_threads": TorchGrid.of(elements_in_all, MULTIPROCESSORS, THREADS).threads if "philox" in tensors else 0,
    }
    plain = {**arguments_of(*(values.get(name) for name in NAMES)), "few_tiles": launch.few_tiles}
    tensors |= {f"prediction {k}": prediction for k, prediction in enumerate(predictions)}
    return Prepared(launch, record(plain), plain, tensors, data)


def _prepare_backward(launch: Launch) -> Prepared:
    """Do the same for the way back of DDIM's step; ``out`` is the gradient of the sample."""
    made, predictions = elements(launch)
    came = made["sample"]
    read = {"sample": torch.empty_like(came)} if launch.clipped else {}
    read |= {f"prediction {k}": p for k, p in enumerate(predictions)} if launch.clipped else {}
    table = table_of("", False, launch.clipped)
    weights = guidance_of(launch.predictions).weights(torch.device("cpu"), torch.float32).contiguous()
    small = {"rows": table.device_rows(None, torch.float32), "weights": weights}
    values: dict[str, object] = {"out": came, "sample": read.get("sample", came), "index": STEP, **small}
    values |= {"predictions": predictions if launch.clipped else [came] * launch.predictions, "philox_threads": 0}
    arguments = [values.get(name) for name in NAMES]
    of_predictions = [torch.empty_like(p) for p in predictions]
    gradients = {"grad_out": came, "grad_sample": made["out"], "grad_predictions": of_predictions}
    written = {f"gradient {k}": grad for k, grad in enumerate(of_predictions)}
    tensors = {"out": made["out"], "came": came, **read, **written}
    data = tuple(tensors)
    recorded = backward.record(None, *arguments, **gradients)
    return Prepared(launch, recorded, arguments_of(*arguments), tensors | small, data)


@functools.cache
def table_of(solver: str, noisy: bool, clipped: bool) -> fastguide.StepTable:
    """Return the table of a solver's name, or else DDPM's, which draws noise, or DDIM's."""
    if solver:
        return SOLVERS[solver]()
    return (fastguide.ddpm if noisy else fastguide.ddim)(SCHEDULE, STEPS, clip_sample_range=1.0 if clipped else None)


def elements(launch: Launch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Make the tensors that are read or written element by element, predictions apart."""
    copies = (launch.copies * launch.shape[0], *launch.shape[1:])
    names = {"out": True, "original": launch.original, "sample": True, "gradient": launch.gradient}
    names |= {"variance": launch.variance, "noise": launch.noise == "given"}
    names |= dict.fromkeys(("mask", "known", "known_noise"), launch.masked)

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.empty(size + launch.offset, dtype=dtype)[launch.offset :].view(shape)

    tensors = {name: make(launch.shape, launch.state) for name, wanted in names.items() if wanted}
    if launch.variance:
        tensors["variance"] = make(launch.shape, launch.model)
    if launch.copies:
        tensors["staged"] = make(copies, launch.model)
    if launch.history or launch.solver:
        slots = SOLVERS[launch.solver]().history_slots if launch.solver else 3
        tensors["history"] = make((slots * launch.shape[0], *launch.shape[1:]), torch.float32)
    return tensors, [make(launch.shape, launch.model) for _ in range(launch.predictions)]


def guidance_of(predictions: int) -> fastguide.Guidance:
    """Return a guidance of that many predictions."""
    if predictions == 1:
        return UNGUIDED
    return fastguide.ClassifierFree(7.5) if predictions == 2 else fastguide.Composed([7.5] * (predictions - 1))
