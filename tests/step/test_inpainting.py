"""A known image: where the mask is 0, the next sample is the image at its level, in any dtype and layout."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Inpainting
from tests.support.cases import TABLES, alphas
from tests.support.step_inputs import errors, guided_step, make_guidance, make_inputs, textbook
from tests.support.textbook import inpainted

SHAPES = [(2, 3, 17, 19), (3, 7), (40, 1031), (1, 4, 64, 64)]


def known_of(inputs, generator, dtype=torch.float32):
    def draw():
        return torch.randn(inputs.sample.shape, generator=generator).to(dtype)

    mask = torch.rand(inputs.sample.shape, generator=generator)
    mask = torch.where(mask < 0.3, 0.0, torch.where(mask > 0.6, 1.0, mask))
    return Inpainting(mask.to(dtype), draw(), draw())


def step(table, index, inputs, **arguments):
    guidance = make_guidance(len(inputs.predictions), None)
    return guided_step(
        table,
        index,
        inputs.sample,
        inputs.predictions,
        guidance,
        variance=inputs.variance,
        noise=inputs.noise,
        **arguments,
    )


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_known_part_is_noised_to_the_level_of_the_next_step(backend, shape, name, generator):
    table = TABLES[name]
    inputs = make_inputs(table, shape, generator)
    known = known_of(inputs, generator)
    for index in (0, 4, len(table) - 1):
        got = step(table, index, inputs, inpainting=known, backend=backend)
        plain = step(table, index, inputs, backend=backend)
        _, a_prev = alphas(table, index)
        mask, image, z = (t.double() for t in known)
        truth = mask * plain.double() + (1 - mask) * (a_prev**0.5 * image + (1 - a_prev) ** 0.5 * z)
        assert errors(got, truth)[1] <= 1e-6 * truth.abs().max()
        assert torch.equal(got[known.mask == 1], plain[known.mask == 1])
    assert torch.equal(got[known.mask == 0], known.original[known.mask == 0])  # after the last step, the image


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_staged_inputs_and_originals(backend, dtype, generator):
    """What is staged is the blended sample; the predicted original is not blended. Each output rounds once."""
    table = TABLES["ddpm learned"]
    inputs = make_inputs(table, (2, 3, 17, 19), generator)
    known = known_of(inputs, generator, dtype)
    staged = torch.zeros(4, 3, 17, 19, dtype=dtype)
    got, original = step(table, 2, inputs, inpainting=known, staged=staged, return_original=True, backend=backend)
    assert torch.equal(staged, torch.cat([got, got]).to(dtype))
    assert torch.equal(original, step(table, 2, inputs, return_original=True, backend=backend)[1])


@pytest.mark.parametrize("layout", ["channels_last", "expanded mask", "in place"])
def test_layouts(backend, layout, generator):
    table = TABLES["ddim"]
    inputs = make_inputs(table, (2, 3, 17, 19), generator)
    known = known_of(inputs, generator)
    if layout == "expanded mask":
        known = known._replace(mask=known.mask[:1].expand(2, -1, -1, -1))
    expected = step(table, 3, inputs, inpainting=Inpainting(*(t.contiguous() for t in known)), backend=backend)
    out = None
    if layout == "channels_last":
        inputs = inputs.map(lambda t: t.contiguous(memory_format=torch.channels_last))
        known = Inpainting(*(t.contiguous(memory_format=torch.channels_last) for t in known))
    elif layout == "in place":
        out = inputs.sample
    assert torch.equal(step(table, 3, inputs, inpainting=known, out=out, backend=backend), expected)


def test_double_precision(generator):
    table = TABLES["ddim"]
    inputs = make_inputs(table, (2, 3, 17, 19), generator, dtype=torch.float64)
    known = known_of(inputs, generator, torch.float64)
    painted, _ = textbook("ddim", table, 3, inputs, None, torch.float64)
    truth = inpainted(painted, known.original, known.mask, known.noise, alphas(table, 3)[1])
    for name in ("native", "reference"):
        assert errors(step(table, 3, inputs, inpainting=known, backend=name), truth)[1] < 1e-13


def test_a_loop_without_mask_needs_no_known_columns():
    """Tables of other makes: a known part would be zero; they say no level."""
    table = fastguide.StepTable.from_columns(torch.tensor([3]), {"out_sample": torch.ones(1)})
    assert table.levels is None


BAD = {
    "class": (lambda x, k: {"inpainting": tuple(k)}, TypeError, "inpainting: expected an Inpainting, got tuple"),
    "None": (lambda x, k: {"inpainting": k._replace(noise=None)}, TypeError, "inpainting.noise: expected a tensor"),
    "shape": (lambda x, k: {"inpainting": k._replace(mask=x[:, :1])}, ValueError, "inpainting.mask: expected shape"),
    "layout": (lambda x, k: {"inpainting": k._replace(noise=x.mT.contiguous().mT)}, ValueError, "inpainting.noise: "),
    "dtype": (lambda x, k: {"inpainting": k._replace(mask=x > 0)}, TypeError, "inpainting.mask: expected float32"),
    "the output": (lambda x, k: {"inpainting": k, "out": k.original}, ValueError, "apart from inpainting.original"),
    "staged": (lambda x, k: {"inpainting": k, "staged": k.noise}, ValueError, "staged: .* apart from inpainting.noise"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case, generator):
    make, error, message = BAD[case]
    inputs = make_inputs(TABLES["ddim"], (2, 3, 8, 8), generator)
    with pytest.raises(error, match=message):
        step(TABLES["ddim"], 0, inputs, **make(inputs.sample, known_of(inputs, generator)))


def test_the_operator_itself_refuses_what_would_be_wrong(generator):
    x = torch.zeros(2, 8)
    rows, weights = TABLES["ddim"].device_rows(None, torch.float32), torch.tensor([[[1.0, 0.0]]])
    call = torch.ops.fastguide.guided_step.default
    none = [0, None, None, None, None, None, None, 0]
    ones = [torch.ones(2, 8) for _ in range(3)]
    for last, message in (
        ([None, None, ones[0], None, None], "mask: expected mask, known and known_noise together"),
        ([None, None, x, ones[0], ones[1]], "out: expected memory apart from mask"),
        ([torch.zeros(2, 4), None, None, None, None], "cursor: expected int64"),
        ([None, torch.zeros(2), None, None, None], "timestep: expected a cursor with it"),
        ([torch.tensor([[11, 12, 0, 0]]), None, None, None, None], "index: expected values from 0 to 9, got 11"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(x, None, None, x, [ones[0].clone()], rows, weights, *none, *last)
    with pytest.raises(RuntimeError, match="out: expected the sample itself with a cursor"):
        call(x, None, None, ones[2], [ones[0]], rows, weights, *none, torch.tensor([[0, 1, 0, 0]]))
