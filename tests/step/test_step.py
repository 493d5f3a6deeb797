"""guided_step of every backend against float64 truth: no worse than twice plain torch's error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastguide
from fastguide.step.backends import reference
from tests.support import triton_interpreter
from tests.support.cases import DTYPES, FORMS, MIXED_DTYPES, SHAPES, TABLES
from tests.support.step_inputs import errors, guided_step, make_guidance, make_inputs, textbook


def assert_accurate(name, table, step, inputs, form, result, original, plain_dtype):
    """The rule of the house, for the root mean square error over the tensor.

    Plain torch runs in the dtype of the inputs. In float32, where a clip or the last step leaves plain torch nearly
    exact, one unit in the last place of a typical value is allowed; in float64, whose plain error is only estimated
    from float32's, four. The largest error is a noisy measure, bounded loosely: it finds the single wrong element that
    a mean would hide.
    """
    truths = textbook(name, table, step, inputs, form, torch.float64)
    factor = 1.0
    if plain_dtype == torch.float64:
        plain_dtype = torch.float32
        factor = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    plains = textbook(name, table, step, inputs, form, plain_dtype)
    for got, plain, truth in zip((result, original), plains, truths, strict=True):
        finite = plain.isfinite()  # x_0 of the first steps may overflow float16, plain and fused
        mean, largest = errors(got[finite], truth[finite])
        plain_mean, plain_largest = errors(plain[finite], truth[finite])
        scale, typical = errors(truth[finite], torch.zeros_like(truth[finite]))[::-1]
        unit = factor * torch.finfo(plain_dtype).eps
        few = result.numel() < 64  # of few elements plain torch may be exact by luck
        units = 0 if plain_dtype.itemsize == 2 else 1 if factor == 1.0 else 4
        allowed = unit * scale if few else units * unit * typical
        assert mean <= max(2 * factor * plain_mean, allowed)
        assert largest <= max(8 * factor * plain_largest, unit * scale)


@pytest.mark.parametrize(
    ("name", "form"),
    [(n, form) for n, table in TABLES.items() for form in (None, *FORMS) if form not in table.unused_forms],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_table_dtype_and_form(backend, dtype, name, form, generator):
    table = TABLES[name]
    for count in (1, 2, 3, 5):  # no scratch, fused pair, and the two ways of the combination of many
        inputs = make_inputs(table, (2, 3, 17, 19), generator, count=count, gradient=form is not None, dtype=dtype)
        for step in (0, 5, 9):
            result, original = guided_step(
                table,
                step,
                inputs.sample,
                inputs.predictions,
                make_guidance(count, form),
                gradient=inputs.gradient,
                variance=inputs.variance,
                noise=inputs.noise,
                return_original=True,
                backend=backend,
            )
            assert result.dtype == original.dtype == dtype
            assert_accurate(name, table, step, inputs, form, result, original, dtype)


@pytest.mark.parametrize(("shape", "branch"), SHAPES, ids=[branch for _, branch in SHAPES])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_shape(backend, dtype, shape, branch, generator):
    table = TABLES["ddpm"]
    inputs = make_inputs(table, shape, generator, dtype=dtype)
    result, original = guided_step(
        table,
        3,
        inputs.sample,
        inputs.predictions,
        make_guidance(2, None),
        noise=inputs.noise,
        return_original=True,
        backend=backend,
    )
    assert result.shape == original.shape == shape
    assert_accurate("ddpm", table, 3, inputs, None, result, original, dtype)


@pytest.mark.parametrize(("sample_dtype", "dtype"), MIXED_DTYPES)
@pytest.mark.parametrize("name", ["ddim", "ddpm learned"])
def test_state_and_model_may_differ_in_dtype(backend, name, sample_dtype, dtype, generator):
    table = TABLES[name]
    inputs = make_inputs(table, (3, 2, 33, 9), generator, gradient=True, dtype=dtype, sample_dtype=sample_dtype)
    for out_dtype in DTYPES:
        out = torch.full((3, 2, 33, 9), torch.nan, dtype=out_dtype)
        _, original = guided_step(
            table,
            4,
            inputs.sample,
            inputs.predictions,
            make_guidance(2, "epsilon"),
            gradient=inputs.gradient,
            variance=inputs.variance,
            noise=inputs.noise,
            return_original=True,
            out=out,
            backend=backend,
        )
        # arithmetic in float32, or float64 with a float64 sample, and one rounding
        coarsest = out_dtype if out_dtype.itemsize < sample_dtype.itemsize else sample_dtype
        coarsest = torch.float32 if coarsest.itemsize < 4 and out_dtype.itemsize >= 4 else coarsest
        assert_accurate(name, table, 4, inputs, "epsilon", out, original, coarsest)


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES[2:3], DTYPES[:3]], ids=lambda d: f"{len(d)} {d[0]}")
def test_predictions_are_combined_in_passes_of_three(backend, dtypes, generator):
    """Whole passes, passes of one and two, and predictions of several dtypes, which none can take unconverted."""
    table = TABLES["ddim"]
    for count in (3, 4, 5, 6, 7, 8):
        inputs = make_inputs(table, (2, 3, 17, 19), generator, count=count)
        inputs.predictions = [p.to(dtypes[k % len(dtypes)]) for k, p in enumerate(inputs.predictions)]
        guidance = make_guidance(count, None)
        result, original = guided_step(
            table, 4, inputs.sample, inputs.predictions, guidance, return_original=True, backend=backend
        )
        assert_accurate("ddim", table, 4, inputs, None, result, original, torch.float32)


@pytest.mark.parametrize(("shape", "branch"), [*SHAPES, ((2, 3, 5, 43), "whole chunks and a rest")], ids=lambda x: x)
@pytest.mark.parametrize("state", [None, torch.float32], ids=["state as the model", "state in float32"])
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_a_model_of_16_bits_and_nothing_else_to_do(backend, dtype, state, shape, branch, generator):
    """No noise, no gradient, no predicted original: the CPU kernel converts in registers."""
    table = TABLES["ddim clipped"]
    for count in (1, 2):
        inputs = make_inputs(table, shape, generator, count=count, dtype=dtype, sample_dtype=state or dtype)
        last = inputs.predictions[-1]
        inputs.predictions[-1] = torch.stack([last, last + 1], 1)[:, 0]  # its samples lie apart, the others' do not
        arguments = (inputs.sample, inputs.predictions, make_guidance(count, None))
        result = guided_step(table, 3, *arguments, backend=backend)
        with_original, original = guided_step(table, 3, *arguments, return_original=True, backend=backend)
        assert torch.equal(result, with_original)  # which goes another way, with the same arithmetic
        assert_accurate("ddim clipped", table, 3, inputs, None, result, original, state or dtype)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("state", [None, torch.float32], ids=["state as the model", "state in float32"])
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_a_model_of_16_bits_writes_where_it_reads(backend, dtype, state, count, generator):
    """Into an input element for element, and nowhere else; no sample sees another's infinities."""
    table = TABLES["ddim"]
    inputs = make_inputs(table, (2, 7, 107), generator, count=count, dtype=dtype, sample_dtype=state or dtype)
    inputs.predictions[-1][0, 3, 40] = torch.inf
    inputs.sample[1, 0, 5] = torch.nan
    guidance = make_guidance(count, None)
    expected = guided_step(table, 3, inputs.sample, inputs.predictions, guidance, backend=backend)
    assert (~expected.isfinite()).nonzero().tolist() == [[0, 3, 40], [1, 0, 5]]
    places = [inputs.sample] if state is not None else [inputs.sample, *inputs.predictions]
    for place in range(len(places)):
        copies = [tensor.clone() for tensor in (inputs.sample, *inputs.predictions)]
        around = torch.full((2, 9, 107), 7.0, dtype=expected.dtype)
        around[:, 1:-1] = copies[place]
        copies[place] = around[:, 1:-1]
        guided_step(table, 3, copies[0], copies[1:], guidance, out=copies[place], backend=backend)
        assert torch.equal(around[:, 1:-1].nan_to_num(9.0), expected.nan_to_num(9.0))
        assert (around[:, [0, -1]] == 7).all()


def test_bfloat16_output_is_the_rounded_float32_result(backend, generator):
    """One rounding, at the end: what a float32 output holds, rounded, is the bfloat16 output to the bit."""
    table = TABLES["ddpm"]
    inputs = make_inputs(table, (4, 3, 25, 11), generator, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        results = [
            guided_step(
                table,
                2,
                inputs.sample,
                inputs.predictions,
                make_guidance(2, None),
                noise=inputs.noise,
                out=torch.empty(4, 3, 25, 11, dtype=out_dtype),
                backend=backend,
            )
            for out_dtype in (torch.float32, dtype)
        ]
        assert torch.equal(results[0].to(dtype), results[1])


def test_special_values_are_converted_as_torch_does(backend):
    """NaN, subnormals, ties and overflow of the 16-bit dtypes, through a step that multiplies by one."""
    one = torch.ones(1, dtype=torch.float64)
    table = fastguide.StepTable.from_columns(torch.zeros(1, dtype=torch.int64), {"out_sample": one, "out_pred": one})
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # every 16-bit pattern
    zeros = torch.zeros(1, 2**16)
    for dtype in (torch.float16, torch.bfloat16):
        values = halves.view(dtype).reshape(1, -1)
        values = torch.where(values.isinf(), 1, values)  # a row multiplies infinity by its zeros
        out = guided_step(table, 0, values, [zeros], out=torch.empty(1, 2**16), backend=backend)
        assert torch.equal(
            out.nan_to_num(7.0, torch.inf, -torch.inf), values.float().nan_to_num(7.0, torch.inf, -torch.inf)
        )
        assert torch.equal(out.isnan(), values.isnan())
        wide = torch.cat([out, out.nextafter(torch.tensor(torch.inf)), out * (1 + 2**-9), out * 1e-3], 1)
        ties = (out[:, :-1] + out[:, 1:]) / 2  # halfway between neighbours
        payload = torch.tensor([[0x7FFFFFFF, 0x7FC00001]], dtype=torch.int32).view(torch.float32)  # of NaN
        wide = torch.cat([wide, ties, payload], 1)
        wide = torch.where(wide.isinf(), 1, wide)
        zeros_wide = torch.zeros_like(wide)
        narrowed = torch.empty_like(wide, dtype=dtype)
        guided_step(table, 0, wide, [zeros_wide], out=narrowed, backend=backend)
        assert torch.equal(
            narrowed.nan_to_num(7.0, torch.inf, -torch.inf), wide.to(dtype).nan_to_num(7.0, torch.inf, -torch.inf)
        )


def test_exponential_of_the_learned_variance(backend):
    """sigma against torch.exp over the whole range: overflow, subnormal results and NaN too."""
    if backend == "triton" and triton_interpreter.INTERPRETED:
        pytest.skip("in Triton's interpreter exp is numpy's, and less exact than a GPU's")
    one = torch.ones(1, dtype=torch.float64)
    table = fastguide.StepTable.from_columns(
        torch.zeros(1, dtype=torch.int64),
        {"out_pred": one, "out_noise": one, "logvar_span": one},
        learned_variance=True,
    )
    v = torch.cat([torch.linspace(-250, 200, 100_003), torch.tensor([torch.inf, -torch.inf, torch.nan])])[None]
    zeros, ones = torch.zeros_like(v), torch.ones_like(v)
    got = guided_step(table, 0, zeros, [zeros], variance=v, noise=ones, backend=backend)
    truth = torch.exp(v.double() / 2)
    plain = torch.exp(v / 2)
    assert torch.equal(got.isnan(), plain.isnan())
    assert torch.equal(got.isinf(), plain.isinf())
    finite = plain.isfinite()
    relative = ((got.double() - truth).abs() / truth.clamp(min=torch.finfo(torch.float32).tiny))[finite]
    plain_relative = ((plain.double() - truth).abs() / truth.clamp(min=torch.finfo(torch.float32).tiny))[finite]
    # A GPU's exponential is its own: 2 units in the last place, as CUDA documents for expf.
    bound = 2.0**-22 if backend.endswith("on the gpu") else 2 * plain_relative.max()
    assert relative.max() <= bound


def test_nan_is_not_clipped_away(backend):
    table = TABLES["ddpm"]
    x = torch.randn(1, 40)
    prediction = torch.zeros_like(x)
    prediction[0, ::7] = torch.nan
    out, original = guided_step(
        table, 2, x, [prediction], noise=torch.zeros_like(x), return_original=True, backend=backend
    )
    assert torch.equal(out.isnan(), prediction.isnan())
    assert torch.equal(original.isnan(), prediction.isnan())


@pytest.mark.parametrize("shape", [(7, 3, 13, 5), (3, 1, 131, 127)])  # in one thread; threads that begin in a sample
def test_indices_and_scales_per_sample_are_each_sample_s_own_step(backend, shape, generator):
    """A batch whose samples differ in step, scale and gradient scale is the same bits as each sample alone."""
    table = TABLES["ddpm"]
    batch = shape[0]
    inputs = make_inputs(table, shape, generator, gradient=True)
    index = torch.tensor([0, 9, 3, 3, 8, 1, 5])[:batch]
    scales, gradient_scales = torch.linspace(-1, 9, batch), torch.linspace(0, 2, batch)

    def guidance(scale, gradient_scale):
        return fastguide.ClassifierFree(scale) + fastguide.Classifier(None, gradient_scale)

    whole = guided_step(
        table,
        index,
        inputs.sample,
        inputs.predictions,
        guidance(scales, gradient_scales),
        gradient=inputs.gradient,
        noise=inputs.noise,
        backend=backend,
    )
    for b in range(batch):
        alone = inputs.map(lambda t, b=b: t[b : b + 1])
        single = guided_step(
            table,
            int(index[b]),
            alone.sample,
            alone.predictions,
            guidance(scales[b].item(), gradient_scales[b].item()),
            gradient=alone.gradient,
            noise=alone.noise,
            backend=backend,
        )
        assert torch.equal(whole[b : b + 1], single)


def test_scales_per_step_take_the_step_s_row(backend, generator):
    table = TABLES["ddim"]
    inputs = make_inputs(table, (3, 10), generator)
    scales = torch.linspace(0, 5, 10)
    both = torch.stack([scales, scales + 1, scales + 2], 1)
    index = torch.tensor([7, 0, 7])
    for guidance, expected in (
        (fastguide.ClassifierFree.per_step(scales), scales[index]),
        (fastguide.ClassifierFree(both), both[index, torch.arange(3)]),
    ):
        arguments = (inputs.sample, inputs.predictions)
        got = guided_step(table, index, *arguments, guidance, backend=backend)
        want = guided_step(table, index, *arguments, fastguide.ClassifierFree(expected), backend=backend)
        assert torch.equal(got, want)
        got = guided_step(table, torch.tensor(7), *arguments, guidance, backend=backend)
        per_sample = both[7] if guidance.batch == 3 else scales[7].item()
        want = guided_step(table, 7, *arguments, fastguide.ClassifierFree(per_sample), backend=backend)
        assert torch.equal(got, want)


def test_doubled_prediction_is_the_two_halves(backend, generator):
    table = TABLES["ddim"]
    for count in (2, 4):
        inputs = make_inputs(table, (3, 5, 9), generator, count=count)
        guidance = make_guidance(count, None)
        together = torch.cat(inputs.predictions)
        one = guided_step(table, 1, inputs.sample, together, guidance, backend=backend)
        many = guided_step(table, 1, inputs.sample, inputs.predictions, guidance, backend=backend)
        assert torch.equal(one, many)


@settings(deadline=None, max_examples=100)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    count=st.integers(1, 5),
    name=st.sampled_from(sorted(TABLES)),
    gradient=st.booleans(),
    per_sample=st.booleans(),
    per_step=st.booleans(),
    tensor_index=st.sampled_from(["int", "one", "per sample"]),
    seed=st.integers(0, 2**31),
)
def test_native_is_the_reference_in_float64(shape, count, name, gradient, per_sample, per_step, tensor_index, seed):
    """Whatever the case, both compute the same algebra: float64 leaves no room for a wrong coefficient."""
    table = TABLES[name]
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(table, shape, generator, count=count, gradient=gradient, dtype=torch.float64)
    scale_shape = (len(table) if per_step else 1, shape[0] if per_sample and shape[0] else 1)
    scales = [torch.randn(scale_shape, generator=generator) for _ in range(count)]
    guidance = fastguide.Composed(scales[1:]) if count > 1 else None
    if gradient:
        classifier = fastguide.Classifier(None, scales[0])
        guidance = classifier if guidance is None else guidance + classifier
    index = {
        "int": 3,
        "one": torch.tensor(3),
        "per sample": torch.randint(len(table), shape[:1], generator=generator),
    }[tensor_index]
    results = [
        guided_step(
            table,
            index,
            inputs.sample,
            inputs.predictions,
            guidance,
            gradient=inputs.gradient,
            variance=inputs.variance,
            noise=inputs.noise,
            return_original=True,
            backend=backend,
        )
        for backend in ("native", "reference")
    ]
    for native, specified in zip(*results, strict=True):
        torch.testing.assert_close(native, specified, rtol=1e-11, atol=1e-11)


def test_weights_need_not_sum_to_one(generator):
    """At the operator, column 0 holds the sum: m = sum_k w_k p_k for any weights, in every way of combining."""
    columns = {"out_pred": torch.ones(1, dtype=torch.float64)}
    table = fastguide.StepTable.from_columns(torch.zeros(1, dtype=torch.int64), columns)
    rows = table.device_rows(None, torch.float64)
    for count in (1, 2, 3, 5):
        w = torch.randn(count, dtype=torch.float64, generator=generator)
        p = list(torch.randn(count, 2, 40, dtype=torch.float64, generator=generator))
        weights = torch.cat([w.sum()[None], w[1:], torch.zeros(1)]).view(1, 1, -1)
        out = torch.empty_like(p[0])
        for step in (torch.ops.fastguide.guided_step.default, reference.guided_step):
            step(out, None, None, torch.zeros_like(out), p, rows, weights, 0, *[None] * 6, 0)
            torch.testing.assert_close(out, sum(w_k * p_k for w_k, p_k in zip(w, p, strict=True)))


def test_native_is_the_default_and_agrees_with_the_reference(generator):
    """Two ways through the same algebra: they differ by the rounding of a fused multiply-add at most."""
    table = TABLES["ddim"]
    inputs = make_inputs(table, (2, 3, 64, 64), generator)
    arguments = (table, 5, inputs.sample, inputs.predictions, make_guidance(2, None))
    torch.testing.assert_close(
        guided_step(*arguments), guided_step(*arguments, backend="reference"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["ddpm", "ddim noisy"])
def test_a_prediction_that_overflowed_is_clipped(backend, name, generator):
    """As diffusers has it: x_0 is bounded, and the prediction itself is not used again."""
    table = TABLES[name]
    inputs = make_inputs(table, (2, 40), generator)
    inputs.predictions[1][0, 5], inputs.predictions[1][1, 7] = torch.inf, -torch.inf
    got = guided_step(
        table, 3, inputs.sample, inputs.predictions, make_guidance(2, None), noise=inputs.noise, backend=backend
    )
    assert got.isfinite().all()
    inputs.predictions[1][0, 5], inputs.predictions[1][1, 7] = 1e30, -1e30
    large = guided_step(
        table, 3, inputs.sample, inputs.predictions, make_guidance(2, None), noise=inputs.noise, backend=backend
    )
    assert torch.equal(got, large)
