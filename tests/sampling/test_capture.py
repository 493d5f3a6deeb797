"""The loop as a graph, on the CPU's stand-in for one: the same bits as eager, and nothing captured twice."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Sampler
from fastguide.sampling import capture as graphs
from tests.support.loop_cases import (
    ALL_CASES,
    COND,
    DDIM,
    DDPM,
    FREE,
    IMAGE,
    LABELS,
    LEARNED,
    MASK,
    SCHEDULE,
    UNCOND,
    Model,
    call,
    classifier,
    samples,
    x_T,
)
from tests.support.recorded_graph import recorded  # noqa: F401


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", ALL_CASES)
def test_captured_and_eager_give_the_same_bits(case, layout, recorded):  # noqa: F811
    make, options = ALL_CASES[case]
    x = x_T().to(torch.float64 if case == "double precision" else torch.float32, memory_format=layout)
    sampler, eager = make(), make()
    eager.cuda_graph = False
    expected = samples(eager, options, x)
    for _ in range(2):
        got = samples(sampler, options, x)
        assert torch.equal(got.sample, expected.sample)
        assert torch.equal(got.samples, expected.samples)
    called = sampler.model.called
    assert torch.equal(call(sampler, options, x), expected.sample)
    assert sampler.model.called == called, "Python ran at a replay"
    assert recorded.captured == (2 if case.startswith("an interval") else 1)
    if "generator" not in options:
        sampler.cuda_graph = "loop"
        assert torch.equal(call(sampler, options, x), expected.sample)


def test_what_may_change_without_a_new_capture(recorded):  # noqa: F811
    sampler, eager = (Sampler(Model(), DDPM, ClassifierFree(3.0), cuda_graph=c) for c in ("auto", False))
    changes = {
        "nothing": {},
        "scale": {"guidance": ClassifierFree(7.5)},
        "a scale of each step": {"guidance": ClassifierFree.per_step([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])},
        "number of steps": {"table": fastguide.ddpm(SCHEDULE, 11), "guidance": ClassifierFree(2.0)},
        "schedule": {"table": fastguide.ddpm(fastguide.NoiseSchedule.cosine(), 60)},
        "solver": {"table": fastguide.ddim(SCHEDULE, 4, eta=1.0)},
        "a slice": {"table": DDPM[2:]},
    }
    results = []
    for change in changes.values():
        for s in (sampler, eager):
            for name, value in change.items():
                setattr(s, name, value)
        for options in ({"seeds": [1, 2, 3], **FREE}, {"seeds": [9, 2, 4], "cond": COND + 1, "uncond": UNCOND - 1}):
            got, expected = (s(x_T(seed=7), **options) for s in (sampler, eager))
            assert torch.equal(got, expected)
            results.append(got)
    assert recorded.captured == 1
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_other_shapes_and_kinds_are_captured_and_cached(recorded):  # noqa: F811
    sampler = Sampler(Model(), DDIM, max_loops=2)
    for batch, captured in (
        (1, 1),
        (2, 2),
        (1, 2),
        (3, 3),
        (1, 3),
        (2, 4),
        (1, 4),
    ):  # the least recently used is dropped
        sampler(x_T(batch, 4, 6, 5))
        assert recorded.captured == captured
    sampler.clear()
    sampler(x_T(2, 4, 6, 5))
    assert recorded.captured == 5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x_T": x_T(2, 4, 6, 5), "cond": COND[:2], "uncond": UNCOND[:2]}, r"shape \(3, 4, 6, 5\), got \(2, 4, 6, 5\)"),
        ({"seeds": [1, 2, 3]}, "noise given, got portable"),
        ({"cond": COND.double(), "uncond": UNCOND.double()}, "conditions .*float32.*, got .*float64"),
        ({"image": IMAGE, "mask": MASK}, "inpainting False, got True"),
    ],
)
def test_another_kind_is_refused_where_nothing_may_be_captured_again(other, message, recorded):  # noqa: F811
    sampler = Sampler(Model(), DDPM, ClassifierFree(2.0), recapture=False)
    first = sampler(x_T(), **FREE, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"recapture: expected a call like the first, of {message}"):
        sampler(**{"x_T": x_T(), **FREE, **other})
    assert torch.equal(sampler(x_T(), **FREE, generator=torch.Generator().manual_seed(0)), first)


class Uncapturable:
    def __init__(self, function, pool):
        function()
        raise RuntimeError("cuda_graph: the model cannot be captured")


def test_a_model_that_cannot_be_captured(recorded, monkeypatch):  # noqa: F811
    monkeypatch.setattr(graphs, "Graph", Uncapturable)
    with pytest.raises(RuntimeError, match="cuda_graph: the model cannot be captured"):
        Sampler(Model(), DDIM)(x_T())
    eager = Sampler(Model(), DDIM, cuda_graph=False)(x_T())
    sampler = Sampler(Model(), DDIM, cuda_graph="try")
    with pytest.warns(RuntimeWarning, match="running without a graph: cuda_graph: the model cannot be captured"):
        assert torch.equal(sampler(x_T()), eager)
    called = sampler.model.called
    assert torch.equal(sampler(x_T()), eager)  # and it is not tried again
    assert sampler.model.called == called + 6


def test_a_callback_may_write_to_the_sample(recorded):  # noqa: F811
    """And the model's next input, which the step has staged, is of what it wrote."""

    def clamp(step, timestep, sample):
        sample.clamp_(-0.5, 0.5)

    for guidance, options in ((None, {}), (ClassifierFree(2.0), FREE)):
        got, expected = (
            Sampler(Model(), DDIM, guidance, cuda_graph=c)(x_T(), **options, callback=clamp) for c in ("auto", False)
        )
        assert torch.equal(got, expected)
        x = x_T()
        model = Model()
        with torch.no_grad():
            for step, t in enumerate(DDIM.timesteps):
                outputs = [model(x, t, options[name]) for name in ("uncond", "cond") if options] or [model(x, t)]
                x = fastguide.guided_step(DDIM, step, x, outputs, guidance).clamp(-0.5, 0.5)
        torch.testing.assert_close(got, x)


def test_a_whole_loop_leaves_nothing_between_the_steps(recorded):  # noqa: F811
    sampler = Sampler(Model(), DDPM, cuda_graph="loop")
    for options in (
        {"callback": lambda *a: None, "seeds": [1, 2, 3]},
        {"check_finite": True, "seeds": [1, 2, 3]},
        {"progress": True, "seeds": [1, 2, 3]},
        {"generator": torch.Generator()},
    ):
        with pytest.raises(ValueError, match="cuda_graph: 'loop' replays all steps at once; expected 'auto' with"):
            sampler(x_T(), **options)
    for results in ({"originals": False}, {"samples": False}):
        with pytest.raises(ValueError, match="cuda_graph: 'loop' replays all steps at once; expected 'auto' with"):
            sampler.trajectory(x_T(), **results, seeds=[1, 2, 3])
    assert sampler(x_T(), seeds=[1, 2, 3]).isfinite().all()


def test_no_graphs_on_the_cpu():
    with pytest.raises(ValueError, match="cuda_graph: expected 'auto' or False for an x_T on cpu"):
        Sampler(Model(), DDIM, cuda_graph="loop")(x_T())
    for mode in ("auto", "try", False):
        sampler = Sampler(Model(), DDIM, cuda_graph=mode)
        sampler(x_T())
        assert sampler.model.called == 6


RECONFIGURED = {  # what of a sampler, or its call, makes another loop
    "model": lambda s, o: setattr(s, "model", Model(seed=1)),
    "dtype": lambda s, o: (setattr(s, "dtype", torch.float64), setattr(s, "model", Model(dtype=torch.float64))),
    "batched": lambda s, o: setattr(s, "batched", False),
    "skips": lambda s, o: (
        setattr(s, "skip_unconditional", True),
        setattr(s, "guidance", ClassifierFree.per_step([1, 1, 4, 4, 1, 1])),
    ),
    "timestep_dtype": lambda s, o: setattr(s, "timestep_dtype", torch.float32),
    "scalar_timestep": lambda s, o: setattr(s, "scalar_timestep", True),
    "scales per sample": lambda s, o: setattr(s, "guidance", ClassifierFree([1.0, 2.0, 5.0])),
    "predictions": lambda s, o: (setattr(s, "guidance", None), o.pop("uncond")),
    "a classifier": lambda s, o: (
        setattr(s, "guidance", ClassifierFree(2.0) + Classifier(classifier, 2.0)),
        o.update(labels=LABELS),
    ),
    "a learned variance": lambda s, o: (setattr(s, "table", LEARNED), setattr(s, "model", Model(8))),
    "backend": lambda s, o: setattr(s, "backend", "reference"),
    "sample's dtype": lambda s, o: (o.update(x_T=x_T().double()), setattr(s, "model", Model(dtype=torch.float64))),
    "layout": lambda s, o: o.update(x_T=x_T().contiguous(memory_format=torch.channels_last)),
    "conditions": lambda s, o: o.update(cond={"y": COND}, uncond={"y": UNCOND}),
    "noise": lambda s, o: (o.pop("seeds"), o.update(generator=3)),
    "a mask": lambda s, o: o.update(image=IMAGE, mask=MASK),
}


@pytest.mark.parametrize("change", RECONFIGURED)
def test_a_sampler_that_is_reconfigured_is_another_loop(change, recorded):  # noqa: F811
    """And the one before is still cached."""
    options = {"x_T": x_T(), **FREE, "seeds": [1, 2, 3]}
    sampler = Sampler(Model(), DDPM, ClassifierFree(3.0))
    before = call(sampler, {k: v for k, v in options.items() if k != "x_T"}, options["x_T"])
    first = dict(vars(sampler))
    changed = dict(options)
    RECONFIGURED[change](sampler, changed)
    eager = Sampler(Model(), DDPM, ClassifierFree(3.0), cuda_graph=False)
    RECONFIGURED[change](eager, dict(options))
    x = changed.pop("x_T")
    assert torch.equal(call(sampler, changed, x), call(eager, changed, x))
    assert recorded.captured >= 2
    for name in ("model", "dtype", "batched", "skip_unconditional", "timestep_dtype", "scalar_timestep", "backend"):
        setattr(sampler, name, first[name])
    sampler.table, sampler.guidance = DDPM, ClassifierFree(3.0)
    captured = recorded.captured
    assert torch.equal(call(sampler, {k: v for k, v in options.items() if k != "x_T"}, options["x_T"]), before)
    assert recorded.captured == captured


def test_autocast_and_evaluation_are_parts_of_a_loop(recorded):  # noqa: F811
    sampler, eager = Sampler(Model(), DDIM), Sampler(Model(), DDIM, cuda_graph=False)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            inside = [s(x_T()) for s in (sampler, eager)]
        outside = [s(x_T()) for s in (sampler, eager)]
        assert torch.equal(*inside)
        assert torch.equal(*outside)
        assert not torch.equal(inside[0], outside[0])
    assert recorded.captured == 2
    sampler.model.eval()
    sampler(x_T())
    assert recorded.captured == 3


def test_tables_of_one_length_are_told_apart(recorded):  # noqa: F811
    sampler, eager = Sampler(Model(), DDIM), Sampler(Model(), DDIM, cuda_graph=False)
    for table in (DDIM, fastguide.ddim(SCHEDULE, 6, timestep_spacing="trailing"), DDPM, DDIM):
        sampler.table = eager.table = table
        assert torch.equal(sampler(x_T(), seeds=[1, 2, 3]), eager(x_T(), seeds=[1, 2, 3]))


def test_whole_loops_are_cached_with_a_bound(recorded):  # noqa: F811
    sampler = Sampler(Model(), DDIM, cuda_graph="loop", max_loops=2)
    for steps, captured in ((6, 1), (5, 2), (6, 2), (4, 3), (6, 3), (5, 4)):
        sampler.table = DDIM[6 - steps :]
        sampler(x_T())
        assert recorded.captured == captured
    frozen = Sampler(Model(), DDIM, cuda_graph="loop", recapture=False)
    frozen(x_T())
    frozen.table = DDIM[1:]
    with pytest.raises(ValueError, match="recapture: expected the steps of the first call"):
        frozen(x_T())


def test_a_call_that_fails_decides_nothing(recorded):  # noqa: F811
    sampler = Sampler(lambda x, t: x[:1] * 0.5, DDIM, recapture=False)
    with pytest.raises(ValueError, match="model: expected it to return shape"):
        sampler(x_T())
    assert sampler(x_T(1, 4, 6, 5)).shape == (1, 4, 6, 5)


class Stream:
    """Stands in for a CUDA stream."""

    def __init__(self, name="side"):
        self.name = name

    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins for what a capture needs of torch.cuda; ``fails`` says whether a capture's end does."""
    state = types.SimpleNamespace(current=["default"], log=[], fails=True, streams=0)

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            state.current.append(self.stream.name)

        def __exit__(self, *_):
            state.current.pop()

    class Capture:
        def __init__(self, graph, pool=None, stream=None, **options):
            self.pool, self.stream = pool, stream

        def __enter__(self):
            state.current.append("capture")
            assert not torch.is_autocast_cache_enabled()

        def __exit__(self, *_):
            if self.pool is not None and state.fails:  # as torch's own, whose stream stays if its end fails
                raise RuntimeError("operation not permitted when stream is capturing")
            state.current.pop()
            state.log.append(("captured", self.pool, self.stream))

    def stream(*_):
        state.streams += 1
        return Stream()

    def ends(name):
        def end(index, handle):
            state.log.append((name, index, handle))
            if name == "release":
                raise RuntimeError("this torch has done so itself")

        return end

    handles = ((0, number) for number in itertools.count(1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: On(Stream("default")))
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("default"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ends("end"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", ends("release"), raising=False)
    monkeypatch.setattr(graphs, "_failed", [])
    return state


@pytest.mark.parametrize("leaves_open", [False, True])
def test_a_failed_capture_leaves_its_stream_and_keeps_its_graph(cuda, monkeypatch, leaves_open):
    """graphs.Graph itself; torch 2.10 and 2.11 leave a pool and a generator behind, which are put in order."""
    monkeypatch.setattr(graphs, "_LEAVES_CAPTURES_OPEN", leaves_open)
    pool, calls = graphs.Pool(torch.device("cpu")), []
    with pytest.raises(RuntimeError, match="cuda_graph: the model cannot be captured"):
        graphs.Graph(lambda: calls.append(cuda.current[-1]), pool)
    assert calls == ["side", "side", "capture"]
    assert torch.is_autocast_cache_enabled()
    assert len(graphs._failed) == 1
    in_order = [("end", 0, (0, 1)), ("release", 0, (0, 1)), ("captured", None, pool.side_stream)]
    assert cuda.log == (in_order if leaves_open else [])
    cuda.fails = False
    graphs.Graph(lambda: None, pool)
    assert cuda.log[-1] == ("captured", (0, 2), pool.side_stream)


def test_graphs_of_one_pool_are_captured_on_one_stream(cuda):
    """Or none would take the memory that another has freed."""
    cuda.fails = False
    pools = [graphs.Pool(torch.device("cpu")) for _ in range(2)]
    alive = [graphs.Graph(lambda: None, pool) for pool in (*pools, *pools)]
    assert cuda.streams == 2
    assert [stream for _, _, stream in cuda.log] == [pool.side_stream for pool in pools] * 2
    assert [handle for _, handle, _ in cuda.log] == [(0, 1), (0, 2)] * 2
    alive.clear()
    graphs.Graph(lambda: None, pools[0])
    assert cuda.log[-1][1] == (0, 3), "memory that no graph holds is begun with again"


@pytest.mark.parametrize("end_fails", [False, True])
def test_too_little_memory_is_not_blamed_on_the_model(cuda, end_fails):
    cuda.fails = end_fails
    pool, calls = graphs.Pool(torch.device("cpu")), []

    def function():
        calls.append(1)
        if len(calls) > graphs.WARM_UPS:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):
        graphs.Graph(function, pool)
    assert len(graphs._failed) == end_fails
