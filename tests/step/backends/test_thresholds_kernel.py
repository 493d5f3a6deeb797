"""The CUDA kernel that finds thresholds: compiled for the host, and interpreted from its PTX, without races."""

from __future__ import annotations

import re

import pytest
import torch

import fastguide
from fastguide import ClassifierFree, Composed
from fastguide.step.backends import reference
from fastguide.step.operator import THRESHOLD_WORDS, StepArguments
from tests.support import device_code
from tests.support.ptx.placed import Placed

pytestmark = [
    pytest.mark.xdist_group("ptx"),  # one process reads the PTX
    pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}"),
]
DDIM = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10)
SHAPES = {"less than a vector": (3, 5), "ragged": (3, 41, 31), "several parts": (2, 8216), "one element": (2, 1)}


def arguments_of(shape, table, guidance, dtype=torch.float32, place=lambda name, tensor: tensor, scale=1.5, **changed):
    """The operator's arguments, each tensor where ``place`` puts it."""
    generator = torch.Generator().manual_seed(shape[-1])
    x, *given = (scale * torch.randn(shape, generator=generator) for _ in range(1 + guidance.num_predictions))
    tensors = {
        "out": torch.zeros(shape), "original": torch.zeros(shape), "sample": x,
        "rows": table.device_rows(None, torch.float32), "weights": guidance.weights(x.device, torch.float32),
        "inverse_thresholds": torch.zeros(shape[0], THRESHOLD_WORDS),
    }  # fmt: skip
    placed = {name: place(name, tensor.contiguous()) for name, tensor in (tensors | changed).items()}
    predictions = [place(f"prediction {k}", p.to(dtype)) for k, p in enumerate(given)]
    fields = dict.fromkeys(StepArguments._fields) | {"index": 8, "philox_threads": 0, "predictions": predictions}
    return StepArguments(**(fields | placed))


def expected_of(a):
    """What the reference makes of them: the next sample, x_0, and 1 over the thresholds."""
    inverse = torch.zeros(len(a.sample), 1)
    wanted = a._replace(out=a.out.clone(), original=a.original.clone(), inverse_thresholds=inverse)
    reference.guided_step(*wanted)
    return wanted.out, wanted.original, inverse[:, 0]


def check(a, expected):
    out, original, inverse = expected
    torch.testing.assert_close(a.inverse_thresholds[:, 0], inverse, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(a.original, original, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(a.out, out, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not bool(a.inverse_thresholds[:, 1:].view(torch.int32).any())  # as it was


TABLES = {
    "between": DDIM.with_dynamic_thresholding(0.8, 1.5),
    "any top": DDIM.with_dynamic_thresholding(0.995, float("inf")),
    "the largest": DDIM.with_dynamic_thresholding(1.0, float("inf")),
    "at most 1": DDIM.with_dynamic_thresholding(0.2, 3.0),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_same_code_compiled_for_the_host(table, shape):
    for guidance in (ClassifierFree(3.0), Composed([1.0]), Composed([1.0, 2.0, -0.5])):
        for order, dtype in enumerate((torch.float32, torch.bfloat16)):
            a = arguments_of(shape, table, guidance, dtype)
            for _ in range(2):  # a second step finds its memory as the first did
                device_code.guided_step(*a, order=order)
                check(a, expected_of(a))


def test_what_is_not_finite_reaches_its_own_sample_alone():
    a = arguments_of((4, 700), TABLES["between"], ClassifierFree(3.0))
    for sample, value in ((1, torch.nan), (2, torch.inf)):
        a.predictions[1][sample, 99] = value
    device_code.guided_step(*a)
    check(a, expected_of(a))
    assert bool(a.original[1].isnan().all())
    assert bool(a.original[[0, 3]].isfinite().all())


def test_samples_at_rows_of_their_own():
    """One of which has no quantile, and one is finished."""
    rows = TABLES["between"].device_rows(None, torch.float32).clone()
    rows[3] = DDIM.device_rows(None, torch.float32)[3]
    a = arguments_of((3, 900), TABLES["between"], ClassifierFree(3.0), rows=rows, indices=torch.tensor([8, 3, 9]))
    device_code.guided_step(*a)
    _, original, inverse = expected_of(a)
    torch.testing.assert_close(a.original, original, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.inverse_thresholds[[0, 2], 0], inverse[[0, 2]], rtol=1e-6, atol=0)
    cursor = torch.tensor([[8, 10, 0, 0], [7, 7, 0, 0], [9, 10, 0, 0]])
    moved = arguments_of((3, 900), TABLES["between"], ClassifierFree(3.0), cursor=cursor)
    before = moved.sample.clone()
    moved = moved._replace(out=moved.sample)
    device_code.guided_step(*moved)
    assert torch.equal(moved.out[1], before[1])
    torch.testing.assert_close(moved.inverse_thresholds[[0, 2], 0], inverse[[0, 2]], rtol=1e-6, atol=0)


# ---- Interpreted ----


@pytest.mark.parametrize("waves", ["at once", "one by one"])
def test_the_kernel_interpreted(library, waves):
    placed = Placed()
    a = arguments_of((2, 4100), TABLES["between"], ClassifierFree(3.0), torch.bfloat16, placed)
    expected = expected_of(a)
    launches = device_code.record_all(device_code.arguments_of(*a))
    assert len(launches) == 4
    for each in launches:
        blocks = None if waves == "at once" else [[block] for block in reversed(range(each.blocks))]
        assert placed.launch(library, each, blocks) == []
    check(a, expected)


FAULTS = {
    "no barrier between the counts and their sums": lambda text: re.sub(r"bar\.sync[^;]*;", "", text, count=2),
    "a count that releases nothing": lambda text: text.replace("atom.add.release.gpu", "atom.add.relaxed.gpu"),
    "counts that are no atomics": lambda text: re.sub(
        r"atom\.shared\.add\.u32 \s*(%r\d+), (\[[^\]]+\]), (\S+);", r"st.shared.u32 \2, \3;", text
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_interpreter_finds_what_is_missing(library, name):
    """The test above has teeth."""
    placed = Placed()
    a = arguments_of((1, 4100), TABLES["between"], ClassifierFree(3.0), place=placed)
    first, *_ = device_code.record_all(device_code.arguments_of(*a))
    fault = FAULTS[name]

    def changed(text):
        assert fault(text) != text
        return fault(text)

    assert any("race" in text for text in placed.launch(library.changed(first.kernel, changed), first))
