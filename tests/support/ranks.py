"""Run a function in several processes of one gloo group: forked from a server that has imported everything once."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_MODULES = ["tests.support.rank_cases", "tests.support.rank_failures"]
_LONGEST = 60.0  # seconds: then the processes are ended


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    return context


def mesh_of(data: int, guidance: int) -> DeviceMesh:
    return init_device_mesh("cpu", (data, guidance), mesh_dim_names=("data", "guidance"))


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what the function returns on each rank, or the exit status of one that did not end.

    Raises:
        AssertionError: with the traceback, of the first rank whose function raised an exception.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _server().Process(target=_process, args=(rank, world, folder, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_LONGEST)
            if process.is_alive():
                process.kill()
                process.join()
        paths = [Path(folder, f"{rank}.pt") for rank in range(world)]
        results = [
            torch.load(path, weights_only=False) if path.exists() else process.exitcode
            for path, process in zip(paths, processes, strict=True)
        ]
    for result in results:
        if isinstance(result, AssertionError):
            raise result
    return results


def _process(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=_LONGEST / 2),
    )  # fmt: skip
    try:
        result = function(*arguments)
    except BaseException:  # among them, what pytest.raises raises
        result = AssertionError(f"on rank {rank}: {traceback.format_exc()}")
    torch.save(result, Path(folder, f"{rank}.partial"))
    Path(folder, f"{rank}.partial").rename(Path(folder, f"{rank}.pt"))
    if not isinstance(result, AssertionError) and dist.is_initialized():
        dist.destroy_process_group()
