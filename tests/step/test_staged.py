"""The next model input, staged: in_scale times the unrounded sample, as often and where the model wants it."""

from __future__ import annotations

import pytest
import torch

import fastguide
from tests.support.cases import DTYPES, TABLES
from tests.support.pure_noise import drawn
from tests.support.step_inputs import guided_step, make_guidance, make_inputs

COPIES = [1, 2, 3]
IN_SCALE = fastguide.ROW_COLUMNS.index("in_scale")
SHAPES = [
    ((1,), "one element, no inner dimension"),
    ((3, 7), "shorter than any vector"),
    ((2, 3, 17, 19), "more than one block, and a tail"),
    ((3, 1, 131, 127), "threads that begin inside a sample"),
    ((2, 0, 5), "no elements"),
]


def scaled(table, scales):
    """The table with another in_scale."""
    gradients = {
        form: {name: table.coefficients(form)[name] for name in ("x0_grad", "out_grad", "out_var_grad")}
        for form in ("epsilon", "mean")
        if form not in table.unused_forms
    }
    columns = {**table.coefficients(), "in_scale": torch.as_tensor(scales, dtype=torch.float64)}
    return fastguide.StepTable.from_columns(
        table.timesteps, columns, gradients=gradients, learned_variance=table.learned_variance, name=table.name
    )


SCALES = torch.linspace(0.3, 1.7, 10)
SCALED = {name: scaled(table, SCALES) for name, table in TABLES.items()}


def step(table, inputs, index=3, form=None, **arguments):
    return guided_step(
        table,
        index,
        inputs.sample,
        inputs.predictions,
        make_guidance(len(inputs.predictions), form),
        gradient=inputs.gradient,
        variance=inputs.variance,
        **({} if "seeds" in arguments else {"noise": inputs.noise}),
        **arguments,
    )


def empty_staged(sample, copies, dtype=None):
    """NaN throughout, in the sample's layout."""
    staged = torch.cat([torch.full_like(sample, torch.nan)] * copies).to(dtype or sample.dtype)
    return staged.as_strided(staged.shape, (sample[:1].numel(), *sample.stride()[1:]))


def unrounded(table, inputs, index=3, form=None, **arguments):
    """in_scale * x' in the arithmetic's dtype: float32's and float64's sample, before it is rounded to the output's."""
    dtype = torch.float64 if inputs.sample.dtype == torch.float64 else torch.float32
    wide = step(table, inputs, index, form, out=torch.empty_like(inputs.sample, dtype=dtype), **arguments)
    return table.device_rows(None, dtype)[index, IN_SCALE] * wide


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("staged_dtype", DTYPES, ids=lambda d: f"staged {d}".replace("torch.", ""))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_copy_is_the_unrounded_sample_scaled_and_rounded_once(backend, dtype, staged_dtype, copies, generator):
    table = SCALED["ddpm"]
    inputs = make_inputs(table, (2, 3, 17, 19), generator, dtype=dtype)
    staged = empty_staged(inputs.sample, copies, staged_dtype)
    got = step(table, inputs, staged=staged, backend=backend)
    assert torch.equal(got, step(table, inputs, backend=backend))
    wide = unrounded(table, inputs, backend=backend)
    assert torch.equal(staged, torch.cat([wide.to(staged_dtype)] * copies))
    if dtype.itemsize == 2:  # what the test is for: the rounded sample would give another input
        assert not torch.equal(staged[:2], (SCALES[3] * got.float()).to(staged_dtype))


@pytest.mark.parametrize(("shape", "case"), SHAPES, ids=[case for _, case in SHAPES])
def test_every_shape(backend, shape, case, generator):
    table = SCALED["ddim"]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(table, shape, generator, dtype=dtype)
        staged = torch.full((2 * shape[0], *shape[1:]), torch.nan, dtype=dtype)
        step(table, inputs, staged=staged, backend=backend)
        assert torch.equal(staged, torch.cat([unrounded(table, inputs, backend=backend).to(dtype)] * 2))


def test_no_samples(backend):
    empty = torch.empty(0, 3)
    assert guided_step(SCALED["ddim"], 0, empty, [empty], staged=empty.clone(), backend=backend).shape == (
        0,
        3,
    )


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["ddim clipped", "ddpm learned"])
def test_copies_have_nothing_to_do_with_the_number_of_predictions(backend, name, count, copies, generator):
    """With clip, gradient, variance, noise and the predicted original sample."""
    table = SCALED[name]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(table, (2, 3, 200), generator, count=count, gradient=True, dtype=dtype)
        plain = step(table, inputs, form="epsilon", return_original=True, backend=backend)
        staged = empty_staged(inputs.sample, copies)
        got = step(table, inputs, form="epsilon", return_original=True, staged=staged, backend=backend)
        for ours, theirs in zip(got, plain, strict=True):
            assert torch.equal(ours, theirs)
        wide = unrounded(table, inputs, form="epsilon", backend=backend)
        assert torch.equal(staged, torch.cat([wide.to(dtype)] * copies))


def test_samples_at_different_steps_have_scales_of_their_own(backend, generator):
    table = SCALED["ddpm"]
    inputs = make_inputs(table, (4, 3, 200), generator, dtype=torch.bfloat16)
    index = torch.tensor([9, 0, 0, 5])
    staged = empty_staged(inputs.sample, 2)
    step(table, inputs, index, staged=staged, backend=backend)
    for b in range(4):
        alone = inputs.map(lambda t, b=b: t[b : b + 1])
        expected = unrounded(table, alone, int(index[b]), backend=backend).bfloat16()
        assert torch.equal(staged[b::4], expected.expand(2, 3, 200))


def test_an_in_scale_of_one_stages_the_sample(backend, generator):
    table = TABLES["ddim"]
    inputs = make_inputs(table, (2, 3, 200), generator)
    staged = empty_staged(inputs.sample, 1)
    assert torch.equal(step(table, inputs, staged=staged, backend=backend), staged)


@pytest.mark.parametrize("shape", [(3, 4, 9, 5), (3, 1, 9, 5), (2, 3, 64, 65)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_stages_in_the_same_layout(backend, dtype, shape, generator):
    table = SCALED["ddpm"]
    inputs = make_inputs(table, shape, generator, dtype=dtype)
    expected = empty_staged(inputs.sample, 2)
    step(table, inputs, staged=expected, backend=backend)
    inputs = inputs.map(lambda t: t.contiguous(memory_format=torch.channels_last))
    staged = torch.full((2 * shape[0], *shape[1:]), torch.nan, dtype=dtype).to(memory_format=torch.channels_last)
    step(table, inputs, staged=staged, backend=backend)
    assert torch.equal(staged, expected)


@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_strided_view_is_written_and_nothing_beside_it(backend, dtype, copies, seeded, generator):
    """As the model's input with its own channels behind the sample's; at each alignment of a vector."""
    table = SCALED["ddpm"]
    inputs = make_inputs(table, (3, 2, 37), generator, dtype=dtype)
    noise = {"seeds": torch.tensor([4, 5, 6])} if seeded else {}
    expected = torch.cat([unrounded(table, inputs, backend=backend, **noise).to(dtype)] * copies)
    for offset in range(0, 34, 3):
        buffer = torch.full((copies * 3, 5 * 37 + offset), torch.nan, dtype=dtype)
        staged = buffer[:, offset : offset + 2 * 37].unflatten(1, (2, 37))
        step(table, inputs, staged=staged, backend=backend, **noise)
        assert torch.equal(staged, expected)
        assert buffer[:, :offset].isnan().all()
        assert buffer[:, offset + 2 * 37 :].isnan().all()


@pytest.mark.parametrize("place", ["sample", "prediction", "noise"])
def test_out_in_place_of_an_input(backend, place, generator):
    for dtype in (torch.float32, torch.bfloat16):
        table = SCALED["ddpm"]
        inputs = make_inputs(table, (2, 3, 700), generator, dtype=dtype)
        expected, expected_staged = empty_staged(inputs.sample, 1), empty_staged(inputs.sample, 2)
        step(table, inputs, out=expected, staged=expected_staged, backend=backend)
        out = inputs.predictions[1] if place == "prediction" else getattr(inputs, place)
        staged = empty_staged(inputs.sample, 2)
        assert step(table, inputs, out=out, staged=staged, backend=backend) is out
        assert torch.equal(out, expected)
        assert torch.equal(staged, expected_staged)


def test_drawn_noise_is_in_the_staged_input(backend):
    """Drawn into out's memory or inside the kernel: what is staged has seen it."""
    staged = torch.full((4, 3, 700), torch.nan)
    got = drawn([3, 4], (2, 3, 700), 5, staged=staged, backend=backend)
    assert torch.equal(staged, torch.cat([got, got]))
    sample, drawing = torch.zeros(2, 700), torch.Generator().manual_seed(0)
    staged, out = torch.full((2, 700), torch.nan), torch.empty(2, 700)
    got = guided_step(TABLES["ddpm"], 2, sample, [sample], generator=drawing, out=out, staged=staged, backend=backend)
    assert torch.equal(staged, got)


def test_memory_next_to_the_sample_is_apart(backend, generator):
    """The staged input may begin where an input ends, and end where another begins."""
    table = SCALED["ddim"]
    inputs = make_inputs(table, (2, 40), generator, count=1)
    expected = empty_staged(inputs.sample, 1)
    step(table, inputs, staged=expected, backend=backend)
    buffer = torch.cat([inputs.sample, torch.full((2, 40), torch.nan), inputs.predictions[0]])
    inputs.sample, inputs.predictions = buffer[:2], [buffer[4:]]
    step(table, inputs, staged=buffer[2:4], backend=backend)
    assert torch.equal(buffer[2:4], expected)


def test_meta_tensors_share_no_memory():
    x = torch.empty(2, 3, 8, device="meta")
    staged = torch.empty(4, 3, 8, device="meta")
    out = guided_step(SCALED["ddim"].to("meta"), 0, x, [x], staged=staged)
    assert out.shape == x.shape


def test_autograd_notices_that_staged_was_written(backend, generator):
    x = torch.randn(2, 3, generator=generator, requires_grad=True)
    hidden = x * 2
    loss = (hidden * hidden).sum()
    other = torch.zeros(2, 3)
    with torch.no_grad():
        guided_step(TABLES["ddim"], 0, other, [other], staged=hidden.detach(), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


X = torch.zeros(2, 3, 4)
REFUSED = [
    ([0.0], TypeError, "staged: expected a tensor, got list"),
    (torch.zeros(()), ValueError, r"staged: expected shape \(a multiple of 2, ...\), got \(\)"),
    (torch.zeros(3, 3, 4), ValueError, r"staged: expected shape \(a multiple of 2, ...\), got \(3, 3, 4\)"),
    (torch.zeros(1, 3, 4), ValueError, r"staged: expected shape \(a multiple of 2, ...\), got \(1, 3, 4\)"),
    (torch.zeros(0, 3, 4), ValueError, r"staged: expected shape \(a multiple of 2, ...\), got \(0, 3, 4\)"),
    (torch.zeros(4, 3, 5), ValueError, r"staged: expected shape \(4, 3, 4\), got \(4, 3, 5\)"),
    (torch.zeros(4, 12), ValueError, r"staged: expected shape \(4, 3, 4\), got \(4, 12\)"),
    (torch.zeros(4, 3, 4).int(), TypeError, "staged: expected float32, bfloat16, float16 or float64, got torch.int32"),
    (torch.zeros(4, 3, 4, device="meta"), ValueError, "staged: expected it on cpu, the sample's device, got meta"),
    (torch.zeros(4, 4, 3).mT, ValueError, r"staged: expected the sample's layout within a sample, strides \(4, 1\)"),
    (torch.zeros(4, 3, 4, requires_grad=True), ValueError, "staged: expected a tensor that requires no grad"),
    (
        torch.zeros(1, 3, 4).expand(4, 3, 4),
        ValueError,
        r"staged: expected samples that do not overlap, got strides \(0,",
    ),
    (torch.zeros(48).as_strided((2, 3, 4), (11, 4, 1)), ValueError, "staged: expected samples that do not overlap"),
]


@pytest.mark.parametrize("backend_name", ["native", "reference"])
@pytest.mark.parametrize(("staged", "kind", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_refuses(staged, kind, message, backend_name):
    out = torch.full_like(X, 7.0)
    with pytest.raises(kind, match=message):
        guided_step(TABLES["ddim"], 0, X, [X], out=out, staged=staged, backend=backend_name)
    assert (out == 7.0).all()


@pytest.mark.parametrize("backend_name", ["native", "reference"])
@pytest.mark.parametrize("first", [0, 23, 47], ids=["the same", "halfway", "its last element"])
@pytest.mark.parametrize("name", ["out", "sample", "predictions[1]", "gradient", "variance", "noise"])
def test_refuses_the_memory_of_another_argument(name, first, backend_name, generator):
    """Of every one, even element for element: the staged input is written while others are still to be read."""
    buffer = torch.full((100,), 3.0)
    other, staged = buffer[:48].view(2, 3, 8), buffer[first : first + 48].view(2, 3, 8)
    inputs, out = make_inputs(SCALED["ddpm learned"], (2, 3, 8), generator, gradient=True), torch.zeros(2, 3, 8)
    if name == "out":
        out = other
    elif name == "predictions[1]":
        inputs.predictions[1] = other
    else:
        setattr(inputs, name, other)
    with pytest.raises(
        ValueError, match=rf"staged: expected memory apart from {name}, got an overlap".replace("[1]", r"\[1\]")
    ):
        step(SCALED["ddpm learned"], inputs, form="epsilon", out=out, staged=staged, backend=backend_name)
    assert (buffer == 3.0).all()
