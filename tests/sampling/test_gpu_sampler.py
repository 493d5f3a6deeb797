"""The loop as a CUDA graph, on a GPU: eager's bits, nothing waited for or allocated, and what cannot be captured."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

import fastguide
from fastguide import ClassifierFree, Sampler
from fastguide.step.backends.registry import BACKENDS
from tests.support.loop_cases import ALL_CASES, COND, DDPM, FREE, SCHEDULE, SHAPE, UNCOND, Model, call, samples, x_T
from tests.support.on_gpu import NO_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]


def cuda(value):
    return tree_map_only(torch.Tensor, lambda t: t.cuda(), value)


def moved(sampler, **options):
    """A case's sampler on the GPU."""
    sampler.model.cuda()
    sampler.table = sampler.table.to("cuda")
    for name, value in options.items():
        setattr(sampler, name, value)
    return sampler


@pytest.fixture(params=["native", "triton"])
def gpu_backend(request):
    if not BACKENDS[request.param].serves("cuda"):
        pytest.skip(f"{request.param}: {BACKENDS[request.param].status}")
    return request.param


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", [name for name in ALL_CASES if name != "double precision"])
def test_captured_and_eager_give_the_same_bits(gpu_backend, case, layout):
    make, options = ALL_CASES[case]
    options, x = cuda(options), x_T().cuda().to(memory_format=layout)
    torch.backends.cudnn.deterministic = True
    expected = samples(moved(make(), cuda_graph=False, backend=gpu_backend), options, x)
    sampler = moved(make(), backend=gpu_backend)
    for _ in range(3):
        got = samples(sampler, options, x)
        assert torch.equal(got.samples, expected.samples)
    called = sampler.model.called
    assert torch.equal(call(sampler, options, x), expected.sample)
    assert sampler.model.called == called
    if "generator" not in options:  # a CPU generator's noise is drawn between the steps
        sampler.cuda_graph = "loop"
        assert torch.equal(call(sampler, options, x), expected.sample)


@pytest.mark.parametrize("mode", ["auto", "loop", False])
def test_a_generator_s_noise_is_torch_randn_s(gpu_backend, mode):
    """And the generator is left as torch leaves it: the last step draws nothing."""
    table = DDPM.to("cuda")
    ours, theirs = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    model = Model().cuda()
    sampler = Sampler(model, table, backend=gpu_backend, cuda_graph=mode)
    for _ in range(2):
        got = sampler(x_T().cuda(), generator=ours)
        x = x_T().cuda()
        with torch.no_grad():
            for step, t in enumerate(table.timesteps):
                noise = torch.randn(SHAPE, device="cuda", generator=theirs) if table.adds_noise[step] else None
                x = fastguide.guided_step(table, step, x, model(x, t.expand(3)), noise=noise, backend=gpu_backend)
        assert torch.equal(got, x)
        assert ours.get_offset() == theirs.get_offset()


def test_changes_between_replays(gpu_backend):
    sampler, eager = (
        Sampler(Model().cuda(), DDPM.to("cuda"), ClassifierFree(3.0), cuda_graph=c, backend=gpu_backend)
        for c in ("auto", False)
    )
    free = cuda(FREE)
    called = None
    for change in (
        {},
        {"guidance": ClassifierFree(7.5)},
        {"guidance": ClassifierFree.per_step([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])},
        {"table": fastguide.ddpm(SCHEDULE, 11).to("cuda"), "guidance": ClassifierFree(2.0)},
        {"table": fastguide.ddim(SCHEDULE, 40, eta=1.0).to("cuda")},
        {"table": DDPM.to("cuda")[2:]},
    ):
        for s in (sampler, eager):
            for name, value in change.items():
                setattr(s, name, value)
        for options in ({"seeds": [1, 2, 3], **free}, {"seeds": [9, 2, 4], **free, "cond": free["cond"] + 1}):
            assert torch.equal(sampler(x_T().cuda(), **options), eager(x_T().cuda(), **options))
        called = sampler.model.called if called is None else called
    assert sampler.model.called == called


def test_nothing_waits_and_nothing_is_allocated(gpu_backend):
    sampler = Sampler(Model().cuda(), DDPM.to("cuda"), ClassifierFree(3.0), backend=gpu_backend)
    x, free = x_T().cuda(), cuda(FREE)
    generator = torch.Generator("cuda").manual_seed(1)
    seeds = torch.tensor([1, 2, 3], device="cuda")
    for options in ({"generator": generator}, {"seeds": seeds}):
        sampler(x, **free, **options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler(x, **free, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counts = []
    for steps in (2, 40):
        sampler.table = fastguide.ddpm(SCHEDULE, steps).to("cuda")
        sampler(x, **free, seeds=seeds)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        sampler(x, **free, seeds=seeds)
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
    assert counts[0] == counts[1]


def test_one_launch_between_two_calls_of_the_model(gpu_backend):
    """Counted by the profiler, of eager steps: those of the model alone, and those of the loop."""
    model, free = Model().cuda(), cuda(FREE)
    table = fastguide.ddpm(SCHEDULE, 20).to("cuda")
    sampler = Sampler(model, table, ClassifierFree(3.0), cuda_graph=False, backend=gpu_backend)
    seeds = torch.tensor([1, 2, 3], device="cuda")

    def launches(function):
        function()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def loop(steps):
        sampler.table = fastguide.ddpm(SCHEDULE, steps).to("cuda")
        return launches(lambda: sampler(x_T().cuda(), **free, seeds=seeds))

    doubled, t = torch.cat([x_T().cuda()] * 2), torch.zeros(6, dtype=torch.int64, device="cuda")
    y = torch.cat([UNCOND, COND]).cuda()
    with torch.no_grad():
        of_the_model = launches(lambda: model(doubled, t, y))
    assert loop(20) - loop(10) == 10 * (of_the_model + 1)


def test_two_samplers_on_two_streams(gpu_backend):
    samplers = [Sampler(Model().cuda(), fastguide.ddpm(SCHEDULE, n).to("cuda"), backend=gpu_backend) for n in (20, 30)]
    expected = [s(x_T().cuda(), seeds=[1, 2, 3]) for s in samplers]
    streams = [torch.cuda.Stream() for _ in samplers]
    x = x_T().cuda()
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for sampler, stream in zip(samplers, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(sampler(x, seeds=[1, 2, 3]))
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def test_one_sampler_on_one_stream_after_another(gpu_backend):
    sampler = Sampler(Model().cuda(), fastguide.ddpm(SCHEDULE, 50).to("cuda"), backend=gpu_backend)
    x = x_T().cuda()
    expected = sampler(x, seeds=[1, 2, 3])
    torch.cuda.synchronize()
    results = []
    for _ in range(6):
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(sampler(x, seeds=[1, 2, 3]))
    torch.cuda.synchronize()
    assert all(torch.equal(got, expected) for got in results)


def test_a_model_that_waits_for_the_gpu():
    model = Model().cuda()

    def waits(x, t):
        return model(x, t) * float(t.max() >= 0)

    table = DDPM.to("cuda")
    with pytest.raises(RuntimeError, match="cuda_graph: the model cannot be captured"):
        Sampler(waits, table)(x_T().cuda(), seeds=[1, 2, 3])
    torch.cuda.synchronize()
    eager = Sampler(waits, table, cuda_graph=False)(x_T().cuda(), seeds=[1, 2, 3])
    with pytest.warns(RuntimeWarning, match="running without a graph"):
        got = Sampler(waits, table, cuda_graph="try")(x_T().cuda(), seeds=[1, 2, 3])
    assert torch.equal(got, eager)
    assert torch.equal(Sampler(model, table)(x_T().cuda(), seeds=[1, 2, 3]), eager)


def test_a_failed_capture_leaves_the_process_as_it_was():
    """torch 2.10 and 2.11 leave the default generator and the allocator in the capture."""
    model, table = Model().cuda(), DDPM.to("cuda")
    sampler = Sampler(lambda x, t: model(x, t) * float(t.max() >= 0) + torch.randn_like(x), table)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cuda_graph: the model cannot be captured"):
            sampler(x_T().cuda(), seeds=[1, 2, 3])
        assert torch.randn(3, device="cuda").isfinite().all()
    sampler.model = model
    expected = Sampler(model, table, cuda_graph=False)(x_T().cuda(), seeds=[1, 2, 3])
    assert torch.equal(sampler(x_T().cuda(), seeds=[1, 2, 3]), expected)
    memory = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_reserved()
    del memory
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - 2**28


def test_kinds_of_one_sampler_share_memory():
    """What one graph needs while it runs, the next one takes again."""

    def model(x, t):
        return 0.1 * torch.tanh(x.repeat(1, 64, 1, 1)).unflatten(1, (64, -1)).mean(1)

    def reserved(shapes):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        sampler = Sampler(model, DDPM.to("cuda"))
        for shape in shapes:
            sampler(torch.zeros(shape, device="cuda"), seeds=[1] * shape[0])
        return torch.cuda.memory_reserved() - before

    large, other = (8, 4, 128, 128), (6, 4, 128, 128)
    reserved([large])
    assert reserved([large, other]) < 1.3 * reserved([large])


def test_slots_wait_for_nothing():
    table = DDPM.to("cuda")
    slots = Sampler(Model().cuda(), table).slots(2)
    x = x_T().cuda()[:1]
    slots.admit(x, seed=1)
    slots.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        slot = slots.admit(x, seed=2)
        slots.step()
        slots.cancel(slot)
        slots.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_slots_are_each_request_alone(gpu_backend):
    def model(x, t):
        return 0.3 * torch.tanh(x + torch.sin(t / 300).reshape(-1, 1, 1, 1))

    table = fastguide.ddpm(SCHEDULE, 12).to("cuda")
    slots = Sampler(model, table, backend=gpu_backend).slots(4)
    alone = Sampler(model, table, cuda_graph=False, backend=gpu_backend)
    waiting, under_way, results = list(range(12)), {}, {}
    while waiting or under_way:
        while waiting and slots.free:
            n = waiting.pop()
            x = fastguide.portable_noise([n], (1, *SHAPE[1:])).cuda()
            under_way[slots.admit(x, seed=n, table=table[n % 5 :])] = n
        for slot, x_0 in slots.step().items():
            results[under_way.pop(slot)] = x_0
    for n, x_0 in results.items():
        alone.table = table[n % 5 :]
        x = fastguide.portable_noise([n], (1, *SHAPE[1:])).cuda()
        assert torch.equal(x_0, alone(x, seeds=[n]))


def test_one_graph_of_all_steps_takes_no_more_memory_for_tensors():
    """Each step takes again what the one before has given back: what grows is the graph's own nodes."""
    table = fastguide.ddim(SCHEDULE, 20).to("cuda")
    x = x_T(8, 4, 64, 64).cuda()
    reserved = {}
    for mode in ("auto", "loop"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        sampler = Sampler(Model().cuda(), table, cuda_graph=mode)
        sampler(x)
        torch.cuda.empty_cache()
        reserved[mode] = torch.cuda.memory_reserved() - before
        del sampler
    assert reserved["loop"] <= reserved["auto"] + 4 * 2**20


def test_what_others_draw_between_the_steps_is_not_drawn_again(gpu_backend):
    """A callback that draws from the loop's generator: as if the loop had been written by hand."""
    table = DDPM.to("cuda")
    ours, theirs = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    drawn = []

    def draw(step, timestep, sample):
        drawn.append(torch.randn(SHAPE, device="cuda", generator=ours))

    model = Model().cuda()
    got = Sampler(model, table, backend=gpu_backend)(x_T().cuda(), generator=ours, callback=draw)
    x = x_T().cuda()
    with torch.no_grad():
        for step, t in enumerate(table.timesteps):
            noise = torch.randn(SHAPE, device="cuda", generator=theirs) if table.adds_noise[step] else None
            x = fastguide.guided_step(table, step, x, model(x, t.expand(3)), noise=noise, backend=gpu_backend)
            assert torch.equal(drawn[step], torch.randn(SHAPE, device="cuda", generator=theirs))
    assert torch.equal(got, x)
    assert ours.get_offset() == theirs.get_offset()
