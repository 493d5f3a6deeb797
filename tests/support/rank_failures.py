"""What ranks refuse together, and what they do when one of them fails: for two processes."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from fastguide import (
    AutoGuidance,
    Classifier,
    ClassifierFree,
    Composed,
    Normalized,
    Sampler,
    ddim,
    ddpm,
    portable_noise,
    samples_of_rank,
)
from tests.support.rank_cases import SCHEDULE, arguments_of, model, sampled, sampler_of
from tests.support.ranks import mesh_of

NAME = "classifier-free"


def refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=message)


def what_differs() -> None:
    """Each argument that differs between the two ranks is named on both, along either dimension."""
    rank = dist.get_rank()
    for shape in ((2, 1), (1, 2)):
        mesh = mesh_of(*shape)
        whole = arguments_of(NAME)
        sampler = sampler_of(NAME, mesh)
        x = whole["x_T"]
        expected = "expected the same on all ranks, got"
        with refused(ValueError, rf"x_T: {expected} .*\(5, 2, 4, 4\) on rank 0 and .*\(4, 2, 4, 4\) on rank 1"):
            sampled(sampler, **arguments_of(NAME, 5 - rank))
        with refused(ValueError, f"x_T: {expected} torch.float32 .* and torch.float64"):
            sampled(sampler, **whole | {"x_T": x.double() if rank else x})
        with refused(ValueError, f"cond: {expected} .*int64"):
            sampled(
                sampler,
                **whole | {name: torch.ones(5, dtype=(torch.int64, x.dtype)[rank]) for name in ("cond", "uncond")},
            )
        with refused(
            ValueError, f"labels, image, mask and strength: {expected} none on rank 0 and a mask and an image"
        ):
            sampled(sampler, **whole | ({"image": x, "mask": x > 0} if rank else {}))
        with refused(ValueError, f"image.*: {expected} .* call 2 on rank 0 and .* call 3 on rank 1"):
            sampled(sampler, **whole, image=x, strength=0.5 - 0.25 * rank)
        sampler.table = ddpm(SCHEDULE, 4 + rank)
        with refused(ValueError, f"table: {expected} .*4 steps.* on rank 0 and .*5 steps"):
            sampled(sampler, **whole)
        sampler.table = (ddpm if rank else ddim)(SCHEDULE, 4)
        with refused(ValueError, f"table: {expected} "):
            sampled(sampler, **whole)
        sampler.table = ddpm(SCHEDULE, 4)
        sampler.guidance = ClassifierFree(3.0 + rank)
        with refused(ValueError, f"guidance: {expected} .* on rank 0, and one with other numbers on another rank"):
            sampled(sampler, **whole)
        sampler.guidance = Normalized(3.0, dim=(1, -1)[rank])
        with refused(ValueError, f"guidance: {expected} .*2 predictions, dim=1. on rank 0 and .*2 predictions, dim=-1"):
            sampled(sampler, **whole)
        sampler.guidance = ClassifierFree(3.0)
        sampler.batched = rank == 0
        with refused(ValueError, f"sampler: {expected} .*batched=True.*batched=False"):
            sampled(sampler, **whole)
        sampler.batched = True
        with refused(ValueError, f"sampler: {expected} .*gather=True.* and .*gather=False"):
            sampled(sampler, **whole, gather=rank == 0)
        with refused((RuntimeError, ValueError)[rank], ("mesh: .* ValueError: labels.* rank 1", "labels: ")[rank]):
            sampled(sampler, **whole, labels=(None, [1])[rank])
        for name, value, said in (
            ("callback", 3, "callback: expected a callable"),
            ("gather", 1, "gather: expected True"),
            ("x_T", x.clone().requires_grad_(), "x_T: gradients asked of a captured loop"),
        ):
            with refused((ValueError, TypeError, RuntimeError), said), torch.enable_grad():
                sampled(sampler, **whole | ({name: value} if rank else {}))
        with refused((ValueError, TypeError, RuntimeError), "samples: expected True or False"):
            sampler.trajectory(**whole, samples=(True, "all")[rank])
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "tqdm", None)
            with refused((ImportError, RuntimeError)[rank], "progress: expected tqdm to be installed"):
                sampled(sampler, **whole, progress=True)
        assert torch.equal(sampled(sampler, **whole), sampled(sampler_of(NAME), **whole))


def what_the_ranks_of_a_guidance_share() -> None:
    rank, mesh = dist.get_rank(), mesh_of(1, 2)
    whole, sampler = arguments_of(NAME), sampler_of(NAME, mesh)
    x = whole["x_T"]
    expected = "expected the same on all ranks, got"
    with refused(ValueError, f"x_T: {expected} values of hash"):
        sampled(sampler, **whole | {"x_T": x + rank})
    with refused(ValueError, f"image and mask: {expected} values of hash"):
        sampled(sampler, **whole, image=x + rank, mask=torch.rand(x.shape).round())
    of_labels = Classifier(lambda x, t: x.flatten(1), 1.0) + ClassifierFree(2.0)
    with refused(ValueError, f"labels: {expected} values of hash"):
        labelled = Sampler(model, sampler.table, of_labels, mesh=mesh)
        sampled(labelled, **whole, labels=torch.arange(5) * (1 + rank))
    with refused(ValueError, rf"seeds or generator: {expected} \[1, 1, 1, 1, 1\] on rank 0 and \[2, "):
        sampled(sampler, **whole | {"seeds": [1 + rank] * 5})
    unseeded = {name: value for name, value in whole.items() if name != "seeds"}
    with refused(ValueError, f"seeds or generator: {expected} "):
        sampled(sampler, **unseeded, generator=torch.Generator().manual_seed(rank))
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    assert torch.equal(
        sampled(sampler, **unseeded, generator=one), sampled(sampler_of(NAME), **unseeded, generator=other)
    )
    assert torch.equal(one.get_state(), other.get_state())
    sampled(sampler, **whole)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            assert torch.equal(sampled(sampler, **whole), sampled(sampler_of(NAME), **whole))
    if rank == 1:
        sampler.clear()
    with refused(ValueError, f"sampler: {expected} buffers of an earlier call on rank 0 and no buffers yet"):
        sampled(sampler, **whole)
    sampler.clear()
    sampled(sampler, **whole)
    weak, guidance = lambda x, t, y: 0.5 * model(x, t, y), AutoGuidance(2.0)
    auto = {name: value for name, value in whole.items() if name != "uncond"} | {"uncond": whole["cond"]}
    both = AutoGuidance.both(weak, model)
    got = sampled(Sampler((weak, model)[rank], ddpm(SCHEDULE, 4), guidance, mesh=mesh), **auto)
    assert torch.equal(got, sampled(Sampler(both, ddpm(SCHEDULE, 4), guidance), **auto))
    with refused(ValueError, "model: expected one that can be called for some of the predictions"):
        sampled(Sampler(both, ddpm(SCHEDULE, 4), guidance, mesh=mesh), **auto)
    with refused(ValueError, "mesh: expected at most 1 rank"):
        Sampler(model, ddim(SCHEDULE, 3), mesh=mesh)(x, cond=torch.ones(5))
    with refused(ValueError, "cuda_graph: expected 'auto', 'loop' or False"):
        sampler_of(NAME, mesh, cuda_graph="try")
    with refused(ValueError, "mesh: expected one rank in its dimension 'guidance' for slots"):
        sampler.slots(2)


def what_the_ranks_of_the_data_share() -> None:
    rank, mesh = dist.get_rank(), mesh_of(2, 1)
    whole, sampler = arguments_of(NAME), sampler_of(NAME, mesh)
    unseeded = {name: value for name, value in whole.items() if name != "seeds"}
    for generator in (None, torch.Generator()):
        with refused(ValueError, "seeds: expected one for each sample, as the table adds noise"):
            sampled(sampler, **unseeded, generator=generator)
    first, second = ([torch.Generator().manual_seed(k) for k in range(5)] for _ in range(2))
    got = sampled(sampler, **unseeded, generator=first)
    assert torch.equal(got, sampled(sampler_of(NAME), **unseeded, generator=second))
    sampler.table = ddim(SCHEDULE, 4)  # adds none
    assert torch.equal(
        sampled(sampler, **unseeded),
        sampled(Sampler(model, sampler.table, sampler.guidance), **unseeded),
    )
    own = samples_of_rank(5, mesh)
    seen: list[Tensor] = []
    sampler(**unseeded, callback=lambda call, timestep, sample: seen.append(sample.clone()))
    assert [sample.shape[0] for sample in seen] == [own.stop - own.start] * 4
    requests = [{"x_T": portable_noise([k], (1, 2)), "cond": torch.ones(1), "uncond": torch.zeros(1)} for k in range(2)]
    slots, alone = sampler.slots(2), Sampler(model, sampler.table, sampler.guidance).slots(2)
    for each in (slots, alone):
        each.admit(**requests[rank])
        for _ in range(3):
            each.step()
    assert torch.equal(slots.step()[0], alone.step()[0])


def failures_that_leave_all_ranks_alive() -> None:
    rank, whole = dist.get_rank(), arguments_of(NAME)

    def fails(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if rank == 1:
            raise KeyError("no such weight")
        return model(x, t, y)

    def other_dtype(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y).to((torch.float32, torch.bfloat16)[rank])

    def infinite(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y) / (1 - rank)

    memory = torch.zeros(5, 2, 4, 4)

    def same_memory(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return memory.copy_(model(x, t, y))

    table, guidance = ddpm(SCHEDULE, 3), ClassifierFree(2.0)
    for shape in ((2, 1), (1, 2)):
        with refused((RuntimeError, KeyError)[rank], ("on rank 1", "no such weight")[rank]):
            sampled(Sampler(fails, table, guidance, mesh=mesh_of(*shape)), **whole)
    with refused(TypeError, "model: expected outputs of one dtype .*float32 on rank 0 and torch.bfloat16 on rank 1"):
        sampled(Sampler(other_dtype, table, guidance, mesh=mesh_of(1, 2)), **whole)
    with refused((RuntimeError, FloatingPointError)[rank], ("FloatingPointError: .* rank 1", "finite")[rank]):
        sampled(Sampler(infinite, table, guidance, mesh=mesh_of(2, 1)), **whole, check_finite=True)
    with refused(ValueError, "model: expected new memory at each call"):
        arguments = arguments_of("four, one by one")
        sampled(Sampler(same_memory, table, Composed([1, 1, 1]), batched=False, mesh=mesh_of(1, 2)), **arguments)
    weight = torch.nn.Parameter(torch.ones(()))
    with torch.enable_grad():
        got = sampled(Sampler(lambda x, t, y: weight * model(x, t, y), table, guidance, mesh=mesh_of(1, 2)), **whole)
    assert weight.grad is None
    assert not got.requires_grad


def what_one_rank_cannot_begin_with() -> None:
    """Found before ranks agree, and told to all of them: calls of another kind, a sampler in use, memory."""
    rank, whole = dist.get_rank(), arguments_of(NAME)
    for shape in ((2, 1), (1, 2)):
        sampler = sampler_of(NAME, mesh_of(*shape), recapture=rank == 0)
        expected = sampled(sampler, **whole)
        said = "recapture: expected a call like the first"
        with refused((RuntimeError, ValueError)[rank], (f"mesh: .* ValueError: {said}.* on rank 1", said)[rank]):
            sampler.trajectory(**whole)
        assert torch.equal(sampled(sampler, **whole), expected)
        inner: list[str] = []

        def again(*_: Any, sampler: Sampler = sampler, inner: list[str] = inner) -> None:
            try:
                sampled(sampler, **whole)
            except RuntimeError as error:
                inner.append(str(error))

        sampled(sampler, **whole, callback=again)
        assert all("sampler: is running already" in text for text in inner)
        assert len(inner) == 4
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr("fastguide.sampling.cached_states.SamplerState", _no_memory)
            said = "no memory of a state"
            with refused((RuntimeError, MemoryError)[rank], (f"mesh: .* MemoryError: {said} on rank 1", said)[rank]):
                sampled(sampler_of(NAME, mesh_of(*shape)), **whole)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("fastguide.sampling.distributed.gathered_call._Buffers", _no_memory)
        said = ("model: expected an output on every rank, got an exception on rank 1", "no memory of a state")[rank]
        with refused((RuntimeError, MemoryError)[rank], said):
            sampled(sampler_of(NAME, mesh_of(1, 2)), **whole)


def _no_memory(*_: Any) -> None:
    raise MemoryError("no memory of a state")


def meshes_that_are_none() -> None:
    table = ddim(SCHEDULE, 3)
    with refused(TypeError, "mesh: expected a torch.distributed.device_mesh.DeviceMesh, got int"):
        Sampler(model, table, mesh=2)
    with refused(
        ValueError, "mesh: expected dimensions named 'data' and 'guidance', or one of them, got .'dp',.; mesh"
    ):
        Sampler(model, table, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    with refused(ValueError, "mesh: expected dimensions .* got None"):
        Sampler(model, table, mesh=init_device_mesh("cpu", (2,)))
    of_three = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("pipeline", "data", "guidance"))
    whole, expected = arguments_of(NAME), sampled(sampler_of(NAME), **arguments_of(NAME))
    for mesh in (of_three["data", "guidance"], init_device_mesh("cpu", (2,), mesh_dim_names=("data",))):
        assert torch.equal(sampled(sampler_of(NAME, mesh), **whole), expected)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("guidance", "data"))  # in the other order
    sampler = sampler_of(NAME, mesh)
    assert torch.equal(sampled(sampler, **whole), expected)
    dist.destroy_process_group()
    for ask in (lambda: sampled(sampler, **whole), lambda: Sampler(model, table, mesh=mesh)):
        with refused(RuntimeError, r"mesh: expected torch.distributed to be initialized.*init_process_group\(\)"):
            ask()


REFUSALS: list[Callable[[], None]] = [
    what_differs,
    what_the_ranks_of_a_guidance_share,
    what_the_ranks_of_the_data_share,
    failures_that_leave_all_ranks_alive,
    what_one_rank_cannot_begin_with,
    meshes_that_are_none,  # the last one: it ends the group
]


def every_refusal() -> None:
    for refusal in REFUSALS:
        refusal()


def failures_on_two_rows() -> str:
    """What the last one says on this rank: of 2 x 2 ranks, rank 1 leaves its peer of a guidance waiting then."""
    rank, mesh, whole, calls = dist.get_rank(), mesh_of(2, 2), arguments_of(NAME), []

    def fails(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if rank == 1:
            raise KeyError("no such weight")
        return model(x, t, y)

    def infinite(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y) / (rank // 2)

    def fails_later(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise FloatingPointError("of the model")
        return model(x, t, y)

    table, guidance = ddpm(SCHEDULE, 3), ClassifierFree(2.0)
    with refused(
        (RuntimeError, KeyError)[rank == 1],
        ("an output on every rank, got an exception on rank 1", "no such weight", "KeyError.* on rank 1")[min(rank, 2)],
    ):
        sampled(Sampler(fails, table, guidance, mesh=mesh), **whole)
    with refused((FloatingPointError, RuntimeError)[rank // 2], ("finite", "FloatingPointError: .*rank 0")[rank // 2]):
        sampled(Sampler(infinite, table, guidance, mesh=mesh), **whole, check_finite=True)
    with refused((RuntimeError, FloatingPointError)[rank == 1], "") as last:
        sampled(Sampler(fails_later, table, guidance, mesh=mesh), **whole)
    return str(last.value)


def with_a_rank_that_is_lost(shape: tuple[int, int], how: str, folder: Path) -> str | None:
    """Sample while rank 1 ends at its third call of the model, or stays away until rank 0 has given up, or raises."""
    calls, given_up = [], folder / "given up"

    def lost(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 3:
            if how == "ends":
                os._exit(9)
            if how == "raises":
                raise FloatingPointError("of the model")
            while not given_up.exists():
                time.sleep(0.02)
        return model(x, t, y)

    sampler = Sampler(lost, ddpm(SCHEDULE, 5), ClassifierFree(2.0), mesh=mesh_of(*shape))
    dist.barrier()
    if how != "ends":
        _set_pg_timeout(datetime.timedelta(seconds=1), sampler.mesh.get_group("guidance"))
    try:
        sampled(sampler, **arguments_of(NAME))
    except FloatingPointError as error:
        before = given_up.exists()  # raised at once: the other is still waiting
        while not given_up.exists():
            time.sleep(0.02)
        return f"{error}, {'after' if before else 'before'} the other gave up"
    except RuntimeError as error:
        given_up.touch()
        return str(error)
    return None
