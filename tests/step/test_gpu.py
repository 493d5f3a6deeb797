"""What only a GPU can show: torch's stream bit for bit, one launch, no waiting, captures, streams, large tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastguide
from fastguide.step import checks
from fastguide.step.backends.registry import BACKENDS
from tests.support.cases import TABLES
from tests.support.on_gpu import NO_GPU
from tests.support.step_inputs import guided_step, make_guidance, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
H100_GRID = 132 * 8 * 256
SHAPES = [  # below one grid of torch's kernel, at its edges and above, for any GPU of up to 148 multiprocessors
    (1,),
    (3, 257),
    (1, 4, 64, 64),
    (2, 3, 17, 19),
    (1, H100_GRID),
    (1, H100_GRID + 8),
    (2, 4, 200, 200),
    (5, 3, 331, 333),  # larger than a grid, and no whole vectors
    (4, 16, 128, 128),
    (64, 3, 256, 256),
]


@pytest.fixture(params=["native", "triton"])
def gpu_backend(request):
    if not BACKENDS[request.param].serves("cuda"):
        pytest.skip(f"{request.param}: {BACKENDS[request.param].status}")
    return request.param


def pure_noise(steps=1):
    ones = torch.ones(steps, dtype=torch.float64)
    return fastguide.StepTable.from_columns(torch.arange(steps).flip(0), {"out_noise": ones}).to("cuda")


def on_gpu(name="ddpm", shape=(2, 4, 64, 64), *, count=2, dtype=torch.float32, form=None, seed=0):
    """Table, inputs and guidance of a step on the GPU."""
    table = TABLES[name].to("cuda")
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(TABLES[name], shape, generator, count=count, dtype=dtype, gradient=form is not None)
    return table, inputs.map(lambda t: t.cuda()), make_guidance(count, form)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generator_draws_torch_randn_bit_for_bit(gpu_backend, dtype, shape):
    table = pure_noise()
    ours, theirs = (torch.Generator("cuda").manual_seed(2**63 + 7) for _ in range(2))
    x = torch.zeros(shape, device="cuda", dtype=dtype)
    for _ in range(3):  # the offset moves on as torch moves it
        got = guided_step(table, 0, x, [], generator=ours, backend=gpu_backend)
        expected = torch.randn(shape, device="cuda", dtype=dtype, generator=theirs)
        assert torch.equal(got, expected)
        assert ours.get_offset() == theirs.get_offset()
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (3, 16, 128, 128)])
def test_generator_counts_a_channels_last_sample_as_torch_randn_would(gpu_backend, shape):
    x = torch.zeros(shape, device="cuda").contiguous(memory_format=torch.channels_last)
    ours, theirs = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    got = guided_step(pure_noise(), 0, x, [], generator=ours, backend=gpu_backend)
    assert torch.equal(got, torch.randn(shape, device="cuda", generator=theirs))


def test_generator_beyond_two_gigabytes_is_torch_s(gpu_backend):
    x = torch.zeros(2, 2**28 + 8, device="cuda")
    ours, theirs = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    got = guided_step(pure_noise(), 0, x, [], generator=ours, backend=gpu_backend, out=x)
    assert torch.equal(got, torch.randn(x.shape, device="cuda", generator=theirs))
    assert ours.get_offset() == theirs.get_offset()


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (5, 3, 331, 333), (4, 16, 128, 128)])
def test_device_generator_goes_on_as_torch_does(gpu_backend, shape):
    theirs = torch.Generator("cuda").manual_seed(11)
    torch.randn(100, device="cuda", generator=theirs)
    ours = fastguide.DeviceGenerator.from_generator(theirs)
    x = torch.zeros(shape, device="cuda")
    for _ in range(3):
        got = guided_step(pure_noise(), 0, x, [], generator=ours, backend=gpu_backend)
        assert torch.equal(got, torch.randn(shape, device="cuda", generator=theirs))
        assert ours.get_state() == (theirs.initial_seed(), theirs.get_offset())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_portable_stream_has_the_cpu_s_bits(gpu_backend, dtype):
    for shape in [(3, 5), (2, 3, 17, 19), (5, 3, 331, 333)]:
        seeds = torch.tensor([5, -7, 2**62, 0, 1])[: shape[0]]
        got = guided_step(
            pure_noise(4),
            3,
            torch.zeros(shape, device="cuda", dtype=dtype),
            [],
            seeds=seeds.cuda(),
            backend=gpu_backend,
        )
        assert torch.equal(got.cpu(), fastguide.portable_noise(seeds, shape, step=3, dtype=dtype))
    assert torch.equal(fastguide.portable_noise(seeds.cuda(), shape).cpu(), fastguide.portable_noise(seeds, shape))


def test_cpu_generator_draws_on_the_cpu(gpu_backend):
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    got = guided_step(pure_noise(), 0, torch.zeros(2, 70, device="cuda"), [], generator=ours, backend=gpu_backend)
    assert torch.equal(got.cpu(), torch.randn(2, 70, generator=theirs))


def kernels_of(run):
    """Names of the kernels and copies that a call starts."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


NOISES = {
    "given": lambda i: {"noise": i.noise},
    "torch's": lambda _: {"generator": torch.Generator("cuda").manual_seed(1)},
    "torch's on the device": lambda _: {"generator": fastguide.DeviceGenerator(1)},
    "portable": lambda i: {"seeds": torch.arange(len(i.sample), device="cuda")},
}


@pytest.mark.parametrize("noise", NOISES)
def test_a_step_is_one_launch_and_waits_for_nothing(gpu_backend, noise):
    table, i, guidance = on_gpu()
    index, source = torch.tensor(3, device="cuda"), NOISES[noise](i)
    staged = torch.empty(4, 4, 64, 64, device="cuda", dtype=torch.bfloat16)

    def run():
        guided_step(
            table,
            index,
            i.sample,
            i.predictions,
            guidance,
            **source,
            staged=staged,
            return_original=True,
            backend=gpu_backend,
        )

    assert len(kernels_of(run)) == 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        guidance = fastguide.ClassifierFree(3.0)  # whose weights have yet to be copied
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1024, 64), (1, 77, 100), (3, 9, 4096), (2, 50, 3)], ids=str)
def test_norms_of_tokens_are_made_in_the_step_or_in_one_launch_before_it(gpu_backend, shape, dtype):
    table, i, _ = on_gpu(shape=shape, dtype=dtype)
    guidance = fastguide.Normalized(3.0, dim=-1)

    def run(backend=gpu_backend):
        return guided_step(table, 3, i.sample, i.predictions, guidance, noise=i.noise, backend=backend)

    assert len(kernels_of(run)) == {"native": 2, "triton": 1}[gpu_backend]
    got, weights = run(), guidance.last_weights.clone()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, run("reference"), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights, guidance.last_weights, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("noise", ["given", "torch's on the device", "portable"])
def test_a_captured_step_is_right_at_every_replay(gpu_backend, noise):
    """Index, scale, seed and inputs are rewritten; the graph stays."""
    table, i, _ = on_gpu()
    index = torch.tensor(0, device="cuda")
    guidance = fastguide.ClassifierFree(torch.full((len(table), 1), 2.0, device="cuda"))
    source, reference_source = (NOISES[noise](i) for _ in range(2))
    out = torch.empty_like(i.sample)

    def step(at, scales, **arguments):
        return guided_step(table, at, i.sample, i.predictions, scales, backend=gpu_backend, **arguments)

    step(index, guidance, **NOISES[noise](i), out=out)  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(index, guidance, **source, out=out)
    for at in (4, 0, 7, 9):
        index.fill_(at)
        guidance.weights(torch.device("cuda", 0), torch.float32)[:, :, 1] = float(at)
        i.sample.normal_()
        graph.replay()
        expected = step(torch.tensor(at, device="cuda"), fastguide.ClassifierFree(float(at)), **reference_source)
        assert torch.equal(out, expected)


def test_a_captured_torch_generator_draws_anew_at_each_replay(gpu_backend):
    x, out = torch.zeros(2, 70, device="cuda"), torch.empty(2, 70, device="cuda")
    table, generator = pure_noise(), torch.cuda.default_generators[torch.cuda.current_device()]
    guided_step(table, 0, x, [], generator=generator, out=out, backend=gpu_backend)
    guided_step(table, 0, x, [], noise=x, out=out, backend=gpu_backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        guided_step(table, 0, x, [], generator=generator, out=out, backend=gpu_backend)
    torch.cuda.manual_seed(5)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(out.clone())
    torch.cuda.manual_seed(5)
    assert torch.equal(results[0], torch.randn(2, 70, device="cuda"))
    assert torch.equal(results[1], torch.randn(2, 70, device="cuda"))


def test_a_cpu_generator_is_refused_inside_a_capture(gpu_backend):
    x = torch.zeros(2, 70, device="cuda")
    table, generator = pure_noise(), torch.Generator()
    guided_step(table, 0, x, [], noise=x, backend=gpu_backend)  # copies the weights, compiles
    refused = pytest.raises(ValueError, match="generator: expected one of a GPU inside a capture")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        guided_step(table, 0, x, [], generator=generator, backend=gpu_backend)


def test_triton_refuses_to_compile_inside_a_capture():
    from fastguide.step.backends import triton

    if not BACKENDS["triton"].serves("cuda"):
        pytest.skip(BACKENDS["triton"].status)
    triton._compiled.clear()
    x = torch.zeros(2, 71, device="cuda")
    table = pure_noise()
    guided_step(table, 0, x, [], noise=x, backend="reference")  # copies the weights
    with pytest.raises(RuntimeError, match="not compiled yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        guided_step(table, 0, x, [], noise=x, backend="triton")


FIRST_STEP_CAPTURED = """
import torch, fastguide
x = torch.randn(2, 71, device="cuda")
table = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10).to("cuda")
expected = guided_step(table, 3, x, [x], backend="reference")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = guided_step(table, 3, x, [x], backend="native")
graph.replay()
torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
"""


def test_the_first_native_step_may_be_captured():
    """The CUDA kernels are loaded within the capture, then."""
    if not BACKENDS["native"].serves("cuda"):
        pytest.skip(BACKENDS["native"].status)
    result = subprocess.run([sys.executable, "-c", FIRST_STEP_CAPTURED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_weights_that_are_not_on_the_gpu_are_refused_inside_a_capture(gpu_backend):
    x = torch.zeros(2, 70, device="cuda")
    table, guidance = pure_noise(), fastguide.ClassifierFree(3.0)
    guided_step(table, 0, x, [x, x], fastguide.ClassifierFree(2.0), noise=x, backend=gpu_backend)
    refused = pytest.raises(RuntimeError, match="guidance: its weights are not on cuda:0 yet")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        guided_step(table, 0, x, [x, x], guidance, noise=x, backend=gpu_backend)


def test_another_stream_waits_for_the_weights(gpu_backend):
    """They are copied on the stream of the first step, which may have much to do before."""
    table, i, _ = on_gpu("ddim")
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    matrix = torch.randn(8192, 8192, device="cuda")
    expected = guided_step(table, 3, i.sample, i.predictions, fastguide.ClassifierFree(7.0), backend=gpu_backend)
    torch.cuda.synchronize()
    guidance = fastguide.ClassifierFree(7.0)
    with torch.cuda.stream(busy):
        for _ in range(20):
            matrix @ matrix
        guidance.weights(i.sample.device, torch.float32)
    with torch.cuda.stream(other):
        got = guided_step(table, 3, i.sample, i.predictions, guidance, backend=gpu_backend)
    torch.cuda.synchronize()
    assert torch.equal(got, expected)
    guided_step(table, 3, i.sample, i.predictions, guidance, backend=gpu_backend)
    assert not guidance._copies


def test_an_index_outside_of_the_table_makes_its_sample_nan(gpu_backend):
    table, i, guidance = on_gpu("ddim", (4, 3, 5))
    index = torch.tensor([0, 10, 3, -1], device="cuda")
    out = guided_step(table, index, i.sample, i.predictions, guidance, backend=gpu_backend)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False, True]
    assert out[::2].isfinite().all()


NOISE_ARGUMENTS = {  # noise, seeds, philox, philox_threads
    "given": lambda i: (i.noise, None, None, 0),
    "seeds": lambda i: (None, torch.tensor([3, 4], device="cuda"), None, 0),
    "torch's": lambda i: (None, None, torch.tensor([3, 4]), 256),
    "torch's on the device": lambda i: (None, None, fastguide.DeviceGenerator(3).state, 256),
}


@pytest.mark.parametrize("name", ["ddim", "ddpm learned"])
@pytest.mark.parametrize("noise", NOISE_ARGUMENTS)
@pytest.mark.parametrize("operator", ["guided_step", "guided_step_triton"])
def test_opcheck(operator, noise, name):
    if operator == "guided_step_triton" and not BACKENDS["triton"].serves("cuda"):
        pytest.skip(BACKENDS["triton"].status)
    table, i, guidance = on_gpu(name, (2, 3, 40), form="mean" if "ddpm" in name else None)
    arguments = (
        torch.empty_like(i.sample),
        torch.empty_like(i.sample),
        torch.empty(4, 3, 40, device="cuda", dtype=torch.float16),
        i.sample,
        i.predictions,
        table.device_rows(guidance.form, torch.float32),
        guidance.weights(i.sample.device, torch.float32),
        3,
        None,
        i.gradient,
        i.variance,
        *NOISE_ARGUMENTS[noise](i),
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastguide, operator).default, arguments, test_utils=tests)


def test_a_step_of_a_known_kind_is_captured(gpu_backend, monkeypatch):
    """Repeated without torch's operator (step/repeat.py), it is launched into the stream that is being captured."""
    table, i, guidance = on_gpu()
    out, checked = torch.empty_like(i.sample), []
    real = checks.validate
    monkeypatch.setattr(checks, "validate", lambda *a, **k: checked.append(1) or real(*a, **k))

    def step():
        fastguide.guided_step(table, 3, i.sample, i.predictions, guidance, noise=i.noise, out=out, backend=gpu_backend)

    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert len(checked) == 2
    i.sample.mul_(2)
    expected = fastguide.guided_step(table, 3, i.sample, i.predictions, guidance, noise=i.noise, backend=gpu_backend)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_the_most_predictions():
    table, i, _ = on_gpu(count=32)
    guidance = fastguide.Composed([0.1] * 31)
    got = guided_step(table, 3, i.sample, i.predictions, guidance, noise=i.noise, backend="native")
    expected = guided_step(table, 3, i.sample, i.predictions, guidance, noise=i.noise, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="guidance: expected at most 32 predictions on a GPU"):
        fastguide.Sampler(lambda x, t, y: pytest.fail("the model is called"), table, fastguide.Composed([0.1] * 32))(
            i.sample, cond=[i.sample] * 32, uncond=i.sample
        )


def test_two_streams_at_once(gpu_backend):
    """Each step runs on the stream that is current, and waits for no other."""
    cases = [on_gpu(shape=(8, 4, 128, 128), seed=seed) for seed in range(2)]
    expected = [guided_step(t, 3, i.sample, i.predictions, g, noise=i.noise, backend="reference") for t, i, g in cases]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in cases], [None, None]
    for _ in range(20):
        for k, (stream, (t, i, g)) in enumerate(zip(streams, cases, strict=True)):
            with torch.cuda.stream(stream):
                results[k] = guided_step(t, 3, i.sample, i.predictions, g, noise=i.noise, backend=gpu_backend)
    torch.cuda.synchronize()
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_more_than_two_to_the_31_elements(gpu_backend):
    size = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 5 * 2 * size:
        pytest.skip("not enough memory on this GPU")
    table = TABLES["ddim"].to("cuda")
    x = torch.zeros(1, size, dtype=torch.bfloat16, device="cuda")
    p = torch.zeros_like(x)
    x[0, -1000:] = 1.0
    p[0, -7:] = 0.5
    out = guided_step(table, 3, x, [p], backend=gpu_backend)
    expected = guided_step(table, 3, x[:, -1000:].clone(), [p[:, -1000:].clone()], backend=gpu_backend)
    assert torch.equal(out[:, -1000:], expected)
    assert not out[:, :-1000].any()


def test_native_and_triton_agree():
    if not (BACKENDS["native"].serves("cuda") and BACKENDS["triton"].serves("cuda")):
        pytest.skip("one of them is not there")
    for name, form in (("ddim", None), ("ddpm", "mean"), ("ddpm learned", "mean")):
        table, i, guidance = on_gpu(name, (3, 4, 33, 31), count=3, form=form)
        results = [
            guided_step(
                table,
                3,
                i.sample,
                i.predictions,
                guidance,
                gradient=i.gradient,
                variance=i.variance,
                noise=i.noise,
                backend=backend,
            )
            for backend in ("native", "triton")
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
