"""Steps that go on from earlier calls: every backend against a loop in float64, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastguide import ROW_COLUMNS, ClassifierFree, Cursor, History, StepTable, guided_step
from tests.support.step_inputs import errors

CALLS, SCALE = 4, 3.0
NOT_DRAWN = (
    "clip",
    "in_scale",
    "in_timestep",
    "known_sample",
    "known_noise",
    "logvar_base",
    "logvar_span",
    "hist_slot",
    "quantile",
)
GRADIENT = ("x0_grad", "out_grad", "out_var_grad")


def drawn_table(generator, slots=3, reads=True):
    """Rows of any numbers: call k writes slot k modulo ``slots``, and reads what has been written."""
    columns = {
        name: torch.rand(CALLS, generator=generator, dtype=torch.float64) - 0.4
        for name in ROW_COLUMNS
        if name not in (*NOT_DRAWN, *GRADIENT)
    }
    columns["hist_slot"] = (torch.arange(CALLS) % slots).double()
    columns["hist_sample"][1] = 0.0
    for slot in range(3):
        columns[f"out_hist_{slot}"][: slot + 1 if reads and slot < slots else CALLS] = 0.0
    return StepTable.from_columns(torch.arange(CALLS - 1, -1, -1), columns, name="anything")


class Loop:
    """Inputs of a loop, drawn once, and the loop in plain torch."""

    def __init__(self, table, shape, generator, dtype=torch.float32, model=torch.float32):
        def draw(of=dtype):
            return torch.randn(shape, generator=generator).to(of)

        self.table, self.x = table, draw()
        self.predictions = [[draw(model), draw(model)] for _ in range(CALLS)]
        self.noise, self.anchors = [draw() for _ in range(CALLS)], [draw() for _ in range(CALLS)]

    def plain(self, dtype, anchored=False, stored=None):
        """Return the samples, originals and last entries; ``stored``: the dtype of samples between calls."""
        x, slots, outputs = self.x.to(dtype), {}, []
        for call in range(CALLS):
            row = {name: float(column[call]) for name, column in self.table.coefficients().items()}
            p0, p1 = (p.to(dtype) for p in self.predictions[call])
            m, z = p0 + SCALE * (p1 - p0), self.noise[call].to(dtype)
            x0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m)
            following = row["out_x0"] * x0 + row["out_sample"] * x + row["out_pred"] * m + row["out_noise"] * z
            following = following + row["out_anchor"] * (self.anchors[call].to(dtype) if anchored else x)
            for slot, entry in slots.items():
                following = following + row[f"out_hist_{slot}"] * entry
            slots[int(row["hist_slot"])] = row["hist_x0"] * x0 + row["hist_sample"] * x
            outputs += [following, x0 + row["x0_noise"] * z]
            x = following if stored is None else following.to(stored).to(dtype)
        return outputs, slots

    def fused(self, backend, anchored=False, in_place=False, seeds=None):
        """Return the same of ``guided_step``; the slots begin as NaN."""
        x, history, outputs = self.x.clone(), History(self.table, self.x), []
        history.entries.fill_(torch.nan)
        for call in range(CALLS):
            original = torch.empty_like(x, dtype=history.dtype)
            noise = {"noise": self.noise[call]} if seeds is None else {"seeds": seeds}
            following = guided_step(
                self.table,
                call,
                x,
                self.predictions[call],
                ClassifierFree(SCALE),
                history=history,
                anchor=self.anchors[call] if anchored else None,
                original=original,
                out=x if in_place else None,
                backend=backend,
                **noise,
            )
            outputs += [following.clone(), original]
            x = following
        return outputs, dict(enumerate(history.entries.unflatten(0, (-1, len(x))))) if history.slots else {}


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 3, 17, 19), (1, 4099), (3, 8)])
def test_float32_is_as_near_as_plain_torch(backend, shape, slots, anchored, generator):
    loop = Loop(drawn_table(generator, slots), shape, generator)
    truth, plain = loop.plain(torch.float64, anchored), loop.plain(torch.float32, anchored)
    got = loop.fused(backend, anchored, in_place=slots == 2)
    assert got[1].keys() == truth[1].keys()
    pairs = [*zip(got[0], plain[0], truth[0], strict=True)]
    pairs += [(got[1][slot], plain[1][slot], truth[1][slot]) for slot in truth[1]]
    for ours, theirs, exact in pairs:
        allowed = torch.finfo(torch.float32).eps * errors(exact, torch.zeros_like(exact))[0]
        assert errors(ours, exact)[0] <= max(2 * errors(theirs, exact)[0], allowed)


def test_float64_is_exact(generator):
    loop = Loop(drawn_table(generator), (2, 3, 5, 7), generator, torch.float64, torch.float64)
    truth = loop.plain(torch.float64, anchored=True)
    for backend in ("native", "reference"):
        got = loop.fused(backend, anchored=True)
        for ours, exact in zip(got[0], truth[0], strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)
        for slot, exact in truth[1].items():
            assert got[1][slot].dtype == torch.float64
            torch.testing.assert_close(got[1][slot], exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entries_are_float32_beside_16_bits(backend, dtype, generator):
    """The samples are rounded between calls, the entries are not."""
    loop = Loop(drawn_table(generator), (2, 5, 33), generator, dtype, dtype)
    truth = loop.plain(torch.float64, stored=dtype)
    got = loop.fused(backend)
    for slot, exact in truth[1].items():
        assert got[1][slot].dtype == torch.float32
        largest = exact.abs().max()
        assert (got[1][slot].double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * largest


def test_seeds_in_place_and_layouts_give_the_same(backend, generator):
    loop = Loop(drawn_table(generator), (2, 4, 9, 7), generator)
    seeds = torch.tensor([3, 4])
    expected, entries = loop.fused(backend, seeds=seeds)
    in_place, _ = loop.fused(backend, seeds=seeds, in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, in_place, strict=True))
    last = lambda t: t.contiguous(memory_format=torch.channels_last)  # noqa: E731
    loop.x, loop.predictions = last(loop.x), [[last(p) for p in pair] for pair in loop.predictions]
    got, other = loop.fused(backend, seeds=seeds)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(torch.equal(entries[slot], other[slot]) for slot in entries)


def test_samples_at_different_calls_have_slots_of_their_own(backend, generator):
    """A batch whose samples are at calls of their own is those samples one by one."""
    table = drawn_table(generator)
    x, first, second = torch.randn(3, 3, 40, generator=generator)
    noise, history = torch.randn(3, 40, generator=generator), History(table, x)
    history.entries.normal_(generator=generator)
    calls = torch.tensor([3, 0, 2])
    arguments = {"noise": noise, "backend": backend}
    before = history.entries.clone().unflatten(0, (3, 3))
    got = guided_step(table, calls, x, [first, second], ClassifierFree(SCALE), history=history, **arguments)
    after = history.entries.unflatten(0, (3, 3))
    for k, call in enumerate(calls.tolist()):
        one, part = History(table, x[k : k + 1]), slice(k, k + 1)
        one.entries.copy_(before[:, k])
        alone = guided_step(
            table, torch.tensor(call), x[part], [first[part], second[part]], ClassifierFree(SCALE), history=one,
            noise=noise[part], backend=backend,
        )  # fmt: skip
        assert torch.equal(got[part], alone)
        assert torch.equal(after[:, k], one.entries)


def test_a_cursor_turns_the_slots(backend, generator):
    table = drawn_table(generator)
    loop = Loop(table, (2, 24), generator)
    expected, entries = loop.fused(backend)
    x, cursor, history = loop.x.clone(), Cursor().start(table), History(table, loop.x)
    for call in range(CALLS):
        guided_step(
            table, cursor, x, loop.predictions[call], ClassifierFree(SCALE), history=history, noise=loop.noise[call],
            out=x, backend=backend,
        )  # fmt: skip
        assert torch.equal(x, expected[2 * call])
    assert torch.equal(history.entries.unflatten(0, (3, 2)), torch.stack(list(entries.values())))


def test_an_anchor_that_is_the_sample_changes_nothing(backend, generator):
    loop = Loop(drawn_table(generator), (2, 65), generator)
    expected, _ = loop.fused(backend)
    history, x = History(loop.table, loop.x), loop.x
    for call in range(CALLS):
        x = guided_step(
            loop.table, call, x, loop.predictions[call], ClassifierFree(SCALE), history=history, anchor=x,
            noise=loop.noise[call], backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(x, expected[2 * call], rtol=1e-5, atol=1e-6)


X = torch.zeros(2, 3, 4)
TABLE = drawn_table(torch.Generator().manual_seed(0))
PLAIN = StepTable.from_columns(torch.tensor([1, 0]), {"out_sample": torch.ones(2, dtype=torch.float64)})


def step(table=TABLE, index=0, sample=X, **arguments):
    arguments = {"noise": sample, "history": History(TABLE, X)} | arguments
    return guided_step(table, index, sample, [sample, sample], ClassifierFree(2.0), **arguments)


def out_of_order():
    history = History(TABLE, X)
    step(history=history)
    step(history=history, index=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: step(history=None), ValueError, "history: expected a History, as anything goes on from earlier calls"),
        (lambda: step(history=X), TypeError, "history: expected a History, got Tensor"),
        (lambda: step(history=History(PLAIN, X)), ValueError, "history: expected 3 slots for this anything, got 0"),
        (lambda: step(sample=X[:1]), ValueError, r"history: expected one for samples of shape \(1, 3, 4\)"),
        (lambda: step(sample=X.double()), TypeError, "history: expected torch.float64 for a sample of torch.float64"),
        (lambda: step(sample=X.to("meta"), table=TABLE.to("meta")), ValueError, "history: expected it on meta"),
        (lambda: step(index=1), ValueError, "index: expected 0, the call after the last one of this history, got 1"),
        (out_of_order, ValueError, "index: expected 1, the call after the last one of this history, got 2"),
        (lambda: step(anchor=torch.zeros(2, 3)), ValueError, r"anchor: expected shape \(2, 3, 4\), got \(2, 3\)"),
        (lambda: step(anchor=1.0), TypeError, "anchor: expected a tensor, got float"),
        (lambda: TABLE[1:], ValueError, "a slice from 1 on would lack; expected a table .* with begin=1"),
        (lambda: History("table", X), TypeError, "table: expected a StepTable, got str"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_history_shares_no_memory_with_other_tensors():
    history = History(TABLE, X)
    for name in ("out", "noise", "anchor", "original"):
        with pytest.raises(ValueError, match="history: expected memory apart from"):
            step(history=history, **{name: history.entries[:2]})


def test_a_slice_from_the_beginning_is_a_table():
    assert TABLE[:2].history_slots == 2


def test_slots_that_there_are_not_are_refused_in_a_table():
    with pytest.raises(ValueError, match="columns: expected -1 or a slot from 0 to 2 in 'hist_slot'"):
        StepTable.from_columns(torch.tensor([0]), {"hist_slot": torch.tensor([3.0], dtype=torch.float64)})


@pytest.mark.parametrize("written", ["out", "original", "a new tensor with the drawn noise"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x_0_gets_its_noise_where_an_output_is_that_noise(dtype, backend, written):
    columns = {"x0_scale": 1.0, "x0_pred": -0.5, "x0_sample": 0.75, "x0_noise": 0.6, "out_x0": 0.4, "out_noise": 0.3}
    columns = {name: torch.tensor([value], dtype=torch.float64) for name, value in columns.items()}
    table = StepTable.from_columns(torch.tensor([0]), columns, name="anything")
    x, p, z, original = torch.randn(4, 2, 700, generator=torch.Generator().manual_seed(5)).to(dtype)
    if written == "out":
        noise = {"noise": z.clone()}
        noise["out"] = noise["noise"]
    elif written == "original":
        noise = {"noise": z.clone()}
        original = noise["noise"]
    else:
        generator = torch.Generator().manual_seed(6)
        noise, z = (
            {"generator": torch.Generator().manual_seed(6)},
            torch.randn(x.shape, generator=generator, dtype=dtype),
        )
    following = guided_step(table, 0, x, p, original=original, **noise, backend=backend)
    x_0 = 0.75 * x - 0.5 * p
    torch.testing.assert_close(following, 0.4 * x_0 + 0.3 * z)
    torch.testing.assert_close(original, x_0 + 0.6 * z)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("predictions", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_alone_has_the_bits_of_one_with_more_to_do(backend, dtype, slots, predictions, in_place, generator):
    """With nothing but its history, the CPU makes a step in one pass; asked for x_0 too, in blocks."""
    if dtype == torch.float64 and ("triton" in backend or "cuda" in backend):
        pytest.skip("refuses float64")
    table = drawn_table(generator, slots)
    columns = {name: column.clone() for name, column in table.coefficients().items() if name != "x0_grad"}
    columns["out_noise"].zero_()
    columns["clip"].fill_(1.5)
    columns["hist_slot"][1] = -1  # a call that leaves nothing
    if slots > 1:
        columns["out_hist_1"].zero_()
    quiet = StepTable.from_columns(
        table.timesteps, {name: values for name, values in columns.items() if name not in GRADIENT}, name="quiet"
    )
    start = torch.randn(3, 5, 701, generator=generator).to(dtype).mT
    guidance = ClassifierFree(SCALE) if predictions == 2 else None
    found = []
    for more in (False, True):
        x, history = start.clone(), History(quiet, start)
        history.entries.fill_(torch.nan)
        drawn = torch.Generator().manual_seed(1)
        for call in range(CALLS):
            given = [torch.empty_like(start).normal_(generator=drawn) for _ in range(predictions)]
            original = torch.empty_like(x) if more else None
            out = x if in_place else torch.empty_like(x)
            x = guided_step(
                quiet, call, x, given, guidance, history=history, original=original, out=out, backend=backend
            )
        assert x.isfinite().all()
        found.append([x, history.entries])
    for alone, beside in zip(*found, strict=True):
        torch.testing.assert_close(alone, beside, rtol=0, atol=0, equal_nan=True)
