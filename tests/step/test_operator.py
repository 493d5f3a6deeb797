"""The torch operator: opcheck, fake tensors, torch.compile without a break and without recompiling."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide.guidance.weights import UNGUIDED
from tests.support.cases import SHAPES, TABLES
from tests.support.step_inputs import guided_step, make_guidance, make_inputs

op = torch.ops.fastguide.guided_step.default
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


PLACE = {a.name: k for k, a in enumerate(op._schema.arguments)}


def operator_arguments(
    name,
    shape,
    generator,
    *,
    count=2,
    form=None,
    original=True,
    dtype=torch.float32,
    indices=None,
    copies=0,
    seeds=None,
):
    table = TABLES[name]
    i = make_inputs(table, shape, generator, count=count, gradient=form is not None, dtype=dtype)
    guidance = make_guidance(count, form) or UNGUIDED
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(i.sample),
        torch.empty_like(i.sample) if original else None,
        torch.empty(copies * shape[0], *shape[1:], dtype=torch.bfloat16) if copies else None,
        i.sample,
        i.predictions,
        table.device_rows(form, arithmetic),
        guidance.weights(i.sample.device, arithmetic),
        3,
        indices,
        i.gradient,
        i.variance,
        i.noise if seeds is None else None,
        seeds,
        None,
        0,
    )


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_over_tables_and_dtypes(name, dtype, generator):
    arguments = operator_arguments(name, (2, 3, 5), generator, form="epsilon", dtype=dtype)
    torch.library.opcheck(op, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize(("shape", "branch"), SHAPES[:5], ids=[branch for _, branch in SHAPES[:5]])
def test_opcheck_over_shapes(shape, branch, generator):
    arguments = operator_arguments("ddpm", shape, generator, count=1, original=False)
    torch.library.opcheck(op, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("indices", [torch.tensor(4), torch.tensor([4, 0])])
def test_opcheck_over_indices_and_many_predictions(indices, generator):
    arguments = operator_arguments("ddim", (2, 3, 5), generator, count=4, indices=indices)
    torch.library.opcheck(op, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("seeds", [torch.tensor(-4), torch.tensor([4, 2**62])])
@pytest.mark.parametrize("indices", [None, torch.tensor(4), torch.tensor([4, 0])])
def test_opcheck_over_seeds(seeds, indices, generator):
    arguments = operator_arguments("ddpm learned", (2, 3, 5), generator, indices=indices, seeds=seeds)
    torch.library.opcheck(op, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("seeds", [None, torch.tensor([4, 5])])
def test_opcheck_over_staged_inputs(copies, seeds, generator):
    """The operator writes to up to three tensors, each in its dtype."""
    arguments = operator_arguments("ddpm", (2, 3, 5), generator, count=1, copies=copies, seeds=seeds)
    torch.library.opcheck(op, arguments, test_utils=OPCHECKS)


def test_meta_tensors_pass_through_the_public_function():
    table = TABLES["ddpm"].to("meta")
    x, seeds = torch.empty(2, 3, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    out, original = guided_step(table, 0, x, [x], seeds=seeds, return_original=True)
    assert out.shape == original.shape == x.shape
    assert out.device.type == "meta"


class Counter:
    """A torch.compile backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_backend", ["native", "reference"])
@pytest.mark.parametrize("name", TABLES)
def test_compile_is_one_graph_for_all_steps(name, compiled_backend, counter, generator):
    """With a tensor index: fullgraph, one graph in all, and the results of eager."""
    table = TABLES[name]
    guidance = make_guidance(2, "epsilon")

    def step(index, x, uncond, cond, g, v, z):
        return guided_step(
            table,
            index,
            x,
            [uncond, cond],
            guidance,
            gradient=g,
            variance=v,
            noise=z,
            return_original=True,
            backend=compiled_backend,
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for index in range(len(table)):
        i = make_inputs(table, (2, 3, 8, 8), generator, gradient=True)
        arguments = (torch.tensor(index), i.sample, *i.predictions, i.gradient, i.variance, i.noise)
        for got, expected in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, expected)
    assert len(counter.graphs) == 1


@pytest.mark.parametrize("layout", ["channels last", "transposed"])
def test_compile_of_any_size_and_layout_is_one_graph(layout, counter, generator):
    """Sizes and strides are symbols then."""
    table, guidance = TABLES["ddim"], make_guidance(2, None)
    place = {
        "channels last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(1, 3),
    }[layout]

    def step(x, uncond, cond):
        return guided_step(table, 2, x, [uncond, cond], guidance)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 5, 8, 6), (4, 7, 10, 12), (9, 2, 7, 11)):  # torch takes sizes for one that are equal at first
        arguments = [place(torch.randn(shape, generator=generator)) for _ in range(3)]
        got, expected = compiled(*arguments), step(*arguments)
        assert got.stride() == expected.stride()
        assert torch.equal(got, expected)
    assert len(counter.graphs) == 1


@pytest.mark.parametrize("compiled_backend", ["native", "reference"])
def test_compile_with_seeds_and_staged_inputs_is_one_graph(compiled_backend, counter, generator):
    """Noise from seeds needs no generator, which torch.compile would not take."""
    table, seeds = TABLES["ddpm"], torch.tensor([7, -8])

    def step(index, x, prediction, seeds):
        staged = x.new_zeros(4, 3, 40)
        out = guided_step(table, index, x, [prediction], seeds=seeds, staged=staged, backend=compiled_backend)
        return out, staged

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for index in [*range(len(table)), [2, 9]]:
        i = make_inputs(table, (2, 3, 40), generator, count=1)
        arguments = (torch.tensor(index), i.sample, *i.predictions, seeds)
        for got, expected in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, expected)
    assert len(counter.graphs) == 2  # of an index for all, and of one for each sample


def test_inductor_runs_a_step_with_seeds(generator):
    """The real compiler; the portable stream's bits survive it, as the operator is a kernel of its own there."""
    torch._dynamo.reset()
    table, seeds = TABLES["ddpm"], torch.tensor([7, -8])

    def step(index, x, prediction, seeds):
        staged = x.new_zeros(4, 3, 40)
        return guided_step(table, index, x * 1, [prediction], seeds=seeds, staged=staged) + 1, staged

    i = make_inputs(table, (2, 3, 40), generator, count=1)
    arguments = (torch.tensor(3), i.sample, *i.predictions, seeds)
    for got, expected in zip(torch.compile(step, fullgraph=True)(*arguments), step(*arguments), strict=True):
        assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_compiled_loop_over_int_indices_is_one_graph(counter, generator):
    table = TABLES["ddim"]
    guidance = fastguide.ClassifierFree(3.0)

    def loop(x):
        for index in range(len(table)):
            x = guided_step(table, index, x, [0.1 * x, 0.2 * x], guidance)
        return x

    compiled = torch.compile(loop, fullgraph=True, backend=counter)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    torch.testing.assert_close(compiled(x), loop(x))
    compiled(x + 1)
    assert len(counter.graphs) == 1


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_int_index_as_an_argument_stops_recompiling(name, counter, generator):
    """Dynamo specialises on 0 and 1, as on every int, and then takes any int."""
    table = TABLES[name]
    x = torch.randn(2, 3, generator=generator)

    def step(index, x, z):
        return guided_step(table, index, x, [x], noise=z)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for index in range(len(table)):
        assert torch.equal(compiled(index, x, x), step(index, x, x))
    assert len(counter.graphs) <= 3


@pytest.mark.parametrize(
    "source",
    [torch.default_generator, fastguide.DeviceGenerator(1, device="cpu")],
    ids=["torch's generator", "a generator on the device"],
)
def test_generators_are_refused_with_words_under_compile(counter, source):
    table = TABLES["ddpm"]
    x = torch.randn(2, 3)

    def step(x):
        return guided_step(table, 0, x, [x], generator=source)

    with pytest.raises(Exception, match=r"generator: torch\.compile takes none; expected noise="):
        torch.compile(step, fullgraph=True, backend=counter)(x)


@pytest.mark.parametrize("index", [-1, 10])
def test_compiled_reference_refuses_an_index_outside_the_table(index):
    """Compiled, nobody looks at the value beforehand: the generated code's own check stops it, below zero too."""
    torch._dynamo.reset()
    table, x = TABLES["ddim"], torch.randn(2, 3)

    def step(index, x):
        return guided_step(table, index, x, [x], backend="reference")

    with pytest.raises((RuntimeError, IndexError), match="index out of"):
        torch.compile(step, fullgraph=True)(torch.tensor(index), x)
    torch._dynamo.reset()


def test_inductor_runs_the_operator(generator):
    """The real compiler, out= included: functionalised, and written in place again."""
    torch._dynamo.reset()
    table = TABLES["ddim"]
    guidance = fastguide.ClassifierFree(3.0)

    def step(index, x, uncond, cond):
        out = torch.empty_like(x)
        guided_step(table, index, x * 1, [uncond, cond], guidance, out=out)
        return out + 1

    i = make_inputs(table, (2, 3, 8, 8), generator)
    arguments = (torch.tensor(3), i.sample, *i.predictions)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*arguments), step(*arguments))
    torch._dynamo.reset()


def test_operator_runs_in_inference_mode_and_under_no_grad(generator):
    table = TABLES["ddim"]
    i = make_inputs(table, (2, 3), generator, count=1)
    expected = guided_step(table, 0, i.sample, i.predictions)
    with torch.inference_mode():
        assert torch.equal(guided_step(table, 0, i.sample, i.predictions), expected)
    with torch.no_grad():
        requiring = i.sample.clone().requires_grad_(True)
        assert torch.equal(guided_step(table, 0, requiring, i.predictions), expected)


def test_default_implementation_serves_devices_without_a_backend(generator):
    """The operator itself falls back on the reference: CompositeExplicitAutograd, seen through a CPU-less key."""
    kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key("fastguide::guided_step", "CUDA")
    assert kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(2, 3, 4)}, "sample: expected size 4 in dimension 2, got 5"),
        ({"sample": torch.empty(2, 3)}, "sample: expected 3 dimensions, got 2"),
        ({"sample": torch.empty(3, 3, 5)}, "sample: expected size 2 in dimension 0, got 3"),
        ({"sample": torch.empty(2, 5, 3).transpose(1, 2)}, "sample: expected out's layout"),
        ({"out": torch.empty(2, 3, 10)[..., ::2]}, "out: expected it dense within a sample"),
        ({"out": torch.empty(1, 3, 5).expand(2, 3, 5)}, "out: expected samples that do not overlap"),
        ({"sample": torch.empty(2, 3, 5, dtype=torch.int32)}, "sample: expected float32, bfloat16, float16 or float64"),
        ({"predictions": [torch.empty(2, 3, 5)] * 3}, "weights: expected 4 columns for 3 predictions, got 3"),
        ({"rows": torch.empty(10, 5)}, r"rows: expected shape \(steps, 26\)"),
        ({"rows": torch.empty(10, 26, dtype=torch.float64)}, "rows, weights: expected both float32 or both float64"),
        ({"weights": torch.empty(3, 1, 3)}, r"weights: expected shape \(10 or 1, 2 or 1"),
        ({"index": 10}, "index: expected values from 0 to 9, got 10"),
        ({"index": -1}, "index: expected values from 0 to 9, got -1"),
        ({"indices": torch.tensor([0, 10])}, "index: expected values from 0 to 9, got 10"),
        ({"indices": torch.tensor([0, 1, 2])}, r"index: expected int64 of shape \(\) or \(2,\)"),
        ({"indices": torch.tensor(1.0)}, "index: expected int64"),
        (
            {"noise": torch.empty(2, 3, 5), "seeds": torch.tensor(1)},
            "noise: expected at most one of noise, seeds and philox",
        ),
        ({"seeds": torch.tensor(1.0)}, r"seeds: expected int64 of shape \(\) or \(2,\)"),
        ({"seeds": torch.tensor([1, 2, 3])}, r"seeds: expected int64 of shape \(\) or \(2,\)"),
        ({"seeds": torch.tensor([[1], [2]])}, r"seeds: expected int64 of shape \(\) or \(2,\)"),
        (
            {name: torch.empty(2, 4, 3, 5).transpose(1, 2) for name in ("out", "sample")}
            | {"predictions": [torch.empty(2, 4, 3, 5).transpose(1, 2)] * 2, "seeds": torch.tensor(1)},
            "seeds, philox: expected a sample that is contiguous or channels_last",
        ),
        ({"philox": torch.tensor([1, 0]), "philox_threads": 256}, "philox: torch's CUDA stream is drawn on a GPU"),
        ({"history": torch.empty(3, 3, 5)}, "history: expected a multiple of 2 samples, got 3"),
        ({"history": torch.empty(8, 3, 5)}, "history: expected at most 3 slots, got 4"),
        ({"history": torch.empty(4, 3, 5, dtype=torch.bfloat16)}, "history: expected the dtype of rows"),
        ({"history": torch.empty(4, 3, 6)}, "history: expected size 5 in dimension 2, got 6"),
        ({"anchor": torch.empty(2, 3, 6)}, "anchor: expected size 5 in dimension 2, got 6"),
        ({"staged": torch.empty(3, 3, 5)}, "staged: expected a multiple of 2 samples, got 3"),
        ({"staged": torch.empty(0, 3, 5)}, "staged: expected a multiple of 2 samples, got 0"),
        ({"staged": torch.empty(())}, "staged: expected a multiple of 2 samples, got 0"),
        ({"staged": torch.empty(4, 3, 6)}, "staged: expected size 5 in dimension 2, got 6"),
        ({"staged": torch.empty(4, 15)}, "staged: expected 3 dimensions, got 2"),
        ({"staged": torch.empty(4, 5, 3).mT}, "staged: expected out's layout"),
        ({"staged": torch.empty(1, 3, 5).expand(4, 3, 5)}, "staged: expected samples that do not overlap"),
        ({"staged": torch.empty(4, 3, 5, dtype=torch.int32)}, "staged: expected float32, bfloat16, float16 or float64"),
    ],
)
def test_direct_calls_cannot_leave_their_memory(change, message, generator):
    arguments = list(operator_arguments("ddim", (2, 3, 5), generator, original=False))
    arguments += [None] * (len(PLACE) - len(arguments))
    for name, value in change.items():
        arguments[PLACE[name]] = value
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


@pytest.mark.parametrize("name", ["out", "original", "sample", "predictions", "gradient", "variance", "noise"])
def test_direct_calls_cannot_stage_over_another_argument(name, generator):
    memory = torch.full((75,), 3.0)
    other, staged = memory[:30].view(2, 3, 5), memory[29:59].view(2, 3, 5)
    arguments = list(operator_arguments("ddpm learned", (2, 3, 5), generator, form="epsilon"))
    arguments[PLACE[name]] = [arguments[PLACE[name]][0], other] if name == "predictions" else other
    arguments[PLACE["staged"]] = staged
    with pytest.raises(RuntimeError, match=f"staged: expected memory apart from {name}"):
        op(*arguments)
    assert (memory == 3.0).all()
