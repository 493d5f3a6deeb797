"""Describe the machine that a run was measured on, and how busy other processes were."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from fastguide import __version__
from fastguide.step.backends.registry import BACKENDS, default_backend


def machine(device: torch.device) -> dict[str, Any]:
    """Return the date, the device, and the versions of everything that the numbers depend on."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "huge pages": huge_pages(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastguide": __version__,
        "backend": f"{default_backend(device)}: {BACKENDS[default_backend(device)].status}",
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "driver": driver(), "cuda": torch.version.cuda}
    for package in ("diffusers", "triton", "matplotlib", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def huge_pages() -> str:
    """Return Linux's setting of transparent huge pages: the time of large new tensors depends on it."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = setting.read_text().partition("[")[2].partition("]")[0] if setting.exists() else "unknown"
    return f"{found}; torch asks for them too" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else found


def busy(seconds: float = 0.5) -> float | None:
    """Measure the share of this process's processors that other processes use; None where the system does not tell."""
    before = ticks()
    time.sleep(seconds)
    after = ticks()
    if before is None or after is None or after[0] == before[0]:
        return None
    return 1 - (after[1] - before[1]) / (after[0] - before[0])


def share_of_others(before: tuple[int, int] | None, after: tuple[int, int] | None, own_seconds: float) -> float:
    """Return which share of the processors others used between two readings of ``ticks``; 0 where nobody knows."""
    if before is None or after is None or after[0] == before[0]:
        return 0.0
    used = (after[0] - before[0]) - (after[1] - before[1]) - own_seconds * os.sysconf("SC_CLK_TCK")
    return max(used, 0.0) / (after[0] - before[0])


def ticks() -> tuple[int, int] | None:
    """Return the ticks of this process's processors since the system started: all of them, and the idle ones."""
    stat = Path("/proc/stat")
    if not stat.exists() or not hasattr(os, "sched_getaffinity"):
        return None
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in stat.read_text().splitlines()]
    found = [[int(value) for value in line[1:9]] for line in lines if line[0] in ours]  # guest ticks are part of these
    return sum(map(sum, found)), sum(line[3] + line[4] for line in found)


def driver() -> str:
    """Return the version of the GPU's driver, or why it is not known."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "unknown: nvidia-smi is not installed"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    return found.stdout.strip().partition("\n")[0] or f"nvidia-smi: {found.stderr.strip()}"


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for text in cpuinfo.read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
