"""What the tests of sampling by several processes sample: by every rank with a mesh, and by one process without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastguide
from fastguide import (
    AdaptiveProjected,
    Classifier,
    ClassifierFree,
    Composed,
    Guidance,
    NoiseSchedule,
    Perturbed,
    Sampler,
    StepTable,
    ddim,
    ddpm,
    dpm_solver,
    portable_noise,
)
from fastguide.sampling import capture
from fastguide.sampling.distributed.dimension import Dimension
from tests.support.ranks import mesh_of
from tests.support.recorded_graph import RecordedGraph

SCHEDULE = NoiseSchedule.linear()
SHAPE = (2, 4, 4)


def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Depend on the sample, the time and the condition; a row's bits do not depend on the others."""
    rows = (slice(None), *[None] * (x.dim() - 1))
    return (x * y[rows] / (1 + x * x) + 0.001 * t[rows]).to(x.dtype)


def model_of_mapping(x: Tensor, t: Tensor, text: Tensor, more: dict[str, Tensor]) -> Tensor:
    return model(x, t, text[:, 0] + more["scale"])


def model_with_variance(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([model(x, t, y), 0.5 * model(x, t, 1 - y)], 1)


class Case(NamedTuple):
    guidance: Guidance | None
    table: StepTable = ddpm(SCHEDULE, 4)
    options: dict[str, Any] = {}  # noqa: RUF012
    model: Callable[..., Tensor] = model
    more: dict[str, Any] = {}  # noqa: RUF012  # of the call

    @property
    def predictions(self) -> int:
        return 1 if self.guidance is None else self.guidance.num_conditions


def of_moments() -> Guidance:
    return AdaptiveProjected([3.0, 4.0, 5.0, 6.0, 7.0], norm_threshold=2.0)


def with_momentum() -> Guidance:
    return AdaptiveProjected([3.0, 4.0, 5.0, 6.0, 7.0], norm_threshold=2.0, momentum=-0.6)


CASES = {
    "none": Case(None),
    "classifier-free": Case(ClassifierFree(3.0)),
    "a scale each": Case(ClassifierFree([1.0, 3.0, 5.0, 7.0, 9.0])),
    "moments, a scale each": Case(of_moments()),
    "momentum, a scale each": Case(with_momentum()),
    "one by one": Case(ClassifierFree(3.0), options={"batched": False}),
    "composed": Case(Composed([1.5, 2.0])),
    "perturbed, one by one": Case(Perturbed(3.0, 2.0), options={"batched": False}),
    "four, one by one": Case(Composed([1.0, 2.0, -0.5]), options={"batched": False}),
    "five": Case(Composed([1.0, 2.0, -0.5, 0.25])),
    "five, one by one": Case(Composed([1.0, 2.0, -0.5, 0.25]), options={"batched": False}),
    "history": Case(ClassifierFree(3.0), dpm_solver(SCHEDULE, 5)),
    "bfloat16": Case(ClassifierFree(3.0), options={"dtype": torch.bfloat16}),
    "learned variance": Case(
        ClassifierFree(3.0), ddpm(SCHEDULE, 4, variance_type="learned_range"), model=model_with_variance
    ),
    "without uncond": Case(
        Composed([1.0, 2.0]).within(ddim(SCHEDULE, 4), 0.3, 0.7), ddim(SCHEDULE, 4), {"skip_unconditional": True}
    ),
    "without uncond, one by one": Case(
        ClassifierFree(2.0).within(ddim(SCHEDULE, 4), 0.3, 0.7),
        ddim(SCHEDULE, 4),
        {"skip_unconditional": True, "batched": False},
    ),
    "a mapping": Case(ClassifierFree(3.0), model=model_of_mapping),
    "inpainting": Case(ClassifierFree(3.0), more={"strength": 0.8}),
    "a classifier": Case(ClassifierFree(2.0) + Classifier(None, 1.5, grad_fn=lambda x, t: -0.1 * x)),
    "channels_last": Case(ClassifierFree(3.0)),
}


def arguments_of(name: str, batch: int = 5) -> dict[str, Any]:
    """The whole request, the same on every rank."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(7)
    conditions = [torch.rand(batch, generator=generator) for _ in range(case.predictions)]
    if case.model is model_of_mapping:
        conditions = [{"text": torch.stack([y, y], 1), "more": {"scale": 0.1 * y}} for y in conditions]
    seeds = list(range(11, 11 + batch))
    x_T = portable_noise(seeds, (batch, *SHAPE))
    arguments: dict[str, Any] = {"x_T": x_T, "seeds": seeds, **case.more}
    if name == "channels_last":
        arguments["x_T"] = x_T.contiguous(memory_format=torch.channels_last)
    if name == "inpainting":
        arguments["image"] = torch.rand(batch, *SHAPE, generator=generator)
        arguments["mask"] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    if case.predictions == 1:
        return arguments | {"cond": conditions[0]}
    cond = conditions[1:] if case.predictions > 2 else conditions[1]
    return arguments | {"uncond": conditions[0], "cond": cond}


def sampler_of(name: str, mesh: object = None, **options: Any) -> Sampler:
    case = CASES[name]
    return Sampler(case.model, case.table, case.guidance, **{**case.options, **options}, mesh=mesh)


def sampled(sampler: Sampler, x_T: Tensor, **arguments: Any) -> Tensor:
    return sampler(x_T, **arguments)


def every_case(meshes: list[tuple[int, int]]) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Every case whose predictions are enough for the mesh, twice, from cached buffers the second time."""
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for shape in meshes:
        mesh = mesh_of(*shape)
        made = found[shape] = {}
        for name in CASES:
            if CASES[name].predictions < shape[1]:
                continue
            sampler = sampler_of(name, mesh)
            made[name] = sampled(sampler, **arguments_of(name))
            assert torch.equal(sampled(sampler, **arguments_of(name)), made[name]), name
        own = fastguide.samples_of_rank(5, mesh)
        made["own"] = torch.tensor([own.start, own.stop])
        if shape[1] <= 2:
            sampler = sampler_of("classifier-free", mesh)
            arguments = arguments_of("classifier-free")
            made["share"] = sampled(sampler, **arguments, gather=False)
            trajectory = sampler.trajectory(**arguments)
            made["samples"], made["originals"] = trajectory.samples, trajectory.originals
            of_two = sampler.trajectory(**arguments_of("classifier-free", 2))  # fewer than ranks
            made["of two"], made["samples of two"] = of_two.sample, of_two.samples
    return found


def what_is_sent() -> dict[str, list[Any]]:
    """What happens on this rank in a run: rows given to the model, what all-gathers begin to send, and their ends."""
    found: dict[str, list[Any]] = {}
    begin, end, mesh = Dimension.begin_all_gather, Dimension.end, mesh_of(1, 2)
    for name in ("classifier-free", "bfloat16", "learned variance", "four, one by one", "five"):
        happened: list[Any] = []
        case = CASES[name]

        def model(x: Tensor, *rest: Any, case: Case = case, happened: list[Any] = happened) -> Tensor:
            happened.append(len(x))
            return case.model(x, *rest)

        def begins(self: Dimension, out: Tensor, mine: Tensor, what: str, happened: list[Any] = happened) -> Any:
            happened.append((mine.numel(), mine.dtype))
            return begin(self, out, mine, what)

        def ends(self: Dimension, work: Any, what: str, happened: list[Any] = happened) -> None:
            happened.append("end")
            end(self, work, what)

        sampler = Sampler(model, case.table, case.guidance, **case.options, mesh=mesh)
        sampled(sampler, **arguments_of(name))
        happened.clear()
        Dimension.begin_all_gather, Dimension.end = begins, ends  # type: ignore[method-assign]
        sampled(sampler, **arguments_of(name))
        Dimension.begin_all_gather, Dimension.end = begin, end  # type: ignore[method-assign]
        found[name] = happened[2:]  # the first two are the agreement
    return found


def captured() -> dict[str, Any]:
    """Cases whose steps are graphs, on the CPU's stand-in for one; and how often the model was called at replays."""
    capture.can_capture = lambda device: True
    capture.Graph = RecordedGraph  # type: ignore[misc, assignment]
    found: dict[str, Any] = {}
    for name, mode in (
        ("classifier-free", "loop"), ("five", "auto"), ("perturbed, one by one", "auto"), ("without uncond", "auto")
    ):  # fmt: skip
        sampler = sampler_of(name, mesh_of(1, 2), cuda_graph=mode)
        first = sampled(sampler, **arguments_of(name))
        state = next(iter(sampler._states.cached.values())).state
        state.model_call = None  # type: ignore[assignment]  # no Python at replays
        found[name] = first, sampled(sampler, **arguments_of(name))
    return found
