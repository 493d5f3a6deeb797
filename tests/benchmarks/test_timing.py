"""Test how the benchmarks time, with a simulated clock and a simulated GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.measure import caches, timing

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Clock:
    """A clock that only calls move, by the seconds that they are given."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, *seconds):
        """Return a call that takes each of the given times once, and then always the last."""
        left = list(seconds)

        def called():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return called


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_calls_take_turns_until_the_time_is_over(clock):
    found = timing.in_turns({"a": clock.call("a", 1.0, 0.01), "b": clock.call("b", 0.03)}, 3.99, CPU)
    assert clock.log[:6] == ["a"] * 3 + ["b"] * 3  # warm-ups, the first of which compiles
    assert all(sorted(clock.log[i : i + 2]) == ["a", "b"] for i in range(6, 206, 2))
    assert len(clock.log) == 206
    assert not found.failures
    assert found.times["a"] == pytest.approx((0.01, 0.01, 0.01, 100))
    assert found.times["b"].median == pytest.approx(0.03)


def test_nobody_always_follows_the_same(clock):
    timing.in_turns({name: clock.call(name, 0.01) for name in "abcde"}, 20.0, CPU)
    before_a = Counter(clock.log[i - 1] for i in range(16, len(clock.log)) if clock.log[i] == "a")
    assert max(before_a[name] for name in "bcde") < 0.4 * before_a.total()


def test_calls_are_repeated_some_times_however_little_time_there_is(clock):
    found = timing.in_turns({"a": clock.call("a", 0.05), "b": clock.call("b", 0.05)}, 0.0, CPU)
    assert found.times["a"].calls == found.times["b"].calls == 9


@pytest.mark.parametrize(("seconds", "calls"), [(0.2, 3), (2.0, 2)])
def test_slow_calls_leave_the_turns(clock, seconds, calls):
    found = timing.in_turns({"fast": clock.call("fast", 0.01), "slow": clock.call("slow", seconds)}, 10.0, CPU)
    assert found.times["slow"].calls == calls
    assert found.times["fast"].calls in (1000, 1001)
    assert clock.log.count("slow") == calls + 2


def test_who_raises_is_left_out_and_the_others_go_on(clock):
    def raises():
        if len(clock.log) > 20:
            raise RuntimeError("tired")
        clock.log.append("raises")
        clock.now += 0.01

    found = timing.in_turns({"a": clock.call("a", 0.01), "raises": raises, "b": clock.call("b", 0.01)}, 3.0, CPU)
    assert str(found.failures["raises"]) == "tired"
    assert set(found.times) == {"a", "b"}
    assert found.times["a"].calls > 100


def test_quantiles():
    assert timing.Times.of([3.0]) == (3.0, 3.0, 3.0, 1)
    assert timing.Times.of([float(n) for n in range(11)]) == pytest.approx((5.0, 1.0, 9.0, 11))


class Gpu:
    """A GPU that runs its work in order and later than the host; an event stores its time."""

    def __init__(self, monkeypatch, clock):
        self.clock, self.done_at, self.log, self.captured = clock, 0.0, [], None
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.done_at = max(gpu.done_at, clock.now)
                gpu.log.append("event")

            def synchronize(self):
                clock.now = max(clock.now, self.at)

            def elapsed_time(self, later):
                assert clock.now >= later.at, "read before it was over"
                return 1e3 * (later.at - self.at)

        class Graph:
            def replay(self):
                gpu.work("replay", self.seconds)

        class Capture:
            def __init__(self, graph):
                self.graph = graph

            def __enter__(self):
                gpu.captured = 0.0

            def __exit__(self, *error):
                self.graph.seconds, gpu.captured = gpu.captured, None

        class Stream:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(clock, "now", max(clock.now, self.done_at)))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work("sleep", cycles / timing._CYCLES_PER_SECOND))
        monkeypatch.setattr(timing.torch, "empty", lambda *a, device=None, **k: empty(1, **k) if device else empty(*a))

    def work(self, name, seconds):
        self.log.append(name)
        if self.captured is not None:
            self.captured += seconds
            return
        self.done_at = max(self.done_at, self.clock.now) + seconds

    def call(self, name, host, device):
        def called():
            self.clock.now += host
            self.work(name, device)

        return called


@pytest.fixture
def gpu(monkeypatch, clock):
    return Gpu(monkeypatch, clock)


def test_a_gpu_is_timed_between_events_while_the_host_runs_ahead(gpu):
    """A launch of 50 us does not show in a kernel of 3 us, as the device is busy before it."""
    found = timing.in_turns({"step": gpu.call("step", 50e-6, 3e-6)}, 1e-3, GPU)
    assert found.times["step"].median == pytest.approx(3e-6)
    assert gpu.log[-4:] == ["sleep", "event", "step", "event"]


def test_who_waits_for_the_device_shows_it(gpu, clock):
    def waits():
        gpu.work("a kernel", 3e-6)
        clock.now = max(clock.now, gpu.done_at) + 20e-6
        gpu.work("another", 3e-6)

    assert timing.in_turns({"step": waits}, 1e-3, GPU).times["step"].median == pytest.approx(26e-6)


def test_whole_loops_are_timed_with_their_host(gpu):
    """50 launches of 400 us of the host and 100 us of the device take the host's time."""

    def loop():
        for _ in range(50):
            gpu.clock.now += 400e-6
            gpu.work("a step", 100e-6)

    assert timing.in_turns({"loop": loop}, 0.1, GPU, wall=True).times["loop"].median == pytest.approx(20.1e-3)
    assert gpu.log.count("a step") < 50 * 30


def test_host_time_is_that_until_the_call_returns(gpu):
    assert timing.host_seconds(gpu.call("step", 50e-6, 1.0), GPU) == pytest.approx(50e-6)


def test_a_graph_has_no_launches(gpu):
    assert timing.in_a_graph(gpu.call("step", 50e-6, 3e-6), 20) == pytest.approx(3e-6)
    assert Counter(gpu.log)["replay"] == 11


def test_what_comes_before_a_call_is_not_timed(clock):
    """It is not called before the warm-ups either."""
    calls = {"a": clock.call("a", 0.0625), "b": clock.call("b", 0.03125)}
    prepare = clock.call("prepare", 1.0)
    asked = []

    def before(call):
        asked.append(next(name for name in calls if calls[name] is call))
        prepare()

    found = timing.in_turns(calls, 0.0, CPU, before=before)
    assert found.times["a"].median == 0.0625
    assert found.times["b"].median == 0.03125
    measured = clock.log[clock.log.index("prepare") :]
    assert len(measured) == 4 * 9
    assert set(measured[::2]) == {"prepare"}
    assert measured[1::2] == asked


def test_a_gpu_is_given_nothing_to_do_before(gpu):
    timing.in_turns({"step": gpu.call("step", 50e-6, 3e-6)}, 1e-3, GPU, before=lambda call: 1 / 0)


@pytest.mark.parametrize(
    ("step", "output", "filled", "trimmed"),
    [
        (2**20, 2**18, 2 * 2 * 2**21, False),  # twice the second level of two threads
        (2**22, 2**20, 3 * 2**24, False),  # one and a half of a last level of 32 MB
        (2**28, 2**25, 3 * 2**24, True),
    ],
)
def test_caches_and_freed_memory_before_a_step(monkeypatch, step, output, filled, trimmed):
    log = []
    buffer = torch.ones(1)
    monkeypatch.setattr(caches.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(caches, "last_level", lambda: 2**25)
    monkeypatch.setattr(caches, "_buffer", lambda size: log.append(size) or buffer)
    monkeypatch.setattr(caches, "_malloc_trim", lambda keep: log.append(f"keep {keep}"))
    caches.cold_caches(step, output)(lambda: log.append("the call"))
    assert log == [filled, *["keep 0", "the call"] * trimmed]
    assert buffer == 1  # what is written would have to leave the caches while the step is timed


def test_freed_memory_is_given_back():
    """Resident memory falls by what was freed, even if glibc's allocator holds it back."""
    status = Path("/proc/self/statm")
    if caches._malloc_trim is None or not status.exists():
        pytest.skip("this system has no malloc_trim")
    before = caches.cold_caches(2**20, 2**25)
    before(lambda: None)
    tensors = [torch.ones(2**16) for _ in range(256)]  # 64 MB in pieces that the allocator does not map one by one
    last = torch.ones(2**14)
    resident = int(status.read_text().split()[1])
    del tensors
    before(lambda: None)
    assert int(status.read_text().split()[1]) * 4096 < resident * 4096 - 2**25
    assert last.sum() == 2**14


def test_the_largest_cache_is_what_linux_says(monkeypatch, tmp_path):
    assert caches.last_level() >= 2**25
    for index, size in enumerate(("48K", "1024K", "262144K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(caches, "Path", lambda name: tmp_path)
    assert caches.last_level() == 2**28
