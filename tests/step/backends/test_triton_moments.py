"""The Triton kernel that makes weights: interpreted against the reference, compiled for GPUs, and within a step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, Momentum, PerpNeg, Sampler, ZeroStar, as_guidance, guided_step
from fastguide.guidance.encoded import PART, scratch_numbers
from fastguide.step.backends import reference, triton_moments
from fastguide.step.backends import triton as triton_step
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.operator import StepArguments
from tests.support.machine_code import instructions, resource_usage

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreted = pytest.mark.skipif(not BACKENDS["triton"].serves("cpu"), reason="Triton does not interpret here")

TABLE = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10)
STEP = torch.ops.fastguide.guided_step_triton.default
triton_moments_kernel = pytest.importorskip("fastguide.step.backends.triton_moments_kernel")
first_of = triton_moments_kernel.first_of


@as_guidance(predictions=2)
def of_every_operation(v, scale, limit):
    """Two of each: one of them the larger or smaller one."""
    uncond, cond = v.predictions
    shift, far = v.norm(cond - uncond), v.norm(uncond)
    bent = v.exp(-shift / far) + v.minimum(shift, far) + v.maximum(shift, limit) - v.sqrt(v.maximum(far, shift))
    return uncond + v.where(v.step > 2.5, scale * bent, v.where(shift > far, bent, far)) * (cond - uncond)


def of_many(count):
    @as_guidance(predictions=count)
    def many(v, scale):
        first, *others = v.predictions
        total = first
        for each in others:
            total = total + scale * v.dot(each, first) * (each - first)
        return total

    return many(1e-3)


@as_guidance(predictions=2)
def with_the_sample(v, scale):
    uncond, cond = v.predictions
    return cond + scale * v.sum(v.sample) / v.numel * (uncond + v.sample)


@triton.jit
def kernel_of_first(part, first, size: tl.constexpr):
    tl.store(first, first_of(tl.load(part), size))


GUIDANCES = {
    "every operation": of_every_operation(0.5, 3.0),
    "of the step": ZeroStar(4.0, zero_init_steps=3).within(TABLE, 0.2, 0.9),
    "perpendicular": PerpNeg(8.0),
    "with the sample": with_the_sample(0.1),
    "four": of_many(4),
}
BFLOAT16, FLOAT16 = (torch.float32, torch.bfloat16), (torch.float16, torch.float16)
CASES = [
    ("every operation", (1, 3, 5), (torch.float32, torch.float32)),
    ("of the step", (2, PART), BFLOAT16),
    ("perpendicular", (2, 41, 31), FLOAT16),
    ("with the sample", (1, 17 * PART + 24), BFLOAT16),
    ("four", (2, 2 * PART + 16), BFLOAT16),
]


def arguments_of(guidance, shape, dtypes=(torch.float32, torch.float32), **changed):
    """The operator's arguments; the sample's part of the batch may be cut out of them."""
    generator = torch.Generator().manual_seed(shape[-1])
    first, state = torch.randn(shape, generator=generator), dtypes[0]
    others = [first + 0.2 * torch.randn(shape, generator=generator) for _ in range(guidance.num_predictions - 1)]
    x = torch.randn(shape, generator=generator).to(state)
    program, parameters = guidance.weights_from.on(x.device)
    fields = dict.fromkeys(StepArguments._fields) | {"index": 4, "philox_threads": 0}
    fields |= {
        "out": torch.zeros_like(x), "sample": x, "predictions": [each.to(dtypes[1]) for each in (first, *others)],
        "rows": TABLE.device_rows(None, torch.float32), "weights": guidance.weights(x.device, torch.float32),
        "program": program, "parameters": parameters,
        "made": torch.full((len(x), len(guidance.weights_from.program.weights) + 1), torch.nan),
    }  # fmt: skip
    return StepArguments(**(fields | changed))


def expected_of(arguments):
    a = arguments._replace(out=arguments.out.clone(), made=arguments.made.clone())
    reference.guided_step(*a)
    return a.out, a.made


@interpreted
@pytest.mark.parametrize(("name", "shape", "dtypes"), CASES, ids=[case[0] for case in CASES])
def test_the_kernel_interpreted(name, shape, dtypes):
    arguments = arguments_of(GUIDANCES[name], shape, dtypes)
    out, made = expected_of(arguments)
    STEP(*arguments)
    torch.testing.assert_close(arguments.made, made, rtol=1e-6, atol=1e-6)
    tolerance = 1e-2 if out.dtype == torch.float16 else 1e-4
    torch.testing.assert_close(arguments.out, out, rtol=tolerance, atol=tolerance)


@interpreted
def test_other_calls_of_the_loop_and_the_other_side_of_a_comparison():
    arguments = arguments_of(GUIDANCES["every operation"], (1, 3, 5), index=1)
    first = arguments.predictions[0]
    for apart in (1e-3, 30.0):
        changed = arguments._replace(predictions=[first, first + apart])
        _, made = expected_of(changed)
        STEP(*changed)
        torch.testing.assert_close(changed.made, made, rtol=1e-6, atol=1e-6)


@interpreted
def test_a_sample_has_the_bits_that_it_has_alone():
    """Of several parts, in views of other strides, at rows of their own; and those of a finished one are left alone."""
    guidance, shape = of_many(2), (3, 2 * PART + 7)
    cursor = torch.tensor([[4, 10, 0, 0], [7, 7, 0, 0], [9, 10, 0, 0]])
    arguments = arguments_of(guidance, shape, BFLOAT16, cursor=cursor)
    arguments = arguments._replace(out=arguments.sample)
    alone = arguments._replace(
        **{name: getattr(arguments, name)[2:].clone() for name in ("sample", "made", "cursor")},
        predictions=[each[2:].clone() for each in arguments.predictions],
    )
    alone = alone._replace(out=alone.sample)
    before, stacked = arguments.sample[1].clone(), [torch.cat(arguments.predictions)]
    STEP(*arguments._replace(predictions=stacked))
    STEP(*alone)
    assert torch.equal(arguments.made[2:], alone.made)
    assert torch.equal(arguments.out[2:], alone.out)
    assert bool(arguments.made[1].isnan().all())
    assert torch.equal(arguments.out[1], before)


@interpreted
def test_a_program_of_each_sample_and_words_that_lead_nowhere():
    """Places beyond the values are taken as 0, and no instruction is read beyond the program's memory."""
    arguments = arguments_of(of_many(2), (2, 64))
    _, made = expected_of(arguments)
    words = arguments.program.repeat(2, 1)
    words[1, 0], words[1, 3:] = 1000, 70000
    STEP(*arguments._replace(program=words))
    torch.testing.assert_close(arguments.made[0], made[0], rtol=1e-6, atol=1e-6)
    assert bool(arguments.made[1].isfinite().all())


@interpreted
@pytest.mark.parametrize("thresholds", [False, True])
def test_a_step_and_a_sampler_take_them(monkeypatch, thresholds):
    """As on a GPU: the step's operator makes the weights, and does so again where a step is repeated.

    But where x_0 is divided by a threshold: that is found before the step, of the guided prediction.
    """
    own = BACKENDS["triton"]._replace(makes_weights=("cpu",))
    monkeypatch.setitem(BACKENDS, "triton", own)
    guidance, plain = of_many(2), of_many(2)
    table = fastguide.ddim(fastguide.NoiseSchedule.linear(), 5)
    if thresholds:
        table = table.with_dynamic_thresholding(0.9, sample_max_value=30.0)
    x, uncond, cond = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(1))
    for index in range(4):
        got = guided_step(table, index, x, [uncond, cond], guidance, backend="triton")
        expected = guided_step(table, index, x, [uncond, cond], plain, backend="native")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(guidance.last_weights, plain.last_weights, rtol=1e-6, atol=1e-6)
        x = expected

    def model(x, t, y):
        return torch.tanh(x + y[:, None])

    arguments = {"cond": torch.tensor([1.0, 2.0]), "uncond": torch.zeros(2)}
    got, expected = (
        Sampler(model, table, each, backend=name)(x, **arguments)
        for name, each in (("triton", guidance), ("native", plain))
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("momentum", [False, True])
def test_a_loop_s_steps_are_repeated(monkeypatch, momentum):
    """Of a sample that has a weight, and of momentum: each step reads what its own kernel has made."""
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(makes_weights=("cpu",)))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 3, 5, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    found = {}
    for backend in ("triton", "reference"):
        guidance = AdaptiveProjected(4.0, norm_threshold=3.0, momentum=-0.5) if momentum else with_the_sample(0.1)
        adding = {"momentum": Momentum(TABLE, guidance, x)} if momentum else {}
        generator.manual_seed(4)
        sample, samples = x, []
        for index in range(5):
            first, shift = torch.randn(2, *x.shape, generator=generator).bfloat16()
            predictions = [p.contiguous(memory_format=torch.channels_last) for p in (first, first + 0.5 * shift)]
            sample = guided_step(TABLE, index, sample, predictions, guidance, backend=backend, **adding)
            samples.append(sample)
        found[backend] = torch.stack(samples)
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-4, atol=1e-4)


@interpreted
def test_a_sample_may_have_more_than_2_to_the_31_elements():
    """Of which the last part's first one is found."""
    firsts = torch.zeros(1, dtype=torch.int64)
    kernel_of_first[(1,)](torch.tensor([2**19 + 1], dtype=torch.int32), firsts, PART)
    assert firsts.item() == (2**19 + 1) * PART > 2**31


@interpreted
def test_what_was_launched_is_what_was_compiled(monkeypatch):
    """By which a capture knows that it may be made: a compilation that failed is none, and other pointers need one."""
    monkeypatch.setattr(triton_moments, "_compiled", {})

    def failing(*arguments, **options):
        raise RuntimeError("a compilation")

    two, three = (arguments_of(GUIDANCES["with the sample"], (batch, PART + 24)) for batch in (2, 3))
    with monkeypatch.context() as broken:
        broken.setattr(triton_moments_kernel.moments_kernel, "run", failing)
        with pytest.raises(RuntimeError, match="a compilation"):
            STEP(*two)
    assert not triton_moments._compiled
    STEP(*two)
    (of_two,) = triton_moments._compiled
    STEP(*three)
    assert triton_moments._compiled.keys() == {of_two}  # of any batch
    apart = torch.zeros(3 * (PART + 24) + 1)[1:].view(3, -1)  # not at 16 bytes
    STEP(*three._replace(predictions=[three.predictions[0], apart.copy_(three.predictions[1])]))
    assert len(triton_moments._compiled) == 2


@interpreted
def test_a_kernel_that_was_compiled_is_launched_as_it_is(monkeypatch):
    """With all parameters in the order in which Triton's own call takes them, and before the step's, which is one."""
    launched = []

    class Compiled:
        def __getitem__(self, programs):
            return lambda *arguments: launched.append((programs, arguments))

    class Kernel:
        def __getitem__(self, programs):
            def compile_and_launch(*arguments, **options):
                launched.append((programs, arguments))
                return Compiled()

            return compile_and_launch

    monkeypatch.setattr(triton_moments, "_compiled", {})
    monkeypatch.setattr(triton_moments_kernel, "moments_kernel", Kernel())
    monkeypatch.setattr(triton_step, "_compile_and_launch", lambda programs, _: launched.append(programs))
    arguments = arguments_of(GUIDANCES["with the sample"], (2, PART + 24))
    arguments = arguments._replace(scratch=torch.zeros(scratch_numbers(3, 2, PART + 24), dtype=torch.float64))
    STEP(*arguments)
    STEP(*arguments)
    (programs, first), of_step, (again, second), of_step_again = launched
    assert programs == again == (2 * 2, 1, 1)
    assert of_step == of_step_again == 2 * -(-(PART + 24) // triton_step.BLOCK)
    parameters = [first, second]
    for each in parameters:
        assert [t.data_ptr() for t in each[0]] == [t.data_ptr() for t in (*arguments.predictions, arguments.sample)]
    assert all(one is other or one == other for one, other in zip(first[1:], second[1:], strict=True))


BAD = {
    "made": (lambda a: {"made": a.made[:, :1]}, r"made: expected float32 of shape \(2, 3 or one more\)"),
    "made's dtype": (lambda a: {"made": a.made.double()}, "made: expected float32"),
    "program": (lambda a: {"program": a.program.long()}, r"program: expected int32 of shape \(1 or 2, words\)"),
    "parameters": (
        lambda a: {"parameters": a.parameters.float()},
        r"parameters: expected float64 of shape \(10 or 1, ",
    ),
    "parameters of other samples": (
        lambda a: {"parameters": a.parameters.expand(1, 3, -1).contiguous()},
        "2 or 1, numb",
    ),
    "a program that ends early": (lambda a: {"program": a.program[:, :2].contiguous()}, "at least 3 words for 2 terms"),
    "one alone": (lambda a: {"made": None}, "program: expected program, parameters and made together"),
    "scratch": (lambda a: {"scratch": torch.zeros(3, dtype=torch.float64)}, "scratch: expected float64, contiguous"),
}


@interpreted
@pytest.mark.parametrize("name", BAD)
def test_direct_calls_are_refused(name):
    change, message = BAD[name]
    arguments = arguments_of(of_many(2), (2, 8))
    with pytest.raises(RuntimeError, match=message):
        STEP(*arguments._replace(**change(arguments)))


@interpreted
def test_the_memory_is_that_of_cuda_s_kernel():
    """Its counters are 0 again behind a step: another one finds them as the first did."""
    arguments = arguments_of(GUIDANCES["with the sample"], (2, PART + 10))
    scratch = torch.zeros(scratch_numbers(3, 2, PART + 10), dtype=torch.float64)
    _, made = expected_of(arguments)
    for _ in range(2):
        arguments.made.fill_(torch.nan)
        STEP(*arguments._replace(scratch=scratch))
        torch.testing.assert_close(arguments.made, made, rtol=1e-6, atol=1e-6)
        counters = scratch[2 * 2 * 9 :][:2].view(torch.int64)
        assert counters.tolist() == [0, 0]


# ---- Compiled ----

WIDE = {"two of 16 bits": 2 * 2, "a mixed four": 2 * 4 + 2 * 2, "a ragged three": 0}
"""Loads of 16 bytes of a thread's 16 elements, at least."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All compiled, in a process that does not interpret."""
    folder = tmp_path_factory.mktemp("triton-moments")
    script = Path(__file__).parents[2] / "support" / "compile_triton_moments.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[2])}
    run = subprocess.run([sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.xdist_group("triton code")
def test_machine_code(folder):
    """Everything in registers, wide loads, and no approximation."""
    cubins = sorted(folder.glob("*.cubin"))
    assert len(cubins) == len(WIDE)
    for cubin in cubins:
        ((_, _, used),) = resource_usage(cubin)
        assert used.registers <= 96
        assert used.stack == used.local == 0
        (counts,) = instructions(cubin).values()
        assert not any(each.startswith(("LDL", "STL")) for each in counts)
        wide = sum(n for each, n in counts.items() if re.match(r"LDG\.E(\.\w+)*\.128", each))
        assert wide >= WIDE[cubin.name.partition(".")[0]]
        assert not re.search(r"\.(approx|full)\b", cubin.with_suffix(".ptx").read_text())
    for code in folder.glob("*.amdgcn"):
        assert "scratch_store" not in code.read_text()
