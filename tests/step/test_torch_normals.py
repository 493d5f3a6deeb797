"""Normal values on the CPU are torch's to the bit, and so is the generator's state, whoever draws them."""

from __future__ import annotations

import _thread
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastguide.step import threads, torch_normals
from fastguide.step.attached import functions
from fastguide.step.backends import native
from fastguide.step.torch_normals import is_torch_s, normal_, pass_over

pytestmark = pytest.mark.skipif(
    functions is None
    or native.cpu_capability() == "baseline"
    or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the library has no code for what torch does on this processor",
)

SIZES = (16, 17, 31, 32, 623, 624, 625, 1000, 16384, 70001)
LEFT_TO_TORCH = {
    "one value": lambda: torch.empty(1),
    "fifteen values": lambda: torch.empty(15),
    "no values": lambda: torch.empty(0, 4),
    "bfloat16": lambda: torch.empty(40, dtype=torch.bfloat16),
    "float16": lambda: torch.empty(48, dtype=torch.float16),
    "float64": lambda: torch.empty(40, dtype=torch.float64),
    "every second one": lambda: torch.empty(80)[::2],
    "channels_last": lambda: torch.empty(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.empty(8, 9).t(),
}


def pairs(seed, position):
    """Return two generators at one place of one stream."""
    made = [torch.Generator().manual_seed(seed) for _ in range(2)]
    for each in made:
        torch.rand(position, generator=each)
    return made


def assert_same(ours, theirs):
    assert torch.equal(ours.get_state(), theirs.get_state())


def bits(tensor):
    return tensor.view(torch.int32)


@pytest.fixture(params=["avx2", "avx512"])
def capability(request):
    before = native.cpu_capability()
    if native.set_cpu_capability(request.param) != request.param:
        native.set_cpu_capability(before)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.set_cpu_capability(before)


def test_the_library_draws_as_this_torch_does():
    assert is_torch_s()


@pytest.mark.parametrize("position", [0, 1, 600, 623, 624, 625, 10_000])
def test_values_and_states_are_torch_s(capability, position):
    ours, theirs = pairs(torch.seed() % 2**63, position)
    for size in SIZES:
        got, expected = torch.full((size + 2,), 7.0), torch.empty(size).normal_(generator=theirs)
        assert functions.fill_normals(got[1:-1], ours, True) is True
        assert torch.equal(bits(got[1:-1]), bits(expected))
        assert got[0] == got[-1] == 7
        assert_same(ours, theirs)
        assert torch.equal(torch.rand(5, generator=ours), torch.rand(5, generator=theirs))


def _untempered(words):
    """Return the words of the engine's state that it makes these of (MT19937, backwards)."""
    mask, y = 0xFFFFFFFF, words
    y = y ^ (y >> 18)
    y = y ^ ((y << 15) & 0xEFC60000)
    low = y
    for _ in range(4):
        low = y ^ ((low << 7) & 0x9D2C5680)
    y = low & mask
    high = y
    for _ in range(2):
        high = y ^ (high >> 11)
    return high & mask


def test_any_uniform_values_give_torch_s_normal_ones(capability):
    """Of 24 bits, in both places of a pair: ends, powers of two, eighths of a turn, those beside them, and others."""
    near = torch.cat(
        [torch.arange(-3, 4) + edge for edge in (0, *(2**k for k in range(25)), *(k * 2**21 for k in range(9)))]
    )
    values = torch.cat([near, torch.randint(0, 2**24, (38 * 8 * 40 - len(near),))]) % 2**24
    theirs, ours = torch.Generator(), torch.Generator()
    for first, second in zip(values.view(-1, 38, 8), values.flip(0).roll(1000).view(-1, 38, 8), strict=True):
        words = torch.cat([first, second], 1).flatten()  # 608 of the 624
        state = torch.Generator().manual_seed(0).get_state()
        state[8:12].view(torch.int32)[0] = 624
        state[24 : 24 + 8 * len(words)].view(torch.int64).copy_(_untempered(words))
        theirs.set_state(state)
        ours.set_state(state)
        got, expected = torch.empty(len(words)), torch.empty(len(words)).normal_(generator=theirs)
        assert functions.fill_normals(got, ours, True) is True
        assert torch.equal(bits(got), bits(expected))
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_the_library_has_no_code_for_is_torch_s(name):
    ours, theirs = pairs(3, 7)
    got, expected = LEFT_TO_TORCH[name](), LEFT_TO_TORCH[name]()
    assert functions.fill_normals(got, ours, True) is None
    for _ in range(2):  # a value of a pair may be kept for the second draw
        assert normal_(got, ours) is got
        assert torch.equal(got, expected.normal_(generator=theirs))
        assert_same(ours, theirs)


def test_a_value_that_torch_keeps_for_a_later_draw_stays():
    ours, theirs = pairs(5, 0)
    for size in (3, 40, 2, 5):
        assert torch.equal(normal_(torch.empty(size), ours), torch.empty(size).normal_(generator=theirs))
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (1, 4, 8, 8), (0, 4)])
def test_values_that_are_passed_over_leave_the_generator_as_if_drawn(shape, dtype):
    ours, theirs = pairs(6, 610)
    for _ in range(3):
        pass_over(shape, dtype, ours)
        torch.randn(shape, dtype=dtype, generator=theirs)
        assert_same(ours, theirs)


def test_many_values_are_shared_among_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ours, theirs = pairs(8, 3)
        got, expected = torch.empty(2**21 + 2**20 + 21), torch.empty(2**21 + 2**20 + 21).normal_(generator=theirs)
        assert functions.fill_normals(got, ours, True) is True
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(got), bits(expected))
    assert_same(ours, theirs)


@pytest.mark.parametrize(("left", "following"), [(624, 2), (3, 623), (1, 0)])
def test_a_state_whose_words_end_before_it_says_is_left_to_torch(left, following):
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    state[8:12].view(torch.int32)[0], state[16:24].view(torch.int64)[0] = left, following
    generator.set_state(state)
    drawn = functions.fill_normals(torch.empty(16), generator, True)
    assert drawn is (True if left == 1 else None)
    assert torch.equal(generator.get_state(), state) == (drawn is None)


def test_bad_arguments_do_nothing():
    generator, values = torch.Generator(), torch.empty(16)
    for tensor, source in ((values, None), (None, generator), (values.requires_grad_(), generator)):
        assert functions.fill_normals(tensor, source, True) is None
    for source, count in ((None, 20), (generator, "20"), (generator, -1), (generator, 2**80)):
        assert functions.pass_normals(source, count, True) is None


# ---- Who draws ----


def drawn_by_torch(size=32):
    """Tell whether torch draws: it counts the write."""
    return normal_(torch.empty(size), torch.Generator())._version == 1


@contextmanager
def beside(target, *begun):
    """Run a function in another thread meanwhile, once events are set."""
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    for event in begun:
        assert event.wait(60)
    yield thread
    thread.join(60)
    assert not thread.is_alive()


def test_torch_draws_while_another_thread_may():
    """Whatever it does: this one waits too, but in a function that the library does not know."""
    begun, (reading, writing) = threading.Event(), os.pipe()

    def read():
        begun.set()
        os.read(reading, 1)

    assert not drawn_by_torch()
    with beside(read, begun):
        assert drawn_by_torch()
        os.write(writing, b"0")
    assert not drawn_by_torch()
    os.close(reading)
    os.close(writing)


def wait_for_event(done, begun):
    begun.set()
    done.wait()


def select(done, begun):
    with selectors.DefaultSelector() as selector, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        selector.register(server, selectors.EVENT_READ)
        begun.set()
        while not done.is_set():
            selector.select(0.01)


def join(done, begun):
    other = threading.Thread(target=done.wait)
    other.start()
    begun.set()
    other.join()


@pytest.mark.parametrize("wait", [wait_for_event, select, join])
def test_the_library_draws_while_other_threads_wait(wait):
    done, begun = threading.Event(), threading.Event()
    with beside(lambda: wait(done, begun), begun):
        _until(lambda: not drawn_by_torch())  # it is on its way to where it waits
        done.set()


def test_the_library_draws_beside_a_pool_without_tasks():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        _until(lambda: not drawn_by_torch())


def test_torch_draws_beside_a_thread_without_a_frame():
    """It executes a function of C alone, as ``Tensor.normal_`` may be."""
    lock, before = _thread.allocate_lock(), _thread._count()
    lock.acquire()
    _thread.start_new_thread(lock.acquire, ())
    try:
        _until(lambda: _thread._count() == before + 1)
        assert drawn_by_torch()
    finally:
        lock.release()
    _until(lambda: _thread._count() == before)
    assert not drawn_by_torch()


def test_torch_draws_beside_a_pool_that_begins_with_a_function():
    """One of C leaves the pool's own frame the innermost."""
    lock, before = threading.Lock(), _pools_frames()
    lock.acquire()
    with ThreadPoolExecutor(1, initializer=lock.acquire) as pool:
        task = pool.submit(int)
        try:
            _until(lambda: _pools_frames() == before + 1)
            assert drawn_by_torch()
        finally:
            lock.release()
        assert task.result() == 0


def _pools_frames():
    return sum(frame.f_code.co_name == "_worker" for frame in sys._current_frames().values())


def _until(happens):
    end = time.monotonic() + 60
    while not happens() and time.monotonic() < end:
        time.sleep(0.001)
    assert happens()


def test_no_audit_hook_runs_between_a_look_at_the_threads_and_the_draw():
    """A hook is code of Python, while which other threads may go on."""
    code = """
import sys, threading, time, torch
from fastguide.step.torch_normals import is_torch_s, normal_
done, events = threading.Event(), []
threading.Thread(target=done.wait).start()
values, generator = torch.empty(64), torch.Generator()
is_torch_s()
time.sleep(0.2)
sys.addaudithook(lambda event, arguments: events.append(event))
version = values._version
normal_(values, generator)
seen = list(events)
done.set()
print(values._version == version, seen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["True", "['sys._current_frames']\n"]


def test_a_thread_draws_beside_a_main_thread_that_waits_for_it():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(drawn_by_torch).result() is False


def test_functions_of_modules_that_are_imported_later_are_known(monkeypatch):
    class Heartbeat:
        def run(self):
            raise NotImplementedError

    monkeypatch.setattr(threads, "WAITS", [])
    monkeypatch.setitem(sys.modules, "ipykernel.heartbeat", types.SimpleNamespace(Heartbeat=Heartbeat))
    threads.know_waits()
    threads.know_waits()
    assert threads.WAITS.count((Heartbeat.run.__code__, None)) == 1


def test_a_mode_sees_torch_s_draw():
    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    seen: list[str] = []
    ours, theirs = pairs(2, 0)
    with Seeing():
        got = normal_(torch.empty(64), ours)
        pass_over((64,), torch.float32, ours)
    assert sum("normal_" in function or "randn" in function for function in seen) == 2
    assert torch.equal(got, torch.randn(64, generator=theirs))


def test_torch_draws_for_good_where_a_bit_differs(monkeypatch):
    def wrong(tensor, generator, is_own):
        done = functions.fill_normals(tensor, generator, is_own)
        tensor[-1] += 1e-6
        return done

    is_torch_s.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch_normals, "functions", functions._replace(fill_normals=wrong))
        assert not is_torch_s()
        assert drawn_by_torch()
    is_torch_s.cache_clear()
    assert is_torch_s()
    assert not drawn_by_torch()


def test_torch_draws_where_it_computes_in_another_way():
    """torch without AVX2 takes other logarithms, sines and cosines."""
    code = (
        "import torch; from fastguide.step.torch_normals import is_torch_s, normal_;"
        "ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1);"
        "same = torch.equal(normal_(torch.empty(1000), ours), torch.randn(1000, generator=theirs));"
        "print(is_torch_s(), same, torch.equal(ours.get_state(), theirs.get_state()))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
