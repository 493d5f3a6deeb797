"""The Triton backend: torch's stream in Triton's interpreter, what is refused, and where it says it serves."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch

import fastguide
from fastguide.solvers.table import MAX_SLOTS, ROW_COLUMNS
from fastguide.step.backends import triton
from fastguide.step.noise import TorchGrid
from fastguide.step.operator import StepArguments
from tests.support import triton_interpreter
from tests.support.pure_noise import TABLE
from tests.support.torch_randn import literal_normals

op = torch.ops.fastguide.guided_step_triton.default
WEIGHTS = torch.tensor([[[1.0, 0.0]]])

interpreted = pytest.mark.skipif(
    not triton_interpreter.INTERPRETED, reason="Triton is not installed, or a GPU is there: then tests/step/test_gpu.py"
)


def drawn(sample, philox, threads):
    """A step that is nothing but torch's noise."""
    out = torch.full_like(sample, torch.nan)
    rows = TABLE.device_rows(None, torch.float32)
    op(out, None, None, sample, [], rows, WEIGHTS, 0, None, None, None, None, None, philox, threads)
    return out


@interpreted
@pytest.mark.parametrize("offset", [0, 2**34 - 4, 2**40])
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        ((3, 40), 256),  # below one round of torch's grid
        ((2, 1024), 512),  # shared: tiles of 512
        ((2, 256), 256),  # shared: tiles of 256, and a round that ends early
        ((4, 3, 32, 32), 1024),  # shared: tiles of 1024, three rounds
        ((3, 5, 257), 512),  # odd samples: one by one
        ((1, 5112), 512),  # no whole tiles: one by one, ten rounds
    ],
)
def test_a_step_draws_what_torch_s_kernel_draws(shape, threads, offset):
    sample = torch.zeros(shape)
    for seed in (0, 2**64 - 1):
        signed = seed - 2**64 if seed >= 2**63 else seed
        got = drawn(sample, torch.tensor([signed, offset]), threads)
        assert (got.flatten().double() - literal_normals(sample.numel(), seed, offset, threads)).abs().max() < 2e-6
        state = torch.tensor([signed, offset, 0])
        assert torch.equal(drawn(sample, state, threads), got)
        blocks = threads // 256
        increment = TorchGrid.of(sample.numel(), blocks, 256).increment
        assert state.tolist() == [signed, offset + increment, 0]


@interpreted
def test_torch_s_noise_is_rounded_as_the_sample_s_dtype():
    wide = drawn(torch.zeros(2, 1024), torch.tensor([3, 8]), 512)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(drawn(torch.zeros(2, 1024, dtype=dtype), torch.tensor([3, 8]), 512), wide.to(dtype))
        assert torch.equal(
            drawn(torch.zeros(2, 100, dtype=dtype), torch.tensor([3, 8]), 2048).flatten(),
            (drawn(torch.zeros(2, 100), torch.tensor([3, 8]), 2048).to(dtype).flatten()),
        )


@interpreted
def test_torch_s_stream_counts_channels_last_as_contiguous():
    contiguous = torch.zeros(2, 4, 16, 16)
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    philox = torch.tensor([3, 8])
    assert torch.equal(drawn(channels_last, philox, 512), drawn(contiguous, philox, 512))


@interpreted
def test_an_index_outside_of_the_table_makes_its_sample_nan():
    rows = TABLE.device_rows(None, torch.float32)
    x = torch.ones(4, 10)
    out, original = torch.empty_like(x), torch.empty_like(x)
    index = torch.tensor([0, len(TABLE), 3, -1])
    op(out, original, None, x, [], rows, WEIGHTS, 0, index, None, None, x, None, None, 0)
    assert out.isnan().all(1).tolist() == [False, True, False, True]
    assert torch.equal(original.isnan(), out.isnan())
    assert torch.equal(out[::2], x[::2])


@interpreted
def test_such_a_sample_leaves_no_number_for_later_steps():
    """As CUDA's kernel; a row that leaves nothing in a slot leaves it as it was."""
    table = fastguide.dpm_solver(fastguide.NoiseSchedule.linear(), 5)
    x, history = torch.ones(3, 10), torch.zeros(3 * MAX_SLOTS, 10)
    fields = dict.fromkeys(StepArguments._fields) | {"index": 0, "philox_threads": 0, "out": torch.empty_like(x)}
    fields |= {"sample": x, "predictions": [x], "history": history, "indices": torch.tensor([0, len(table), -1])}
    op(*StepArguments(**fields | {"rows": table.device_rows(None, torch.float32), "weights": WEIGHTS}))
    slot = int(table.rows[0, ROW_COLUMNS.index("hist_slot")])
    left = history.view(MAX_SLOTS, 3, 10)
    assert left.isnan().all(2).tolist() == [[False, k == slot, k == slot] for k in range(MAX_SLOTS)]


@interpreted
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.empty(2, 3, dtype=torch.float64), "expected no float64 tensors in Triton"),
        (5, torch.zeros(4, 3), r"rows: expected shape \(steps, 26\), contiguous, got \(4, 3\)"),
        (6, torch.zeros(1, 2, 2).mT, r"weights: .* dense columns, got \(1, 2, 2\) with strides \(4, 1, 2\)"),
        (6, torch.zeros(1, 3, 2), r"weights: expected shape \(\d+ or 1, 2 or 1, columns\), .* got \(1, 3, 2\)"),
    ],
)
def test_direct_calls_are_refused(place, value, message):
    x = torch.zeros(2, 3)
    rows = TABLE.device_rows(None, torch.float32)
    arguments = [torch.empty(2, 3), None, None, x, [], rows, WEIGHTS, 0, *[None] * 4, torch.tensor(0), None, 0]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


def test_a_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    backend = triton.backend()
    assert backend.devices == ()
    assert backend.status == "not installed: pip install triton"


def test_a_triton_that_is_too_old_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.5.1")
    backend = triton.backend()
    assert backend.devices == ()
    assert backend.status == "triton 3.5.1 is too old: expected 3.6 or newer"


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_it_serves_gpus_and_draws_torch_s_stream_on_nvidia_s(monkeypatch, hip):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.10.0")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    backend = triton.backend()
    assert backend.devices == ("cuda",)
    assert backend.torch_stream == (hip is None)


def test_a_triton_of_another_name_is_found(monkeypatch):
    """As AMD's and older builds are named; where no name is known, the package itself is asked."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    installed = {"pytorch-triton-rocm": "3.6.0+git1"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "triton 3.6.0+git1" in triton.backend().status
    installed.clear()
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.0"))
    assert triton.backend().status == "triton 3.5.0 is too old: expected 3.6 or newer"


X = torch.zeros(100)
TENSORS = (X, None, None, X, (X, X[4:]), X, X, None, None, None, None, None, None)
SPECIALIZED = (48, 0, 0, 17, (16, 32), 0, 0, 0, 160, 256)
OTHERS = (1, 2, 3)
CONSTANTS = (1, 2, True, True, False, True, 1024)


class Launches:
    """Stands in for Triton's kernel: what was compiled, and how often each was launched."""

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            return self.Kernel(self.launched)

        return run

    class Kernel:
        def __init__(self, launched):
            self.launched = launched

        def __getitem__(self, grid):
            return lambda *arguments: self.launched.append((grid, arguments))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the launch needs one; ``capturing`` says whether its stream is."""
    kernels = pytest.importorskip("fastguide.step.backends.triton_kernel")
    state = types.SimpleNamespace(launches=Launches(), capturing=False)
    monkeypatch.setattr(kernels, "step_kernel", state.launches)
    monkeypatch.setattr(triton, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def launch(tensors=TENSORS, specialized=SPECIALIZED, others=OTHERS, constants=CONSTANTS, index=0):
    triton._launch(7, (tensors, specialized, others, constants), torch.device("cuda", index))


def changed(values, **at):
    """With values in other places: ``changed(t, _3=x)``."""
    return tuple(at.get(f"_{i}", value) for i, value in enumerate(values))


SAME = {
    "other numbers of no consequence": {"others": (16, 2**31 - 1, -5)},
    "another tensor of the kind": {"tensors": changed(TENSORS, _0=torch.ones(100))},
    "another multiple of 16": {"specialized": changed(SPECIALIZED, _0=32)},
    "another number that is none": {"specialized": changed(SPECIALIZED, _3=18)},
}
ANOTHER = {
    "dtype": {"tensors": changed(TENSORS, _0=X.half())},
    "alignment": {"tensors": changed(TENSORS, _0=X[1:])},
    "a prediction's alignment": {"tensors": changed(TENSORS, _4=(X, X[1:]))},
    "an optional tensor": {"tensors": changed(TENSORS, _12=X)},
    "a stride's divisibility": {"specialized": changed(SPECIALIZED, _0=47)},
    "a stride of 1": {"specialized": changed(SPECIALIZED, _3=1)},
    "a prediction's stride": {"specialized": changed(SPECIALIZED, _4=(16, 33))},
    "a size of 64 bits": {"specialized": changed(SPECIALIZED, _8=2**31)},
    "a number of 64 bits": {"others": (1, 2**31, 3)},
    "constants": {"constants": (*CONSTANTS[:-1], 512)},
}


@pytest.mark.parametrize("name", SAME)
def test_a_compiled_kernel_is_launched_with_the_same_arguments(gpu, name):
    launch()
    ((grid, arguments, options),) = gpu.launches.compiled
    assert options == {"num_warps": 4, "enable_fp_fusion": False}
    assert gpu.launches.launched == []
    gpu.capturing = True
    launch()
    assert gpu.launches.launched == [(grid, arguments)]
    launch(**SAME[name])
    assert len(gpu.launches.launched) == 2
    assert len(gpu.launches.compiled) == 1


@pytest.mark.parametrize("name", ANOTHER)
def test_what_triton_compiles_anew_is_refused_inside_a_capture(gpu, name):
    launch()
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="not compiled yet, and cannot be during a capture; run the step once"):
        launch(**ANOTHER[name])
    gpu.capturing = False
    launch(**ANOTHER[name])
    assert len(gpu.launches.compiled) == 2


def test_amd_s_compiler_tells_large_tensors_apart(gpu, monkeypatch):
    """Meta tensors have a size and no memory."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for elements in (2**29 - 1, 2**29):
        for _ in range(2):
            launch(changed(TENSORS, _0=torch.empty(elements, device="meta")))
    assert len(gpu.launches.compiled) == len(gpu.launches.launched) == 2


def test_another_gpu_has_kernels_of_its_own(gpu, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(wanted):
        entered.append(wanted)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: wanted.index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    launch()
    launch(index=1)
    assert entered == [torch.device("cuda", 1)]
    assert len(gpu.launches.compiled) == 2


def test_a_launch_that_failed_is_not_taken_for_a_compiled_one(gpu, monkeypatch):
    kernels = pytest.importorskip("fastguide.step.backends.triton_kernel")
    monkeypatch.setattr(kernels, "step_kernel", {})  # has no such grid
    with pytest.raises(KeyError):
        launch()
    assert triton._compiled == {}
