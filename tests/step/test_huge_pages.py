"""Large new outputs on the CPU are in memory for which huge pages were asked, and small ones as they always were."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastguide import ClassifierFree, NoiseSchedule, Sampler, ddim, ddpm, guided_step
from fastguide.step import memory

pytestmark = [
    pytest.mark.skipif(
        not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no transparent huge pages"
    ),
    pytest.mark.skipif(os.environ.get("THP_MEM_ALLOC_ENABLE") == "1", reason="torch asks for huge pages itself"),
]
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


@pytest.fixture
def sizes(monkeypatch):
    """Bytes of what huge pages are asked for."""
    found = []
    monkeypatch.setattr(memory, "_madvise", lambda begin, size, advice: found.append(size.value))
    return found


def test_new_output(generator):
    table = ddim(NoiseSchedule.linear(), 3)
    x = torch.randn(LARGE, generator=generator)
    assert asked(guided_step(table, 1, x, [x, x], ClassifierFree(2.0)))


def test_nothing_but_what_is_written_anew(sizes):
    table = ddim(NoiseSchedule.linear(), 3)
    x = torch.zeros(LARGE)
    guided_step(table, 1, x, x, out=x)
    assert sizes == []
    guided_step(table, 1, x, x)
    assert len(sizes) == 1


def test_noise_of_a_step_in_place(sizes):
    """Drawn into new memory, with the values of torch.randn."""
    x, drawing = torch.zeros(LARGE), torch.Generator().manual_seed(1)
    table = ddpm(NoiseSchedule.linear(), 3)
    guided_step(table, 1, x, x, generator=drawing, out=x)
    assert len(sizes) == 1
    assert 0 <= x.nbytes - sizes[0] < 2 * mmap.PAGESIZE
    other = torch.Generator().manual_seed(1)
    expected = guided_step(table, 1, torch.zeros(LARGE), torch.zeros(LARGE), noise=torch.randn(LARGE, generator=other))
    assert torch.equal(x, expected)
    assert torch.equal(drawing.get_state(), other.get_state())


def test_buffers_of_a_sampler():
    sampler = Sampler(lambda x, t: x, ddim(NoiseSchedule.linear(), 2))
    sampler(torch.zeros(LARGE))
    (cached,) = sampler._states.cached.values()
    assert asked(cached.state.sample)


def test_every_buffer_of_a_sampler(sizes):
    """State, doubled input of the model's dtype, and noise."""
    sampler = Sampler(lambda x, t, y: x, ddpm(NoiseSchedule.linear(), 2), ClassifierFree(2.0), dtype=torch.bfloat16)
    y = torch.zeros(1)
    sampler(torch.zeros(LARGE), cond=y, uncond=y, generator=torch.Generator().manual_seed(0))
    assert len([size for size in sizes if size > memory._LARGE - 2 * mmap.PAGESIZE]) == 3


def test_output_of_a_scheduler_whose_model_has_another_dtype(sizes):
    ours = pytest.importorskip("fastguide.diffusers")
    scheduler = ours.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(2)
    x = torch.zeros(LARGE, dtype=torch.bfloat16)
    result = scheduler.step(x.float(), scheduler.timesteps[0], x).prev_sample
    assert result.dtype == torch.float32
    assert len(sizes) == 1


def test_sliced_sample(generator):
    """Of every second sample, the new output is as large as its own elements."""
    x = torch.randn(4, LARGE[1] // 2 + 9, generator=generator)[::2]
    new = memory.empty_like(x)
    assert new.is_contiguous()
    assert asked(new)


def test_small_output_is_left_alone(sizes):
    memory.empty_like(torch.zeros(1, memory._LARGE // 4 - 64))
    assert sizes == []
    memory.empty_like(torch.zeros(1, memory._LARGE // 4))
    assert len(sizes) == 1


def test_what_is_no_memory_of_this_process():
    with FakeTensorMode():
        assert memory.empty_like(torch.empty(LARGE)).shape == LARGE
    assert memory.empty_like(torch.empty(LARGE, device="meta")).is_meta


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_step_of_several_shapes(dynamic):
    """Whose sizes are no numbers while it is traced."""
    table = ddim(NoiseSchedule.linear(), 3)
    compiled = torch.compile(lambda x: guided_step(table, 1, x, x), fullgraph=True, backend="eager", dynamic=dynamic)
    for shape in ((2, 64), (3, 64), (5, 32), LARGE):
        x = torch.ones(shape)
        assert torch.equal(compiled(x), guided_step(table, 1, x, x))


def test_traced_step_of_symbolic_shape():
    table = ddim(NoiseSchedule.linear(), 3)
    trace = make_fx(lambda x: guided_step(table, 1, x, x), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    traced = trace(torch.ones(2, 64))
    x = torch.ones(3, 64)
    assert torch.equal(traced(x), guided_step(table, 1, x, x))


def test_user_who_wants_none():
    program = "import torch, fastguide.step.memory as m; print(m._madvise); m.empty_like(torch.empty(2**24))"
    environment = os.environ | {"FASTGUIDE_HUGE_PAGES": "0"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "None\n"


def test_system_without_huge_pages(monkeypatch):
    monkeypatch.setattr(memory, "_madvise", None)
    assert memory.empty_like(torch.empty(LARGE)).shape == LARGE
