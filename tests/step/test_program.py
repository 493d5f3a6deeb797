"""Steps that make their weights by a program: the kernels against the reference, and programs that are refused."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, ClassifierFree, PerpNeg, Perturbed, Tangential, as_guidance, guided_step
from fastguide.guidance.encoded import MOST_VALUES, decode, encode
from fastguide.step.backends import reference
from fastguide.step.backends.native import CAPABILITIES, cpu_capability, set_cpu_capability
from fastguide.step.operator import StepArguments

TABLE = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10)
GUIDANCES = {
    "rescaled": ClassifierFree(7.5, guidance_rescale=0.7),
    "projected": AdaptiveProjected(7.5, norm_threshold=3.0),
    "tangential": Tangential(7.5),
    "three predictions": Perturbed(7.5, guidance_rescale=0.7),
    "perpendicular": PerpNeg(8.0),
}
SHAPES = {
    "less than lanes": (3, 7),
    "one part": (3, 4, 6, 5),
    "whole parts": (2, 4, 64, 64),
    "a part and a rest": (2, 4, 41, 31),
    "fewer samples than threads": (1, 3, 200, 200),
}


@as_guidance(predictions=4)
def of_four(v, scale):
    first, *others = v.predictions
    total = first
    for each in others:
        total = total + scale * v.norm(each - first) / v.norm(first) * (each - first)
    return total


def arguments_of(guidance, shape, dtype=torch.float32, **changed):
    """The operator's arguments, as ``guided_step`` gives them on the CPU."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    count, arithmetic = guidance.num_predictions, torch.float64 if dtype == torch.float64 else torch.float32
    first = torch.randn(shape, generator=generator, dtype=torch.float64)
    given = [first + 0.2 * k * torch.randn(shape, generator=generator, dtype=torch.float64) for k in range(count)]
    x = torch.randn(shape, generator=generator, dtype=arithmetic)
    program, parameters = guidance.weights_from.on(x.device)
    made = torch.zeros(shape[0], count + 1, dtype=arithmetic)
    arguments = StepArguments(
        out=torch.zeros_like(x), original=None, staged=None, sample=x, predictions=[p.to(dtype) for p in given],
        rows=TABLE.device_rows(None, arithmetic), weights=guidance.weights(x.device, arithmetic), index=3,
        indices=None, gradient=None, variance=None, noise=None, program=program, parameters=parameters, made=made,
    )  # fmt: skip
    return arguments._replace(**changed)


def run(arguments, step=torch.ops.fastguide.guided_step):
    arguments = arguments._replace(out=arguments.out.clone(), made=arguments.made.clone())
    step(*arguments)
    return arguments.out, arguments.made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_weights_are_the_reference_s(guidance, shape, dtype):
    arguments = arguments_of(guidance, shape, dtype)
    out, made = run(arguments)
    expected_out, expected_made = run(arguments, reference.guided_step)
    bound = 1e-13 if dtype == torch.float64 else 2e-7
    assert (made - expected_made).abs().max() <= bound * expected_made.abs().max()
    assert (out - expected_out).norm() <= 4 * bound * expected_out.norm()


def test_many_predictions():
    arguments = arguments_of(of_four(0.5), (2, 3, 33, 31))
    out, made = run(arguments)
    expected_out, expected_made = run(arguments, reference.guided_step)
    torch.testing.assert_close(made, expected_made, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mean", [0, 30], ids=["zero mean", "large mean"])  # whose sums are made again in double
@pytest.mark.parametrize("guidance", ["rescaled", "three predictions"])
def test_bits_depend_on_nothing_but_the_sample(guidance, mean):
    """Neither on the batch, nor on threads, nor on how the predictions come."""
    arguments = arguments_of(GUIDANCES[guidance], (3, 3, 200, 200))
    arguments = arguments._replace(predictions=[mean + each for each in arguments.predictions])
    out, made = run(arguments)
    alone = arguments._replace(
        sample=arguments.sample[1:2], predictions=[each[1:2] for each in arguments.predictions],
        out=arguments.out[1:2], made=arguments.made[1:2],
    )  # fmt: skip
    stacked = arguments._replace(predictions=[torch.cat(arguments.predictions)])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for each, samples in ((arguments, slice(None)), (alone, slice(1, 2)), (stacked, slice(None))):
                got_out, got_made = run(each)
                assert torch.equal(got_out, out[samples])
                assert torch.equal(got_made, made[samples])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 41, 31), (2, 3, 78, 79)], ids=["a part and a rest", "four parts and a rest"])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_weights_are_the_same_with_every_instruction_set(guidance, shape, dtype):
    """However many parts of a sample are added up at a time."""
    arguments = arguments_of(guidance, shape, dtype)
    best, made = cpu_capability(), run(arguments)[1]
    try:
        for capability in CAPABILITIES:
            chosen = set_cpu_capability(capability)
            got = run(arguments)[1]
            if chosen == "baseline":  # which rounds products before they are added
                torch.testing.assert_close(got, made, rtol=1e-6, atol=0)
            elif best != "baseline":
                assert torch.equal(got, made), capability
    finally:
        set_cpu_capability(best)


def test_each_sample_may_have_a_program():
    rescaled, tangential = GUIDANCES["rescaled"].weights_from, GUIDANCES["tangential"].weights_from
    made_by = [rescaled, tangential, rescaled]
    words, parameters = zip(*[each.on(torch.device("cpu")) for each in made_by], strict=True)
    longest, most = max(each.shape[1] for each in words), max(each.shape[2] for each in parameters)
    assert words[0].shape != words[1].shape
    assert parameters[0].shape != parameters[1].shape
    program = torch.cat([torch.nn.functional.pad(each, (0, longest - each.shape[1])) for each in words])
    # Programs that share a row of values: results come behind the longest parameters.
    programs = [decode(each[0].tolist(), 2, table.shape[2]) for each, table in zip(words, parameters, strict=True)]
    encoded = [encode(each, [f"parameter_{k}" for k in range(most)]).words for each in programs]
    program = torch.tensor([[*each, *[0] * (longest - len(each))] for each in encoded], dtype=torch.int32)
    table = torch.cat([torch.nn.functional.pad(each, (0, most - each.shape[2])) for each in parameters], 1)
    arguments = arguments_of(GUIDANCES["rescaled"], (3, 4, 6, 5), program=program, parameters=table.contiguous())
    for step in (torch.ops.fastguide.guided_step, reference.guided_step):
        out, made = run(arguments, step)
        for sample, name in enumerate(("rescaled", "tangential", "rescaled")):
            expected = run(arguments_of(GUIDANCES[name], (3, 4, 6, 5)), step)
            assert torch.equal(out[sample], expected[0][sample])
            assert torch.equal(made[sample], expected[1][sample])


@pytest.mark.parametrize("indices", [torch.tensor(4), torch.tensor([4, 0, 7])])
def test_parameters_of_each_step(indices):
    scales = torch.linspace(1.0, 9.0, 30).view(10, 3)
    guidance = ClassifierFree(scales, guidance_rescale=0.5)
    out, made = run(arguments_of(guidance, (3, 4, 6, 5), indices=indices))
    for sample, step in enumerate(indices.expand(3).tolist()):
        alone = ClassifierFree(scales[step].tolist(), guidance_rescale=0.5)
        expected = run(arguments_of(alone, (3, 4, 6, 5), index=step))
        assert torch.equal(out[sample], expected[0][sample])
        assert torch.equal(made[sample], expected[1][sample])


def test_opcheck():
    for guidance in GUIDANCES.values():
        arguments = arguments_of(guidance, (2, 4, 6, 5))
        torch.library.opcheck(
            torch.ops.fastguide.guided_step.default, tuple(arguments),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


def test_a_compiled_step_is_the_step():
    guidance = GUIDANCES["rescaled"]
    arguments = arguments_of(guidance, (2, 4, 6, 5))
    with torch.no_grad():
        expected = guided_step(TABLE, 3, arguments.sample, arguments.predictions, guidance)
        compiled = torch.compile(lambda x, p: guided_step(TABLE, 3, x, p, guidance), fullgraph=True)
        for _ in range(2):
            assert torch.equal(compiled(arguments.sample, arguments.predictions), expected)
    assert torch.equal(expected, run(arguments)[0])


def test_a_repeated_step_makes_its_weights(monkeypatch):
    guidance, other = ClassifierFree(3.0, guidance_rescale=0.7), ClassifierFree(3.0, guidance_rescale=0.7)
    cases = [arguments_of(guidance, shape) for shape in ((2, 4, 6, 5), (3, 4, 6, 5))]
    expected = [
        guided_step(TABLE, 3, each.sample, each.predictions, other, backend="reference") for each in cases
    ]  # fmt: skip
    for _ in range(2):
        for each in cases:
            guided_step(TABLE, 3, each.sample, each.predictions, guidance)
    monkeypatch.setattr("fastguide.step.guided_step.checks.validate", None)
    for each, wanted in zip(cases, expected, strict=True):
        torch.testing.assert_close(guided_step(TABLE, 3, each.sample, each.predictions, guidance), wanted)
        assert guidance.last_weights.shape == (1, len(each.sample), 3)
        assert torch.equal(guidance.last_weights[0], run(arguments_of(guidance, each.sample.shape))[1])


# ---- What is refused ----

WORDS = torch.tensor([[1, 0, 10, 2, 0, 1, 0]], dtype=torch.int32)  # w0 = <u, u>, w1 = the product of two moments
REFUSED = {
    "an operation that is none": (WORDS, 3, 9, "expected operations of earlier values, got another in instruction 0"),
    "an operand that is made later": (WORDS, 5, 10, "expected operations of earlier values"),
    "a negative place": (WORDS, 4, -1, "expected operations of earlier values"),
    "a weight beyond the values": (WORDS, 1, 11, "expected weights that are among its values"),
    "more instructions than words": (WORDS, 0, 2, "and the words of all instructions"),
    "more instructions than values": (WORDS, 0, 10**6, f"at most {MOST_VALUES} values"),
}


def direct(shape=(2, 8), dtype=torch.float32, **changed):
    tables = {"program": WORDS, "parameters": torch.zeros(1, 1, 0, dtype=torch.float64)}
    return arguments_of(GUIDANCES["rescaled"], shape, dtype, **(tables | changed))


def test_a_program_of_a_few_words():
    arguments = direct()
    uncond, cond = (each.double() for each in arguments.predictions)
    made = run(arguments)[1]
    squares = (uncond * uncond).sum(1)
    torch.testing.assert_close(made[:, 0].double(), squares, rtol=1e-6, atol=0)
    torch.testing.assert_close(made[:, 1].double(), squares * (uncond * (cond - uncond)).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_of_terms_that_a_program_reads_leave_its_products_alone(shape, dtype):
    """As those that it does not read are not added up."""
    alone = WORDS.clone()
    alone[0, 4] = 1  # <u, u> <u, d>, with no sum among them
    beside = torch.cat([alone, torch.tensor([[2, 3, 4, 0]], dtype=torch.int32)], 1)  # and the two sums' product
    beside[0, 0] = 2
    got, expected = (run(direct(shape, dtype, program=words))[1] for words in (beside, alone))
    assert torch.equal(got, expected)
    beside[0, 1] = 11  # the weight is that product
    terms = [each.double().flatten(1) for each in direct(shape, dtype).predictions]
    sums = terms[0].sum(1) * (terms[1] - terms[0]).sum(1)
    scale = terms[0].abs().sum(1) * (terms[1] - terms[0]).abs().sum(1)
    error = run(direct(shape, dtype, program=beside))[1][:, 0].double() - sums
    assert (error.abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("name", REFUSED)
def test_words_that_lead_nowhere_are_refused(name):
    words, place, value, message = REFUSED[name]
    words = words.clone()
    words[0, place] = value
    with pytest.raises(RuntimeError, match=message):
        run(direct(program=words))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"made": None}, "program: expected program, parameters and made together"),
        ({"program": WORDS.long()}, "program: expected int32 of shape"),
        ({"program": WORDS[0]}, "program: expected int32 of shape"),
        ({"program": WORDS[:, :2]}, "the words of all instructions"),
        ({"parameters": torch.zeros(1, 3, 0, dtype=torch.float64)}, r"expected float64 of shape \(10 or 1, 2"),
        ({"parameters": torch.zeros(1, 1, 0)}, "parameters: expected float64"),
        ({"made": torch.zeros(2, 2)}, r"made: expected the dtype of rows, shape \(2 or times what divides"),
        ({"made": torch.zeros(2, 3, dtype=torch.float64)}, "made: expected the dtype of rows"),
    ],
)  # fmt: skip
def test_tables_of_other_forms_are_refused(changed, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastguide.guided_step(*direct(**changed))


def test_a_function_too_large_for_the_kernels_is_refused():
    @as_guidance(predictions=2)
    def long(v, scale):
        uncond, cond = v.predictions
        for _ in range(MOST_VALUES):
            scale = v.sqrt(scale + 1.0)
        return uncond + scale * (cond - uncond)

    with pytest.raises(ValueError, match=f"expected a function of at most {MOST_VALUES} values"):
        long(2.0)
    with pytest.raises(ValueError, match="predictions: expected at most 4 to make weights from, got 5"):
        as_guidance(predictions=5)(lambda v: v.predictions[0])()
