"""Large new outputs on the CPU are in memory for which huge pages were asked, and small ones as they always were."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastguide import ClassifierFree, NoiseSchedule, Sampler, ddim, ddpm, guided_step, memory

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no transparent huge pages"
)
LARGE = (1, memory._LARGE // 4 + 3)  # float32: just above the bound, and no whole number of pages


def asked(tensor: torch.Tensor) -> bool:
    """Whether the kernel notes, of the middle of a tensor's memory, that huge pages are wanted."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


def test_new_output_and_predicted_original(generator):
    table = ddim(NoiseSchedule.linear(), 3)
    x = torch.randn(LARGE, generator=generator)
    result, original = guided_step(table, 1, x, [x, x], ClassifierFree(2.0), return_original=True)
    assert asked(result)
    assert asked(original)
    assert not asked(x)  # the caller's memory is none of ours


def test_noise_of_a_step_in_place(generator):
    """Drawn into new memory, with the values of torch.randn."""
    x, drawing = torch.zeros(LARGE), torch.Generator().manual_seed(1)
    table = ddpm(NoiseSchedule.linear(), 3)
    guided_step(table, 1, x, x, generator=drawing, out=x)
    other = torch.Generator().manual_seed(1)
    expected = guided_step(table, 1, torch.zeros(LARGE), torch.zeros(LARGE), noise=torch.randn(LARGE, generator=other))
    assert torch.equal(x, expected)
    assert torch.equal(drawing.get_state(), other.get_state())


def test_buffers_of_a_sampler():
    sampler = Sampler(lambda x, t: x, ddim(NoiseSchedule.linear(), 2))
    sampler(torch.zeros(LARGE))
    (kept,) = sampler._loops.values()
    assert asked(kept.loop.sample)


def test_sliced_sample(generator):
    """Of every second sample, the new output is as large as its own elements."""
    x = torch.randn(4, LARGE[1] // 2 + 9, generator=generator)[::2]
    new = memory.empty_like(x)
    assert new.is_contiguous()
    assert asked(new)


def test_small_output_is_left_alone():
    x = torch.zeros(1, memory._LARGE // 4 - 64)
    assert not asked(memory.empty_like(x))


def test_what_is_no_memory_of_this_process():
    with FakeTensorMode():
        assert memory.empty_like(torch.empty(LARGE)).shape == LARGE
    assert memory.empty_like(torch.empty(LARGE, device="meta")).is_meta


def test_compiled_step():
    table = ddim(NoiseSchedule.linear(), 3)
    x = torch.ones(LARGE)
    compiled = torch.compile(lambda x: guided_step(table, 1, x, x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), guided_step(table, 1, x, x))


def test_user_who_wants_none():
    program = "import torch, fastguide.memory as m; print(m._madvise); m.empty_like(torch.empty(2**24))"
    environment = os.environ | {"FASTGUIDE_HUGE_PAGES": "0"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "None\n"


def test_system_without_huge_pages(monkeypatch):
    monkeypatch.setattr(memory, "_madvise", None)
    assert not asked(memory.empty_like(torch.empty(LARGE)))
