"""Weights from moments and the step in one launch: when there is one, and that its bits are those of two launches."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

import fastguide
from fastguide.guidance.encoded import PART
from fastguide.step.operator import THRESHOLD_WORDS
from tests.step.backends.test_moments_kernel import DTYPES, GUIDANCES, arguments_of
from tests.support import device_code
from tests.support.ptx.__main__ import compiled_ptx
from tests.support.ptx.memory import INITIALISED, READ, WRITE
from tests.support.ptx.placed import Placed
from tests.support.ptx.step import Library

pytestmark = [
    pytest.mark.xdist_group("ptx"),  # one process reads the PTX
    pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}"),
]
WITH_CLUSTERS, WITHOUT_ROOM = 1, 2  # devices of cuda_runtime.h
CHANGED = dict.fromkeys(("history", "cursor", "timestep"), READ | WRITE | INITIALISED) | {"staged": WRITE}
WRITTEN = ("out", "original", "staged", "history", "made", "cursor", "timestep")
SHAPES = {
    "less than a part": (3, 5, 8),
    "a part": (2, PART),
    "two parts": (2, PART + 8),
    "three parts": (1, 2 * PART + 8),
}


def steps():
    """What a step may have beside its weights; of 2 samples, which begin at rows of their own."""
    return {
        "nothing": {"index": 4},
        "no row": {"index": 99},
        "noise": {"noise": 0.3},
        "seeds": {"seeds": torch.tensor([7, 2**60, -5]), "rows": noisy(), "original": 1.0},
        "history": {"history": 3.0, "anchor": 1.0, "rows": multistep(), "seeds": torch.tensor(5), "staged": 2.0},
        "a cursor": {
            "cursor": torch.tensor([[4, 9, 1, 0], [7, 7, 0, 0], [9, 10, 8, 0]]),
            "timestep": torch.full((6,), -1),
            "staged": 2.0,
        },
    }


def noisy():
    return fastguide.ddpm(fastguide.NoiseSchedule.linear(), 10, clip_sample_range=1.0).device_rows(None, torch.float32)


def multistep():
    table = fastguide.dpm_solver(fastguide.NoiseSchedule.linear(), 10, algorithm_type="sde-dpmsolver++")
    return table.device_rows(None, torch.float32)


def case(name, guidance, shape, dtypes=DTYPES["bfloat16"], place=lambda name, tensor: tensor):
    """The operator's arguments; a number in ``steps`` makes so many tensors like the sample."""
    generator = torch.Generator().manual_seed(1)
    changed = dict(steps()[name])
    for field, count in changed.items():
        if isinstance(count, float):
            size = (int(count) or 1) * shape[0], *shape[1:]
            changed[field] = torch.randn(size, generator=generator)
    if "cursor" in changed:
        changed["cursor"] = changed["cursor"][: shape[0]]
        changed["timestep"] = changed["timestep"][: 2 * shape[0]]
    if changed.get("seeds", torch.tensor(0)).dim():
        changed["seeds"] = changed["seeds"][: shape[0]]
    return arguments_of(guidance, shape, dtypes, place=place, **changed)


def written_by(arguments, run):
    """What a run of them writes; it finds them as they were."""
    names = [name for name in (*WRITTEN, "scratch") if getattr(arguments, name) is not None]
    before = {name: getattr(arguments, name).clone() for name in names}
    run()
    after = {name: getattr(arguments, name).clone() for name in names}
    for name in names:
        getattr(arguments, name).copy_(before[name])
    assert torch.equal(counters(arguments, after["scratch"]), counters(arguments, before["scratch"]))
    return {name: after[name] for name in names if name != "scratch"}


def counters(arguments, scratch):
    batch, columns = arguments.made.shape
    return scratch[len(scratch) - batch * (columns + 1) :][:batch]


def check_equal(got, expected):
    for name, tensor in expected.items():
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def launches_of(arguments, **how):
    return device_code.record_all({**device_code.arguments_of(*arguments), **how})


# ---- When ----


def test_a_sample_of_one_part_is_one_launch_and_of_eight_where_there_are_clusters():
    for shape in [(3, 8), (70, PART), (2, PART + 8), (2, 8 * PART), (2, 8 * PART + 8)]:
        arguments = arguments_of(GUIDANCES["rescaled x_0"], shape)
        parts = -(-shape[1] // PART)
        plain, clusters = launches_of(arguments), launches_of(arguments, device=WITH_CLUSTERS)
        assert len(plain) == (1 if parts == 1 else 2)
        assert len(clusters) == (1 if parts <= 8 else 2)
        if len(clusters) == 1:
            blocks = 1 << (parts - 1).bit_length()
            assert (clusters[0].blocks, clusters[0].cluster) == (shape[0] * blocks, blocks)
        assert {each.cluster for each in plain} == {1}


def test_what_one_launch_does_not_do_is_two():
    def count(shape=(2, 64), **changed):
        like = {name: torch.zeros(shape) for name, value in changed.items() if value is None}
        return len(launches_of(arguments_of(GUIDANCES["rescaled"], shape, **(changed | like))))

    assert count() == count(noise=None) == count(seeds=torch.tensor(3)) == 1
    assert count(gradient=None) == count(mask=None, known=None, known_noise=None) == 2
    assert count(gradient=None, variance=None) == 2
    assert count((2, 60)) == 2  # no whole vectors
    assert count(philox=torch.tensor([1, 0]), philox_threads=256) == 2
    assert count(inverse_thresholds=torch.zeros(2, THRESHOLD_WORDS)) == 5
    shifted = torch.zeros(2, 80)[:, 1:65]
    arguments = arguments_of(GUIDANCES["rescaled"], (2, 64))
    assert len(launches_of(arguments._replace(sample=shifted))) == 2
    last = torch.zeros(2, 4, 4, 4).to(memory_format=torch.channels_last)
    arguments = arguments_of(GUIDANCES["rescaled"], (2, 4, 4, 4), seeds=torch.tensor(3))
    fields = ("out", "sample")
    moved = arguments._replace(**{name: last.clone() for name in fields}, predictions=[last.clone(), last.clone()])
    assert len(launches_of(moved)) == 2
    assert len(launches_of(moved._replace(seeds=None))) == 1


def test_a_device_that_has_no_room_for_clusters_makes_two():
    arguments = arguments_of(GUIDANCES["rescaled"], (2, PART + 8))
    for _ in range(2):  # it is asked once
        assert len(launches_of(arguments, device=WITH_CLUSTERS)) == 1
        assert len(launches_of(arguments, device=WITHOUT_ROOM)) == 2


# ---- The same bits ----


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("name", steps())
def test_one_launch_on_the_host(name, guidance):
    choices = [(SHAPES["less than a part"], "float32"), (SHAPES["a part"], "bfloat16"), ((1, 3, 16), "float16")]
    for shape, dtypes in choices:
        arguments = case(name, GUIDANCES[guidance], shape, DTYPES[dtypes])
        plain = device_code.arguments_of(*arguments)
        assert len(device_code.record_all(plain)) == 1

        def run(most_parts, order, plain=plain):
            return lambda: device_code.module().launch({**plain, "most_parts": most_parts}, order, None)

        check_equal(written_by(arguments, run(8, 1)), written_by(arguments, run(0, 2)))
        assert not bool(written_by(arguments, run(8, 3))["made"][0].isnan().any())


@pytest.fixture(scope="module")
def with_clusters():
    """The kernel as GPUs with clusters get it."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on the PATH")
    return Library(compiled_ptx(90, "moments"))


def joined_and_not(library, joined, arguments, placed, device):
    """What one launch writes, and two do; and what the interpreter has found in the one."""
    found = []

    def run(one, **how):
        launches = launches_of(arguments, device=device, **how)
        assert len(launches) == (1 if one else 2)
        for each in launches:
            where = joined if each.kernel.startswith("moments_kernel") else library
            found.append(placed.launch(where, each))

    two = written_by(arguments, lambda: run(False, most_parts=0))
    one = written_by(arguments, lambda: run(True))
    return one, two, found


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("nothing", "three"), ("seeds", "rescaled"), ("history", "four"), ("a cursor", "projected x_0")],
)
def test_one_launch_interpreted(library, name, guidance):
    placed = Placed(**CHANGED)
    arguments = case(name, GUIDANCES[guidance], (2, PART // 2), place=placed)
    one, two, found = joined_and_not(library, library, arguments, placed, device=0)
    assert found == [[], [], []]
    check_equal(one, two)


@pytest.mark.parametrize(
    ("name", "guidance", "shape"),
    [
        ("nothing", "rescaled x_0", "two parts"),
        ("history", "of the step", "three parts"),
        ("a cursor", "three", "two parts"),
    ],
)
def test_clusters_interpreted(library, with_clusters, name, guidance, shape):
    placed = Placed(**CHANGED)
    arguments = case(name, GUIDANCES[guidance], SHAPES[shape], place=placed)
    one, two, found = joined_and_not(library, with_clusters, arguments, placed, WITH_CLUSTERS)
    assert found == [[], [], []]
    check_equal(one, two)


# ---- What is found ----


FAULTS = {
    "no wait for the cluster": lambda text: re.sub(r"barrier\.cluster\.\w+\.\w+\.aligned;", "", text),
    "no barrier ahead of the step": lambda text: without_the_last_barrier(text),
}


def without_the_last_barrier(text):
    """The last one ahead of the step's stores: two behind it are of the cursor."""
    places = [found.span() for found in re.finditer(r"bar\.sync[^;]*;", text)]
    begin, end = places[-3]
    return text[:begin] + text[end:]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_interpreter_finds_what_is_missing(with_clusters, fault):
    """The tests above have teeth."""
    placed = Placed(**CHANGED)
    arguments = case("nothing", GUIDANCES["rescaled"], SHAPES["two parts"], place=placed)
    (only,) = launches_of(arguments, device=WITH_CLUSTERS)

    def changed(text):
        assert FAULTS[fault](text) != text
        return FAULTS[fault](text)

    assert any("race" in text for text in placed.launch(with_clusters.changed(only.kernel, changed), only))
