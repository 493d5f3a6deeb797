"""The Triton backend: torch's stream in Triton's interpreter, what is refused, and where it says it serves."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch
import triton_interpreter
from pure_noise import TABLE
from torch_randn import literal_normals

from fastguide.backends import triton
from fastguide.noise import TorchGrid

op = torch.ops.fastguide.guided_step_triton.default
WEIGHTS = torch.tensor([[[1.0, 0.0]]])

interpreted = pytest.mark.skipif(
    not triton_interpreter.INTERPRETED, reason="Triton is not installed, or a GPU is there: then tests/test_gpu.py"
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
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.empty(2, 3, dtype=torch.float64), "expected no float64 tensors in Triton"),
        (5, torch.zeros(4, 3), r"rows: expected shape \(steps, 14\), contiguous, got \(4, 3\)"),
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


def test_a_kernel_that_is_not_compiled_is_refused_inside_a_capture(monkeypatch):
    """Of every kind of arguments that Triton compiles anew for: dtype, alignment, width, and what is 1."""
    monkeypatch.setattr(triton, "_launched", set())
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    x, constants = torch.zeros(100), {"K": 1}
    known = (x, (x, None), 48, 17, 2**31)
    triton._refuse_cold_capture(x, known, constants)
    capturing = True
    triton._refuse_cold_capture(x, (torch.ones(100), (x, None), 32, 18, 2**31 + 16), constants)
    for arguments, others in [
        ((x.half(), *known[1:]), constants),
        ((x[1:], *known[1:]), constants),
        ((x, (x, x), *known[2:]), constants),
        ((*known[:2], 47, *known[3:]), constants),
        ((*known[:3], 1, 2**31), constants),
        ((*known[:4], 2**31 - 1), constants),
        (known, {"K": 2}),
    ]:
        with pytest.raises(RuntimeError, match="not compiled yet, and cannot be during a capture; run the step once"):
            triton._refuse_cold_capture(x, arguments, others)
