"""Norms of groups and the step in one launch: when there is one, and that its bits are those of two launches."""

from __future__ import annotations

import re

import pytest
import torch

import fastguide
from fastguide.step.operator import THRESHOLD_WORDS
from tests.step.backends.test_groups_kernel import DTYPES, GUIDANCES, SCHEDULE, arguments_of
from tests.support import device_code
from tests.support.ptx.memory import INITIALISED, READ, WRITE
from tests.support.ptx.placed import Placed

pytestmark = [
    pytest.mark.xdist_group("ptx"),  # one process reads the PTX
    pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}"),
]
CHANGED = dict.fromkeys(("history", "cursor", "timestep"), READ | WRITE | INITIALISED) | {"staged": WRITE}
WRITTEN = ("out", "original", "staged", "history", "made", "cursor", "timestep")
SHAPES = {  # samples, groups, elements of a group
    "vectors": (3, 9, 64),
    "some begin between vectors": (3, 11, 100),
    "single elements": (3, 35, 3),
    "a block's": (3, 2, 4099),
}


def rows_of(table):
    return table.device_rows(None, torch.float32)


STEPS = {  # what a step of 3 samples may have beside its weights; a number is that of tensors like the sample
    "nothing": {},
    "no row": {"index": 99},
    "rows of their own": {"indices": torch.tensor([4, 0, 9])},
    "clipped": {"rows": rows_of(fastguide.ddim(SCHEDULE, 10, clip_sample_range=0.5)), "original": 1},
    "noise": {"rows": rows_of(fastguide.ddim(SCHEDULE, 10, eta=1.0)), "noise": 1, "staged": 1},
    "history": {"rows": rows_of(fastguide.lms(SCHEDULE, 10)), "history": 3, "original": 1},
    "an anchor": {"rows": rows_of(fastguide.unipc(SCHEDULE, 10)), "history": 3, "anchor": 1, "staged": 2},
    "a cursor": {
        "cursor": torch.tensor([[4, 9, 1, 0]]),
        "timestep": torch.full((6,), -1),
        "staged": 2,
        "rows": rows_of(fastguide.euler(SCHEDULE, 10)),  # which scales the next model input
    },
    "cursors": {
        "cursor": torch.tensor([[4, 9, 1, 0], [7, 7, 0, 0], [9, 10, 8, 0]]),
        "timestep": torch.full((6,), -1.0),
        "history": 3,
        "rows": rows_of(fastguide.dpm_solver(SCHEDULE, 10)),
    },
}


def case(name, guidance, shape, dtype, place=lambda name, tensor: tensor, **more):
    """The operator's arguments."""
    generator = torch.Generator().manual_seed(shape[1])

    def made(value):
        if not isinstance(value, int):
            return value
        return torch.randn(value * shape[0], *shape[1:], generator=generator)

    tensors = {field: value if field == "index" else made(value) for field, value in STEPS[name].items()}
    return arguments_of(guidance, shape, dtype, place=place, **(tensors | more))


def written_by(arguments, run):
    """What a run of them writes; it finds them as they were."""
    names = [name for name in WRITTEN if getattr(arguments, name) is not None]
    before = {name: getattr(arguments, name).clone() for name in (*names, "sample")}
    run()
    after = {name: getattr(arguments, name).clone() for name in names}
    for name, tensor in before.items():
        getattr(arguments, name).copy_(tensor)
    return after


def check_equal(got, expected):
    for name, tensor in expected.items():
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def launches_of(arguments, **how):
    return device_code.record_all({**device_code.arguments_of(*arguments), **how})


# ---- When ----


def test_what_one_launch_does_not_do_is_two():
    shape = (3, 9, 64)

    def count(**changed):
        like = {name: torch.zeros(shape) for name, value in changed.items() if value is None}
        return len(launches_of(arguments_of(GUIDANCES["normalized"], shape, **(changed | like))))

    assert count() == count(noise=None) == count(original=None) == count(anchor=None) == 1
    assert count(noise=None, original=None) == 2
    assert count(gradient=None) == count(variance=None) == count(mask=None, known=None, known_noise=None) == 2
    assert count(seeds=torch.tensor(3)) == count(philox=torch.tensor([1, 0]), philox_threads=256) == 2
    assert count(inverse_thresholds=torch.zeros(3, THRESHOLD_WORDS)) > 2


# ---- The same bits ----


def check_on_the_host(arguments):
    """Compare one launch with two, in other orders of blocks; the memory between two launches is not touched."""
    arguments.scratch.fill_(torch.nan)

    def run(**how):
        return lambda: device_code.guided_step(*arguments, **how)

    assert len(launches_of(arguments)) == 1
    one = written_by(arguments, run(order=1))
    assert bool(arguments.scratch.isnan().all())
    assert not bool(one["made"][0].isnan().any())
    check_equal(one, written_by(arguments, run(order=2, step_groups=False)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", STEPS)
def test_one_launch_on_the_host(name, shape):
    chosen = zip(GUIDANCES.values(), DTYPES.values(), strict=True)
    for guidance, dtype in chosen:
        check_on_the_host(case(name, guidance, shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sample_of_16_bits(dtype):
    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 9, 64), (3, 11, 100)):
        x = torch.randn(shape, generator=generator).to(dtype)
        check_on_the_host(case("an anchor", GUIDANCES["limited"], shape, dtype, sample=x, out=torch.zeros_like(x)))


@pytest.mark.parametrize("name", ["sample", "prediction"])
def test_the_next_sample_may_be_written_over_what_it_is_made_of(name):
    arguments = case("history", GUIDANCES["projected"], (3, 11, 100), torch.float32)
    expected = written_by(arguments, lambda: device_code.guided_step(*arguments))
    over = arguments.sample if name == "sample" else arguments.predictions[1]
    moved = arguments._replace(out=over)
    device_code.guided_step(*moved)
    check_equal({"out": moved.out}, {"out": expected["out"]})


@pytest.mark.parametrize("name", ["sample", "out", "predictions", "history", "anchor", "staged"])
def test_tensors_that_begin_anywhere(name):
    """One that begins between vectors is enough for single elements, as is one whose samples do; nothing changes."""
    found = []
    for offset, behind in ((None, 0), (0, 8), (1, 7), (0, 4)):
        arguments = case("an anchor", GUIDANCES["normalized"], (3, 9, 64), torch.bfloat16)
        value = getattr(arguments, name)
        tensor = value[0] if name == "predictions" else value
        if offset is not None:
            wide = torch.zeros(len(tensor), offset + 9 * 64 + behind, dtype=tensor.dtype)
            view = wide[:, offset : offset + 9 * 64].view(tensor.shape).copy_(tensor)
            arguments = arguments._replace(**{name: [view, value[1]] if name == "predictions" else view})
        accesses = device_code.guided_step(*arguments)
        assert (accesses > 0) == (behind in (0, 8))
        found.append({output: getattr(arguments, output) for output in ("out", "history", "staged", "made")})
    for moved in found[1:]:
        check_equal(moved, found[0])


# ---- Interpreted ----


def one_and_two(library, arguments, placed, one_by_one):
    """What one launch writes, and two do; and what the interpreter has found. Blocks run in another order."""
    found = []

    def run(count, **how):
        launches = launches_of(arguments, **how)
        assert len(launches) == count
        for each in launches:
            waves = [[block] for block in reversed(range(each.blocks))] if one_by_one else None
            found.append(placed.launch(library, each, waves))

    one = written_by(arguments, lambda: run(1))
    return one, written_by(arguments, lambda: run(2, step_groups=False)), found


@pytest.mark.parametrize(
    ("name", "guidance", "shape", "dtype", "one_by_one"),
    [
        ("nothing", "normalized", (3, 17, 64), "bfloat16", False),
        ("clipped", "limited", (3, 5, 100), "float16", False),
        ("noise", "projected", (3, 11, 3), "float32", True),
        ("an anchor", "normalized", (3, 5, 40), "float32", False),
        ("history", "limited", (3, 2, 2056), "bfloat16", False),
        ("a cursor", "projected", (3, 35, 16), "bfloat16", False),
        ("a cursor", "projected", (3, 35, 16), "float32", True),
        ("cursors", "normalized", (3, 35, 16), "float16", False),
        ("cursors", "normalized", (3, 35, 3), "bfloat16", True),
    ],
)
def test_one_launch_interpreted(library, name, guidance, shape, dtype, one_by_one):
    placed = Placed(**CHANGED)
    arguments = case(name, GUIDANCES[guidance], shape, DTYPES[dtype], place=placed)
    one, two, found = one_and_two(library, arguments, placed, one_by_one)
    assert found == [[], [], []]
    check_equal(one, two)


def test_the_interpreter_finds_what_is_missing(library):
    """Each barrier ahead of the step is needed: without it, a block reads what is not there yet."""
    placed = Placed(**CHANGED)
    arguments = case("an anchor", GUIDANCES["normalized"], (3, 17, 64), torch.bfloat16, place=placed)
    (only,) = launches_of(arguments)
    text = library.module.sources[library.mangled[only.kernel]]
    barriers = [found.span() for found in re.finditer(r"bar\.\w+[^;]*;", text)]
    assert len(barriers) >= 4
    for begin, end in barriers[1:3]:  # the first is of a cursor, and the others are behind the step
        without = library.changed(only.kernel, lambda text, begin=begin, end=end: text[:begin] + text[end:])
        assert any("race" in found for found in placed.launch(without, only)), text[begin - 200 : end]
