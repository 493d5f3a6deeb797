"""The CUDA kernel that guides groups of elements: compiled for the host, and its PTX interpreted, without races."""

from __future__ import annotations

import re
import weakref

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, Normalized, as_guidance
from fastguide.guidance.encoded import group_scratch_numbers
from fastguide.step.backends import reference
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.operator import THRESHOLD_WORDS, StepArguments
from fastguide.step.weigh import made_in_step
from tests.support import device_code
from tests.support.ptx.placed import Placed

pytestmark = [
    pytest.mark.xdist_group("ptx"),  # one process reads the PTX
    pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}"),
]
SCHEDULE = fastguide.NoiseSchedule.linear()
TABLE = fastguide.ddim(SCHEDULE, 10)
GUIDANCES = {
    "normalized": Normalized([4.0, 3.0, 2.0], dim=-1),
    "limited": Normalized(4.0, dim=-1, at_most=1.5),
    "projected": AdaptiveProjected(4.0, norm_threshold=2.0, norm_dim=-1),
}
SHAPES = {  # samples, groups, elements of a group
    "single elements": (3, 131, 1),
    "shorter than a vector": (3, 50, 3),
    "half a warp": (3, 9, 64),
    "tails": (3, 11, 100),
    "a warp's most": (3, 3, 2048),
    "a block's": (3, 2, 4099),
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def arguments_of(guidance, shape, dtype=torch.float32, place=lambda name, tensor: tensor, **changed):
    """The operator's arguments, each tensor where ``place`` puts it; groups are along the last dimension."""
    generator = torch.Generator().manual_seed(shape[1] * shape[-1])
    count = guidance.num_predictions
    x, first, *others = [torch.randn(shape, generator=generator) for _ in range(1 + count)]  # each at 16 bytes
    predictions = changed.pop("predictions", [first, *(first + 0.4 * other for other in others)])
    program, parameters = guidance.weights_from.on(x.device)
    batch, elements, columns = shape[0], shape[1] * shape[2], len(guidance.weights_from.program.weights) + 1
    scratch = torch.full((group_scratch_numbers(batch, elements),), torch.nan, dtype=torch.float64)
    tensors = {
        "out": torch.zeros_like(x), "sample": x, "rows": TABLE.device_rows(None, torch.float32),
        "weights": guidance.weights(x.device, torch.float32), "program": program, "parameters": parameters,
        "made": torch.full((batch * shape[1], columns), torch.nan), "scratch": scratch,
    }  # fmt: skip
    tensors |= {name: tensor for name, tensor in changed.items() if isinstance(tensor, torch.Tensor)}
    placed = {name: place(name, tensor.contiguous()) for name, tensor in tensors.items()}
    others = {name: value for name, value in changed.items() if not isinstance(value, torch.Tensor)}
    placed["predictions"] = [place(f"prediction {k}", p.to(dtype)) for k, p in enumerate(predictions)]
    fields = dict.fromkeys(StepArguments._fields) | {"index": 4, "philox_threads": 0}
    return StepArguments(**(fields | placed | others))


def expected_of(arguments):
    """What the reference makes of them: the next sample, and the weights."""
    written = ("out", "made", "original", "staged", "history")
    a = arguments._replace(**{name: t.clone() for name in written if (t := getattr(arguments, name)) is not None})
    if a.inverse_thresholds is not None:
        a = a._replace(inverse_thresholds=a.out.new_zeros(len(a.out), 1))
    reference.guided_step(*a)
    return a.out, a.made


def check(arguments, out, made):
    """As close as the CPU's kernel comes."""
    torch.testing.assert_close(arguments.made, made, rtol=2e-6, atol=1e-6, equal_nan=True)
    scale = out.nan_to_num(0, 0, 0).abs().max()
    torch.testing.assert_close(arguments.out / scale, out / scale, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_code_compiled_for_the_host(shape, dtype):
    for guidance in GUIDANCES.values():
        arguments = arguments_of(guidance, shape, dtype)
        for order in (1, 2):
            accesses = device_code.guided_step(*arguments, order=order)
            check(arguments, *expected_of(arguments))
        assert accesses > 0 or shape[-1] < 8


def test_norms_are_the_formula_s():
    """In float64, written independently; predictions that cancel to a thousandth leave no more than their rounding."""
    x, u, other = torch.randn(3, 2, 30, 64)
    c = 2 / 3 * u + 1e-3 * other  # u + 3 (c - u) = 0
    arguments = arguments_of(Normalized(3.0, dim=-1), x.shape, predictions=[u, c])
    device_code.guided_step(*arguments, step_groups=False)  # leaves the guided prediction
    m = u.double() + 3 * (c.double() - u.double())
    factor = c.double().norm(dim=-1) / m.norm(dim=-1)
    torch.testing.assert_close(arguments.made[:, 0].view(2, 30).double(), factor, rtol=1e-6, atol=0)
    guided = arguments.scratch.view(torch.float32)[: x.numel()].view(x.shape)
    expected = factor[..., None] * m
    torch.testing.assert_close(guided.double(), expected, rtol=0, atol=2e-7 * float(expected.abs().max()))


def test_bits_depend_on_nothing_but_the_group():
    """Neither on the batch, nor on other groups, nor on where the predictions begin."""
    guidance, shape = Normalized(4.0, dim=-1), (3, 77, 40)
    arguments = arguments_of(guidance, shape, torch.bfloat16)
    device_code.guided_step(*arguments)
    wide = [torch.zeros(3, 77 * 40 + 24, dtype=torch.bfloat16) for _ in range(2)]
    for offset in (0, 3):
        shifted = []
        for prediction, tensor in zip(arguments.predictions, wide, strict=True):
            view = tensor[:, offset : offset + 77 * 40].view(shape)
            shifted.append(view.copy_(prediction))
        moved = arguments._replace(out=torch.zeros(shape), made=torch.zeros(3 * 77, 3), predictions=shifted)
        device_code.guided_step(*moved, order=5)
        assert torch.equal(moved.out, arguments.out)
        assert torch.equal(moved.made, arguments.made)
    some = arguments_of(
        guidance, (1, 10, 40), torch.bfloat16, sample=arguments.sample[1:2, 33:43],
        predictions=[each[1:2, 33:43].contiguous() for each in arguments.predictions],
    )  # fmt: skip
    device_code.guided_step(*some)
    assert torch.equal(some.out[0], arguments.out[1, 33:43])
    assert torch.equal(some.made, arguments.made.view(3, 77, 3)[1, 33:43])


def test_what_is_not_finite_or_zero_stays_in_its_group():
    x, u, c = torch.randn(3, 2, 13, 20)
    u[0, 3, 7], c[1, 5, 19], c[1, 6] = torch.inf, torch.nan, 0.0
    u[0, 4] = c[0, 4] = 0.0  # norms of 0
    for guidance in (GUIDANCES["limited"], GUIDANCES["projected"], Normalized(3.0, dim=-1)):
        arguments = arguments_of(guidance, x.shape, predictions=[u, c])
        device_code.guided_step(*arguments)
        out, made = expected_of(arguments)
        touched = torch.zeros(2, 13, dtype=torch.bool)
        touched[0, 3] = touched[1, 5] = touched[0, 4] = touched[1, 6] = True
        assert bool(arguments.out[~touched].isfinite().all())
        check(arguments, out, made)


def test_a_step_may_have_all_that_it_has_without_groups():
    """Noise, rows of their own, a history, and thresholds."""
    guidance, shape = GUIDANCES["normalized"], (3, 9, 64)
    noisy = fastguide.ddim(SCHEDULE, 10, eta=1.0).device_rows(None, torch.float32)
    multistep = fastguide.dpm_solver(SCHEDULE, 10)
    thresholded = TABLE.with_dynamic_thresholding(0.8, 1.5).device_rows(None, torch.float32)
    cases = [
        {"rows": noisy, "seeds": torch.tensor([1, 2, 3])},
        {"rows": noisy, "noise": torch.randn(shape)},
        {"indices": torch.tensor([4, 0, 9])},
        {"rows": multistep.device_rows(None, torch.float32),
         "history": torch.randn(multistep.history_slots * 3, *shape[1:])},
        {"original": torch.zeros(shape), "staged": torch.zeros(6, *shape[1:])},
        {"rows": thresholded, "inverse_thresholds": torch.zeros(3, THRESHOLD_WORDS)},
    ]  # fmt: skip
    for changed in cases:
        arguments = arguments_of(guidance, shape, torch.bfloat16, **changed)
        wanted = expected_of(arguments)
        device_code.guided_step(*arguments)
        check(arguments, *wanted)


def test_finished_samples_are_left_and_rows_beyond_the_table_are_nan():
    guidance, shape = GUIDANCES["normalized"], (3, 9, 20)
    arguments = arguments_of(guidance, shape)
    out, made = expected_of(arguments)
    cursor = torch.tensor([[4, 10, 0, 0], [7, 7, 0, 0], [10, 11, 0, 0]])
    sample = arguments.sample.clone()
    moved = arguments_of(guidance, shape, cursor=cursor, sample=sample)
    moved = moved._replace(out=moved.sample)
    device_code.guided_step(*moved)
    torch.testing.assert_close(moved.out[0], out[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.made[:9], made[:9], rtol=2e-6, atol=1e-6)
    assert torch.equal(moved.out[1], arguments.sample[1])
    assert bool(moved.made[9:18].isnan().all())
    assert bool(moved.out[2].isnan().all())


# ---- What the kernel takes ----


@as_guidance(predictions=2, dim=-1)
def of_deviations(v, scale):
    first, second = v.predictions
    return first + scale * v.std(second) / v.std(first) * (second - first)


@as_guidance(predictions=3, dim=-1)
def of_three(v, scale):
    first, second, third = v.predictions
    return first + scale * v.norm(second) / v.norm(first) * (third - first)


@as_guidance(predictions=3, dim=-1)
def of_four(v, scale):
    first, second, third = v.predictions
    return first + scale * v.norm(second) / v.norm(v.sample) * (third - first)


def test_the_kernel_takes_three_terms_in_blocks_of_memory():
    backend = BACKENDS["reference"]._replace(makes_weights=("meta",), group_elements=64, group_terms=3)
    x = torch.empty(2, 5, 64, device="meta")
    taken = {
        "norms": (Normalized(3.0, dim=-1), x, True),
        "projected": (GUIDANCES["projected"], x, True),
        "within an interval": (Normalized(3.0, dim=-1).within(TABLE, 0.2, 0.8), x, True),
        "deviations": (of_deviations(2.0), x, True),
        "three": (of_three(2.0), x, True),
        "a weight of the sample": (AdaptiveProjected(4.0, norm_dim=-1, space="original"), x, True),
        "four": (of_four(2.0), x, False),
        "apart in memory": (Normalized(3.0, dim=1), x, False),
        "longer": (Normalized(3.0, dim=-1), torch.empty(2, 5, 65, device="meta"), False),
        "empty": (Normalized(3.0, dim=-1), torch.empty(0, 5, 64, device="meta"), False),
    }
    for name, (guidance, sample, expected) in taken.items():
        assert made_in_step(backend, guidance.weights_from, sample) == expected, name
    assert not made_in_step(backend._replace(group_elements=0), Normalized(3.0, dim=-1).weights_from, x)


def test_memory_for_the_guided_prediction_stays_as_long_as_the_guidance():
    """A graph of the caller's may write to it; all of it together is four times what the largest sample needs."""
    made_by = Normalized(3.0, dim=-1).weights_from
    handed_out = []
    for batch in (3, 2, 3, *range(4, 40), 3):
        scratch = made_by.scratch_for(torch.empty(batch, 5, 64, device="meta"))
        assert scratch.numel() >= group_scratch_numbers(batch, 320)
        handed_out.append(weakref.ref(scratch))
        del scratch
    assert handed_out[0]().numel() == group_scratch_numbers(3, 320)
    assert handed_out[0]() is handed_out[1]() is handed_out[2]()
    kept = {id(ref()): ref() for ref in handed_out}.values()
    assert None not in kept
    assert sum(tensor.numel() for tensor in kept) <= 4 * group_scratch_numbers(39, 320)


# ---- Interpreted ----

INTERPRETED = {  # few groups, of which not all blocks are full
    "single elements": (2, 33, 1),
    "shorter than a vector": (2, 35, 3),
    "half a warp": (2, 17, 16),
    "a vector a lane": (2, 17, 64),
    "tails": (2, 9, 100),
    "a warp's most": (2, 5, 2048),
    "a block's": (1, 2, 4099),
}


def two_launches(arguments):
    """That of the groups alone, and the step's; one that makes both is in test_groups_step.py."""
    return device_code.record_all({**device_code.arguments_of(*arguments), "step_groups": False})


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), zip(INTERPRETED.values(), 3 * [*DTYPES.values()], strict=False), ids=str)
def test_the_kernel_interpreted(library, shape, dtype, aligned):
    placed = Placed()
    arguments = arguments_of(GUIDANCES["projected"], shape, dtype, place=placed)
    if not aligned:
        rows = [torch.nn.functional.pad(p.flatten(1), (1, 2)) for p in arguments.predictions]
        views = [placed("shifted", row)[:, 1:-2].view(shape) for row in rows]
        arguments = arguments._replace(predictions=views)
    out, made = expected_of(arguments)
    first, step = two_launches(arguments)
    assert first.kernel.startswith("groups_kernel")
    blocks = None if aligned else [[block] for block in reversed(range(first.blocks))]
    assert placed.launch(library, first, blocks) == []
    torch.testing.assert_close(arguments.made, made, rtol=2e-6, atol=1e-6)
    assert placed.launch(library, step) == []
    check(arguments, out, made)


def test_interpreted_bits_are_those_of_a_group_alone(library):
    """Whatever else is in the batch, and wherever it begins."""
    found = []
    for samples, offset in ((slice(0, 2), 0), (slice(1, 2), 3)):
        placed = Placed()
        arguments = arguments_of(Normalized(4.0, dim=-1), (2, 20, 100), torch.bfloat16)
        cut = {name: getattr(arguments, name)[samples] for name in ("out", "sample")}
        rows = [torch.nn.functional.pad(p[samples].flatten(1), (offset, 5)) for p in arguments.predictions]
        shape = cut["sample"].shape
        alone = arguments_of(Normalized(4.0, dim=-1), shape, torch.bfloat16, place=placed, **cut)
        views = [placed("shifted", row)[:, offset : offset + 2000].view(shape) for row in rows]
        alone = alone._replace(predictions=views)
        first, _ = two_launches(alone)
        assert placed.launch(library, first) == []
        guided = alone.scratch.view(torch.float32)[: alone.out.numel()].view(shape)
        found.append((alone.made.view(*shape[:2], 3)[-1].clone(), guided[-1].clone()))
    assert all(map(torch.equal, *found))


def test_words_that_lead_nowhere_stay_within_the_kernel(library):
    """Nobody checks a program that is on a device: the kernel reads and writes nothing but what is its own."""
    program, _ = GUIDANCES["limited"].weights_from.on(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for count in (3, 10**6, -5):
        words = torch.randint(-(2**31), 2**31 - 1, program.shape, generator=generator, dtype=torch.int64).int()
        words[0, 0] = count
        placed = Placed()
        arguments = arguments_of(GUIDANCES["limited"], (2, 17, 64), place=placed, program=words)
        (first,) = device_code.record_all(device_code.arguments_of(*arguments))
        found = placed.launch(library, first)
        assert [text for text in found if "initialised" not in text] == []


def test_the_interpreter_finds_what_is_missing(library):
    """The tests above have teeth: without its barriers, a block reads what is not there yet."""
    placed = Placed()
    arguments = arguments_of(GUIDANCES["limited"], (2, 17, 64), place=placed)
    first, _ = two_launches(arguments)

    def changed(text):
        assert len(re.findall(r"bar\.sync[^;]*;", text)) >= 2
        return re.sub(r"bar\.sync[^;]*;", "", text)

    assert any("race" in text for text in placed.launch(library.changed(first.kernel, changed), first))
