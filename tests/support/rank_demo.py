"""The demo by processes as torchrun starts them, with few methods and models that are not trained."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import torch
import torch.distributed as dist

from fastguide import __main__ as cli


def demo(output: Path, port: int) -> tuple[str, int]:
    """Return what a process prints, and how often it has called the denoiser."""
    from fastguide.demo import guidances, models
    from fastguide.demo import run as demo_run

    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "a test"}
    rows: list[int] = []

    def not_trained(*arguments: object, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
        assert rank == 0
        torch.manual_seed(0)
        return models.Denoiser().eval(), models.NoiseAwareClassifier().eval()

    torch.manual_seed(100 + rank)
    forward = models.Denoiser.forward
    models.Denoiser.forward = lambda self, x, *rest: rows.append(len(x)) or forward(self, x, *rest)
    demo_run.checkpoints.trained = not_trained
    every = demo_run.all_methods()
    demo_run.all_methods = lambda: [
        method for method in every if method.scale in (None, 1.0) and method.solver == "ddim"
    ]
    guidances.KINDS = {name: guidances.KINDS[name] for name in ("plain", "normalized")}
    demo_run.closed_form = lambda output: {}
    demo_run.checks.accuracy = lambda *arguments: {}
    demo_run.checks.speed = lambda *arguments: {}
    demo_run.report.save_overview = demo_run.report.save_grid = lambda *arguments: None
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["demo", "--quick", "--output", str(output)]) == 0
    return printed.getvalue(), max(rows)
