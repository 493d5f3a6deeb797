"""Serve a queue of requests with several processes, each with slots of its own.

torchrun --nproc-per-node 2 docs/examples/request_queue.py

The first process is the server: it holds the queue, and gives each request to the
process with the most free slots. What travels is a seed and a few numbers; each process
makes its own x_T, and sends x_0 back.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, NamedTuple

import fastguide
import torch
import torch.distributed as dist
from torch import Tensor

SHAPE, STEPS_BETWEEN = (1, 3, 8, 8), 4


class Request(NamedTuple):
    """What a client asks for."""

    number: int
    seed: int
    guidance_scale: float
    steps: int


def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Stand in for a network that predicts noise."""
    return 0.1 * x * condition[:, None, None, None]


def arguments(request: Request) -> dict[str, Any]:
    """Return what a sampler and slots take alike."""
    return {
        "x_T": fastguide.portable_noise([request.seed], SHAPE),
        "cond": torch.ones(1),
        "uncond": torch.zeros(1),
    }


class Worker:
    """The slots of this process."""

    def __init__(self, slots: int) -> None:
        self.schedule = fastguide.NoiseSchedule.linear()
        table = fastguide.ddpm(self.schedule, 20)
        guidance = fastguide.ClassifierFree(5.0)
        self.sampler = fastguide.Sampler(model, table, guidance)
        self.slots = self.sampler.slots(slots)
        self.tables = {20: table}
        self.requests: dict[int, Request] = {}  # by their slots

    def table(self, steps: int) -> fastguide.StepTable:
        """Return the table of so many steps, made once."""
        if steps not in self.tables:
            self.tables[steps] = fastguide.ddpm(self.schedule, steps)
        return self.tables[steps]

    def admit(self, request: Request) -> None:
        """Take in a request; a slot has to be free."""
        slot = self.slots.admit(
            **arguments(request),
            seed=request.seed,
            table=self.table(request.steps),
            guidance=fastguide.ClassifierFree(request.guidance_scale),
        )
        self.requests[slot] = request

    def step(self) -> list[tuple[Request, Tensor]]:
        """Move all requests on by some steps, and return those that are finished."""
        finished = []
        for _ in range(STEPS_BETWEEN):
            for slot, x_0 in self.slots.step().items():
                finished.append((self.requests.pop(slot), x_0))
        return finished


def routed(waiting: deque[Request], free: list[int]) -> list[list[Request]]:
    """Take requests from the queue, each for the process with the most free slots."""
    shares: list[list[Request]] = [[] for _ in free]
    while waiting and any(free):
        rank = max(range(len(free)), key=free.__getitem__)
        shares[rank].append(waiting.popleft())
        free[rank] -= 1
    return shares


def serve(waiting: deque[Request], worker: Worker) -> list[tuple[int, Request, Tensor]]:
    """Answer all requests; the first process returns them, each with who made it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    answers: list[tuple[int, Request, Tensor]] = []
    finished: list[tuple[Request, Tensor]] = []
    while True:
        reports: list[Any] = [None] * world
        report = (worker.slots.free, len(worker.requests), finished)
        dist.gather_object(report, reports if rank == 0 else None)
        shares: list[Any] = [None] * world  # no share: there is nothing left to do
        if rank == 0:
            for origin, (_, _, made) in enumerate(reports):
                answers += [(origin, *answer) for answer in made]
            if waiting or any(under_way for _, under_way, _ in reports):
                shares = routed(waiting, [free for free, _, _ in reports])
        share: list[Any] = [None]
        dist.scatter_object_list(share, shares if rank == 0 else None)
        if share[0] is None:
            return answers
        for request in share[0]:
            worker.admit(request)
        finished = worker.step()


def main() -> None:
    """Answer a queue of twelve requests."""
    dist.init_process_group("gloo")  # "nccl" where each process has a GPU
    queue = deque(Request(k, 100 + k, 1.0 + k, 10 + 5 * (k % 3)) for k in range(12))
    every, worker = list(queue), Worker(slots=3)
    answers = serve(queue, worker)
    if dist.get_rank() == 0:
        assert sorted(request for _, request, _ in answers) == every
        for _, request, x_0 in answers:  # the same bits, whoever made it
            sampler = worker.sampler
            sampler.table = worker.table(request.steps)
            sampler.guidance = fastguide.ClassifierFree(request.guidance_scale)
            alone = sampler(**arguments(request), seeds=[request.seed])
            assert torch.equal(x_0, alone)
        for rank, count in sorted(Counter(rank for rank, _, _ in answers).items()):
            print(f"rank {rank} has answered {count} requests")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
