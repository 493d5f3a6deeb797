"""Memory: what is read and written, where it may lie, and that nothing more is allocated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import fastguide
from fastguide.step.backends.registry import BACKENDS
from tests.support.cases import DTYPES, TABLES
from tests.support.step_inputs import guided_step, make_guidance, make_inputs

SENTINEL = 12345.0


def step(inputs, table, backend=None, form=None, **arguments):
    return guided_step(
        table,
        2,
        inputs.sample,
        inputs.predictions,
        make_guidance(len(inputs.predictions), form),
        gradient=inputs.gradient,
        variance=inputs.variance,
        noise=inputs.noise,
        backend=backend,
        **arguments,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_at_every_offset_write_nothing_beside_them(backend, dtype, generator):
    """Inputs and outputs in the middle of larger buffers, at each alignment of a 64-byte vector."""
    table = TABLES["ddpm learned"]
    shape, count = (2, 37), 74
    inputs = make_inputs(table, shape, generator, gradient=True, dtype=dtype)
    expected, expected_original = step(inputs, table, backend, "epsilon", return_original=True)
    for offset in range(1, 34):
        placed = inputs.map(lambda t, o=offset: torch.cat([t.new_full((o,), torch.nan), t.flatten()])[o:].view(shape))
        buffer = torch.full((count + 80,), SENTINEL, dtype=dtype)
        out = buffer[offset : offset + count].view(shape)
        out.fill_(torch.nan)
        _, original = step(placed, table, backend, "epsilon", out=out, return_original=True)
        assert torch.equal(out, expected)
        assert torch.equal(original, expected_original)
        assert (buffer[:offset] == SENTINEL).all()
        assert (buffer[offset + count :] == SENTINEL).all()


def test_nan_poisoned_outputs_are_written_whole(backend, generator):
    for shape in ((1, 1), (3, 7), (2, 3, 100, 101)):
        inputs = make_inputs(TABLES["ddim"], shape, generator)
        out = torch.full(shape, torch.nan)
        step(inputs, TABLES["ddim"], backend, out=out)
        assert out.isfinite().all()


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def transposed(t):
    return t.transpose(1, 3).contiguous().transpose(1, 3)


def channel_split(t):
    return torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, : t.shape[1]]


def every_other_sample(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(0, 1)[::2]


@pytest.mark.parametrize("layout", [channels_last, transposed, channel_split, every_other_sample])
@pytest.mark.parametrize("shape", [(3, 4, 9, 5), (3, 1, 9, 5), (1, 4, 1, 5), (3, 4, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_give_the_same_bits(backend, dtype, layout, shape, generator):
    table = TABLES["ddpm learned"]
    inputs = make_inputs(table, shape, generator, gradient=True, dtype=dtype)
    expected, expected_original = step(inputs, table, backend, "mean", return_original=True)
    laid_out = inputs.map(layout)
    got = step(laid_out, table, backend, "mean")
    assert torch.equal(got, expected)
    out = layout(torch.full(shape, torch.nan, dtype=dtype))
    got, original = step(laid_out, table, backend, "mean", out=out, return_original=True)
    assert got is out
    assert torch.equal(got, expected)
    assert torch.equal(original, expected_original)


def test_predictions_and_variance_as_halves_of_the_model_output(backend, generator):
    """How learned-variance models return them: two channel groups of a doubled batch."""
    table = TABLES["ddpm learned"]
    inputs = make_inputs(table, (3, 4, 6, 5), generator)
    expected = step(inputs, table, backend)
    output = torch.cat([torch.cat([p, inputs.variance], 1) for p in inputs.predictions])
    uncond, cond = output.chunk(2)
    inputs.predictions = [uncond[:, :4], cond[:, :4]]
    inputs.variance = cond[:, 4:]
    assert torch.equal(step(inputs, table, backend), expected)


def test_expanded_noise_is_the_same_for_every_sample(backend, generator):
    table = TABLES["ddpm"]
    inputs = make_inputs(table, (4, 3, 5), generator)
    inputs.noise = inputs.noise[:1].expand(4, 3, 5)
    got = step(inputs, table, backend)
    inputs.noise = inputs.noise.contiguous()
    assert torch.equal(got, step(inputs, table, backend))


@pytest.mark.parametrize("place", ["sample", "prediction", "gradient", "noise"])
@pytest.mark.parametrize("shape", [(2, 3, 11), (2, 3, 23, 61), (2, 3, 100, 101)])
def test_out_may_be_an_input(backend, place, shape, generator):
    table = TABLES["ddpm"]
    inputs = make_inputs(table, shape, generator, gradient=True)
    expected = step(inputs, table, backend, "epsilon")
    out = inputs.predictions[1] if place == "prediction" else getattr(inputs, place)
    assert step(inputs, table, backend, "epsilon", out=out) is out
    assert torch.equal(out, expected)


def test_the_caller_s_tensors_are_left_alone(backend, generator):
    table = TABLES["ddpm learned"]
    inputs = make_inputs(table, (2, 3, 33), generator, gradient=True)
    before = inputs.map(torch.clone)
    step(inputs, table, backend, "mean", return_original=True)
    for name in ("sample", "gradient", "variance", "noise"):
        assert torch.equal(getattr(inputs, name), getattr(before, name))
    for now, then in zip(inputs.predictions, before.predictions, strict=True):
        assert torch.equal(now, then)


def allocated_bytes(function) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sum(size for size in sizes if size > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_allocates_the_output_and_nothing_else(dtype, generator):
    """And nothing at all with out=; noise from a generator is drawn into the output."""
    shape = (2, 3, 64, 64)
    size = 2 * 3 * 64 * 64 * dtype.itemsize
    for name in ("ddim", "ddpm"):
        table = TABLES[name]
        inputs = make_inputs(table, shape, generator, dtype=dtype)
        inputs.noise = None
        out = torch.empty(shape, dtype=dtype)
        arguments = (table, 2, inputs.sample, inputs.predictions, make_guidance(2, None))

        def call(arguments=arguments, **options):
            guided_step(*arguments, generator=generator, **options)

        assert allocated_bytes(lambda: call(backend="native")) == size
        assert allocated_bytes(lambda: call(backend="native", out=out)) == 0  # noqa: B023
        assert allocated_bytes(lambda: call(backend="reference", out=out)) > size  # noqa: B023


def overlapping(case):
    """A prediction, and an output that is partly the same memory."""
    buffer = torch.randn(200)
    return {
        "shifted by one": (buffer[0:60].view(2, 30), buffer[1:61].view(2, 30)),
        "halfway": (buffer[0:60].view(2, 30), buffer[30:90].view(2, 30)),
        "another batch stride": (buffer[0:60].view(2, 30), buffer[0:120].view(2, 60)[:, :30]),
        "another dtype": (buffer.view(torch.bfloat16)[:30].view(1, 30), buffer[:30].view(1, 30)),
    }[case]


@pytest.mark.parametrize("case", ["shifted by one", "halfway", "another batch stride", "another dtype"])
def test_native_refuses_an_output_that_is_partly_an_input(case):
    prediction, out = overlapping(case)
    sample, before = torch.randn(prediction.shape), prediction.clone()
    for name in ("native", "reference"):
        with pytest.raises(ValueError, match=r"out: expected memory apart from predictions\[0\], or the same element"):
            guided_step(TABLES["ddim"], 0, sample, [prediction], out=out, backend=name)
    rows, weights = TABLES["ddim"].device_rows(None, torch.float32), torch.tensor([[[1.0, 0.0]]])
    with pytest.raises(RuntimeError, match="out: expected memory apart from predictions, or the same element"):
        torch.ops.fastguide.guided_step(out, None, None, sample, [prediction], rows, weights, 0, *[None] * 6, 0)
    assert torch.equal(prediction.view(torch.uint8), before.view(torch.uint8))


def test_native_takes_an_output_interleaved_with_an_input(generator):
    buffer = torch.randn(4, 6, 5)
    prediction, out = buffer[:, :3], buffer[:, 3:]
    sample = torch.randn(4, 3, 5)
    expected = guided_step(TABLES["ddim"], 0, sample, [prediction])
    guided_step(TABLES["ddim"], 0, sample, [prediction], out=out)
    assert torch.equal(out, expected)


def test_an_expanded_sample_is_an_input_like_any_other(backend, generator):
    table = TABLES["ddim"]
    one, prediction = torch.randn(1, 3, 8, 8, generator=generator), torch.randn(4, 3, 8, 8, generator=generator)
    for layout in (torch.contiguous_format, torch.channels_last):
        sample = one.contiguous(memory_format=layout).expand(4, 3, 8, 8)
        predictions = [prediction.contiguous(memory_format=layout)]
        got = guided_step(table, 0, sample, predictions, backend=backend)
        assert torch.equal(got, guided_step(table, 0, sample.contiguous(), [prediction], backend=backend))


def test_overlapping_samples_are_inputs_like_any_other(backend, generator):
    """Sliding windows over one run of memory; the output gets a place of its own for each sample."""
    windows = torch.randn(64, generator=generator).as_strided((5, 8), (1, 1))
    prediction = torch.randn(5, 8, generator=generator)
    got = guided_step(TABLES["ddim"], 0, windows, [prediction], backend=backend)
    assert torch.equal(got, guided_step(TABLES["ddim"], 0, windows.contiguous(), [prediction], backend=backend))


def test_noise_is_not_drawn_over_an_input_that_another_storage_holds(backend):
    """The same memory through numpy: another storage, another start of it."""
    table = TABLES["ddpm"]
    memory = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    sample, out = torch.from_numpy(memory)[80:200].view(3, 40), torch.from_numpy(memory[80:]).view(3, 40)
    prediction = torch.randn(3, 40)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected = guided_step(table, 2, sample, [prediction], generator=draws[0], backend=backend)
    got = guided_step(table, 2, sample, [prediction], generator=draws[1], out=out, backend=backend)
    assert torch.equal(got, expected)


def test_autograd_notices_that_out_was_written(backend, generator):
    x = torch.randn(2, 3, generator=generator, requires_grad=True)
    hidden = x * 2
    loss = (hidden * hidden).sum()
    with torch.no_grad():
        guided_step(TABLES["ddim"], 0, hidden.detach(), [torch.zeros(2, 3)], out=hidden.detach(), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple),
    count=st.integers(1, 6),
    name=st.sampled_from(sorted(TABLES)),
    gradient=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    level=st.sampled_from(["baseline", "avx2", "avx512"]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_any_split_of_a_batch_gives_the_same_bits(shape, count, name, gradient, dtype, level, seed, data):
    """No element's result depends on where in the batch, in a vector or in a tail it lies."""
    from fastguide.step.backends import native

    table = TABLES[name]
    inputs = make_inputs(
        table, (8, *shape), torch.Generator().manual_seed(seed), count=count, gradient=gradient, dtype=dtype
    )
    cut = data.draw(st.integers(0, 8))
    form = "epsilon" if gradient else None
    before = native.cpu_capability()
    native.set_cpu_capability(level)
    try:
        whole = step(inputs, table, "native", form)
        parts = [inputs.map(lambda t, s=s: t[s]) for s in (slice(0, cut), slice(cut, 8))]
        assert torch.equal(whole, torch.cat([step(part, table, "native", form) for part in parts]))
    finally:
        native.set_cpu_capability(before)


@pytest.mark.parametrize("name", ["gradient", "noise", "out", "original"])
@pytest.mark.parametrize("checked", ["native", "reference", "triton"])
def test_stacked_predictions_are_no_other_tensor_of_the_step(name, checked, generator):
    """Their batch is longer than the sample's, whatever else they are given for."""
    if not BACKENDS[checked].serves("cpu"):
        pytest.skip(BACKENDS[checked].status)
    x, both = torch.randn(2, 3, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)
    guidance, more = fastguide.ClassifierFree(2.0), {name: both}
    if name == "gradient":
        guidance = guidance + fastguide.Classifier(None, 1.0)
    table = TABLES["ddpm" if name == "noise" else "ddim"]
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(2, 3, 5\), got \(4, 3, 5\)"):
        fastguide.guided_step(table, 3, x, both, guidance, backend=checked, **more)


@pytest.mark.parametrize("checked", ["native", "reference"])
def test_an_original_of_samples_that_overlap_is_refused(checked):
    x, one = torch.ones(2, 5), torch.empty(1, 5)
    with pytest.raises(ValueError, match="original: expected samples that do not overlap"):
        fastguide.guided_step(TABLES["ddim"], 0, x, x, original=one.expand(2, 5), backend=checked)


@pytest.mark.parametrize("checked", ["native", "reference"])
def test_original_is_apart_from_out_or_interleaved_with_it(checked, generator):
    x, whole = torch.randn(2, 3, 5, generator=generator), torch.empty(2, 6, 5)
    out, original = whole[:, :3], whole[:, 3:]
    fastguide.guided_step(TABLES["ddim"], 3, x, x, out=out, original=original, backend=checked)
    expected = torch.empty_like(x)
    torch.testing.assert_close(
        out, fastguide.guided_step(TABLES["ddim"], 3, x, x, original=expected, backend=checked), rtol=0, atol=0
    )
    assert torch.equal(original, expected)
    for place in (out, whole[:, 1:4]):
        with pytest.raises(ValueError, match="original: expected memory apart from out, got an overlap"):
            fastguide.guided_step(TABLES["ddim"], 3, x, x, out=out, original=place, backend=checked)


STRIDES_OF_NOTHING = {
    "as torch.from_numpy makes them": (0, 0, 0, 0),
    "contiguous": (48, 16, 4, 1),
    "of no order": (1, 7, 2, 9),
}


@pytest.mark.parametrize("strides", STRIDES_OF_NOTHING)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_nothing_may_have_any_strides(backend, shape, strides):
    """Also beside tensors that have others."""

    def nothing():
        return torch.empty(0).as_strided(shape, STRIDES_OF_NOTHING[strides])

    for prediction in (nothing(), torch.empty(shape)):
        arguments = {name: nothing() for name in ("noise", "out", "original", "staged")}
        guidance = fastguide.ClassifierFree(2.0)
        result = fastguide.guided_step(
            TABLES["ddpm"], 0, nothing(), [prediction] * 2, guidance, **arguments, backend=backend
        )
        assert result is arguments["out"]
    new = fastguide.guided_step(TABLES["ddpm"], 0, nothing(), nothing(), noise=nothing(), backend=backend)
    assert new.shape == shape
