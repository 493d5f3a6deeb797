"""Machine code is parsed, each instruction has its effect, and what depends on unknown values is refused."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from benchmarks.machine_code import sass
from benchmarks.machine_code.estimate import GPUS, blocks, estimate
from benchmarks.machine_code.floats import rounded_up, sum_rounded_once
from benchmarks.machine_code.sass import Kernel, ParseError, operand
from benchmarks.machine_code.thread import WORD, CannotFollowError, Constants, Memory, Region, Thread
from benchmarks.machine_code.trace import execute, follow

WIDE = 2**64 - 1


def line(address, text):
    return f"        /*{address:04x}*/                   {text} ;    /* 0x000 */"


def kernel(*texts):
    return Kernel({16 * place: line(16 * place, text) for place, text in enumerate(texts)})


def thread(memory=None, parameters=b"", number=70):
    return Thread(Constants("sm_90", 8, 128, parameters), Memory(memory or []), 5, number)


def after(texts, **registers):
    """Execute lines, divided by ;, with registers that begin with these values; return the thread."""
    state = thread()
    for name, value in registers.items():
        if isinstance(value, bool):
            state.set_predicate(operand(name), value)
        else:
            state.write(operand(name), value & WORD)
    for text in texts.split(";"):
        state.begin()
        execute(state, sass.instruction(line(0, text.strip())))
    return state


def halves(value, low, high):
    return {low: value & WORD, high: value >> 32 & WORD}


def whole(state, name):
    return state.read_wide(operand(name))


@pytest.fixture
def draw():
    """Numbers of many lengths, and those at the ends."""
    source = random.Random(7)

    def number(bits=64):
        edges = [0, 1, 2**bits - 1, 2 ** (bits - 1), 2**31, 2**32 - 1]
        return source.choice([source.choice(edges), source.getrandbits(bits), source.getrandbits(bits // 2)]) % 2**bits

    number.source = source
    return number


# ---- Parsing ----


def test_a_line_is_parsed():
    i = sass.instruction(line(0x1F0, "@!P3 LDG.E.64 R4, desc[UR6][R2.64+0x8]"))
    assert (i.address, i.opcode, i.modifiers) == (0x1F0, "LDG", ("E", "64"))
    assert (i.guard.kind, i.guard.value, i.guard.signs) == ("P", 3, "!")
    register, memory = i.operands
    assert (register.kind, register.value) == ("R", 4)
    assert [(t.kind, t.value, t.suffix) for t in memory.terms] == [("R", 2, ".64"), ("integer", 8, "")]


@pytest.mark.parametrize(
    ("text", "kind", "value", "signs"),
    [
        ("R46.reuse", "R", 46, ""),
        ("-UR4", "UR", 4, "-"),
        ("~RZ", "R", sass.ZERO, "~"),
        ("|R3|", "R", 3, "|"),
        ("-|R3|", "R", 3, "-|"),
        ("!UPT", "UP", sass.ZERO, "!"),
        ("-0x7fffffff", "integer", -0x7FFFFFFF, ""),
        ("-c[0x0][0x28]", "constant", 0, "-"),
        ("c[0x2][UR4+0x18]", "constant", 2, ""),
        ("B12", "barrier", 12, ""),
    ],
)
def test_operands(text, kind, value, signs):
    found = operand(text)
    assert (found.kind, found.value, found.signs) == (kind, value, signs)


def test_floats_and_special_registers():
    assert [operand(text).number for text in ("1.5", "-2", "5.9604644775390625e-08", "+INF")] == [
        1.5,
        -2.0,
        2.0**-24,
        float("inf"),
    ]
    assert operand("SR_TID.X").name == "SR_TID.X"
    assert [t.value for t in operand("[R2+UR4+-0x10]").terms] == [2, 4, -16]
    with pytest.raises(ParseError, match="of unknown form: 'R2%'"):
        operand("R2%")


def test_a_listing_is_divided_into_functions():
    listing = f"\t\tFunction : first\n\t.headerflags\n{line(0, 'NOP')}\n    /* 0x1 */\n{line(16, 'EXIT')}\n"
    found = sass.parse(listing + f"\t\tFunction : second\n{line(0, 'EXIT')}\n")
    assert [list(lines) for lines in found.values()] == [[0, 16], [0]]
    assert list(found) == ["first", "second"]
    elf = ".section .nv.constant2.\n.nv.constant2.second\n0x000073d0 0x00000001\n0x00000002 \n\n.section .rela\n"
    assert sass.jump_tables(elf) == {"second": b"\xd0\x73\0\0\1\0\0\0\2\0\0\0"}


# ---- Integers ----


def test_sums_of_64_bits(draw):
    texts = "IADD3 R0, P0, R2, R4, RZ ; IADD3.X R1, R3, R5, RZ, P0, !PT"
    three = "IADD3 R0, P0, P1, R2, R4, -R6 ; IADD3.X R1, R3, R5, ~R7, P0, P1"
    product = "IADD3 R0, P0, R2, R4, RZ ; IMAD.X R1, R3, 0x1, R5, P0"
    difference = "IADD3 R0, P0, R2, -R4, RZ ; IADD3.X R1, R3, ~R5, RZ, P0, !PT"
    for _ in range(300):
        a, b, c = draw(), draw(), draw()
        registers = halves(a, "R2", "R3") | halves(b, "R4", "R5") | halves(c, "R6", "R7")
        assert whole(after(texts, **registers), "R0") == (a + b) & WIDE
        assert whole(after(product, **registers), "R0") == (a + b) & WIDE
        assert whole(after(difference, **registers), "R0") == (a - b) & WIDE
        assert whole(after(three, **registers), "R0") == (a + b - c) & WIDE


def test_products(draw):
    for _ in range(300):
        a, b, c = draw(32), draw(32), draw()
        registers = {"R2": a, "R3": b} | halves(c, "R4", "R5")
        sign = [v - 2**32 if v >> 31 else v for v in (a, b)]
        found = after(
            "IMAD R0, R2, R3, R4 ; IMAD.WIDE.U32 R6, P1, R2, R3, R4 ; IMAD.WIDE R8, R2, R3, R4 ;"
            "IMAD.HI.U32 R10, R2, R3, R4 ; IMAD.MOV R11, RZ, RZ, -R2 ; IMAD.IADD R12, R2, 0x1, -R3 ;"
            "IMAD.SHL.U32 R13, R2, 0x8, RZ ; VIADD R14, R2, 0xffffffe",
            **registers,
        )
        assert found.read(operand("R0")) == (a * b + c) & WORD
        assert whole(found, "R6") == (a * b + c) & WIDE
        assert found.predicate(operand("P1")) == (a * b + c > WIDE)
        assert whole(found, "R8") == (sign[0] * sign[1] + c) & WIDE
        assert found.read(operand("R10")) == (a * b + c) >> 32 & WORD
        wanted = [-a, a - b, 8 * a, a + 0xFFFFFFE]
        assert [found.read(operand(f"R{n}")) for n in range(11, 15)] == [value & WORD for value in wanted]


def test_addresses_and_shifts(draw):
    for _ in range(300):
        a, b, shift = draw(), draw(), draw.source.randrange(1, 32)
        registers = halves(a, "R2", "R3") | halves(b, "R4", "R5") | {"R6": shift}
        found = after(
            f"LEA R0, P0, R2, R4, {shift:#x} ; LEA.HI.X R1, R2, R5, R3, {shift:#x}, P0 ;"
            f"LEA.HI R8, R2, R4, R3, {shift:#x} ; LEA.HI.X.SX32 R9, R2, R5, {shift:#x}, P0 ;"
            "SHF.L.U64.HI R10, R2, R6, R3 ; SHF.R.U64 R11, R2, R6, R3 ; SHF.R.U32.HI R12, RZ, R6, R3 ;"
            "SHF.R.S32.HI R13, RZ, R6, R3 ; SHF.L.U32 R14, R2, R6, RZ",
            **registers,
        )
        low, high = a & WORD, a >> 32
        assert whole(found, "R0") == ((a << shift) + b) & WIDE
        assert found.read(operand("R8")) == ((a << shift >> 32) + b) & WORD
        carry = (low << shift & WORD) + (b & WORD) >> 32
        extended = low - 2**32 if low >> 31 else low
        assert found.read(operand("R9")) == ((extended << shift >> 32) + (b >> 32) + carry) & WORD
        signed_high = high - 2**32 if high >> 31 else high
        wanted = [a << shift >> 32, a >> shift, high >> shift, signed_high >> shift, low << shift]
        assert [found.read(operand(f"R{n}")) for n in range(10, 15)] == [value & WORD for value in wanted]


def test_shifts_end_at_the_size_of_what_is_shifted():
    registers = halves(0x8123456789ABCDEF, "R2", "R3") | {"R6": 40, "R7": 70}
    found = after(
        "SHF.R.U64 R8, R2, R6, R3 ; SHF.L.U64.HI R9, R2, R6, R3 ; SHF.R.U32.HI R10, RZ, R6, R3 ;"
        "SHF.L.U32 R11, R2, R6, RZ ; SHF.R.S32.HI R12, RZ, R6, R3 ; SHF.R.U64 R13, R2, R7, R3 ;"
        "SHF.L.W.U32 R14, R2, R6, RZ",
        **registers,
    )
    wanted = [0x812345, 0xABCDEF00, 0, 0, WORD, 0, 0xABCDEF00]
    assert [found.read(operand(f"R{n}")) for n in range(8, 15)] == wanted


@pytest.mark.parametrize("sign", ["", ".U32"])
@pytest.mark.parametrize("relation", ["LT", "LE", "GT", "GE", "EQ", "NE"])
def test_comparisons_of_64_bits(relation, sign, draw):
    """The low words are unsigned, and decide if the high words are equal."""
    texts = f"ISETP.{relation}.U32.AND P0, PT, R2, R4, PT ; ISETP.{relation}{sign}.AND.EX P1, P2, R3, R5, P3, P0"
    compare = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "EQ": int.__eq__}.get(relation)
    for _ in range(100):
        a, b, given = draw(), draw(), draw.source.random() < 0.8
        if draw.source.random() < 0.3:
            b = a & ~WORD | b & WORD
        found = after(texts, **halves(a, "R2", "R3"), **halves(b, "R4", "R5"), P3=given)
        numbers = (a, b) if sign else [v - 2**64 if v >> 63 else v for v in (a, b)]
        result = compare(*numbers) if compare else numbers[0] != numbers[1]
        assert found.predicate(operand("P1")) == (result and given)
        assert found.predicate(operand("P2")) == (not result and given)


DIVISION = """I2F.U32.RP R0, R7 ; MUFU.RCP R0, R0 ; VIADD R2, R0, 0xffffffe ; F2I.FTZ.U32.TRUNC.NTZ R3, R2 ;
    IMAD.MOV.U32 R2, RZ, RZ, RZ ; IMAD.MOV R4, RZ, RZ, -R3 ; IMAD R5, R4, R7, RZ ; IMAD.HI.U32 R3, R3, R5, R2 ;
    IMAD.HI.U32 R6, R3, R8, RZ ; IMAD.MOV R4, RZ, RZ, -R6 ; IMAD R0, R7, R4, R8 ; ISETP.GE.U32.AND P1, PT, R0, R7, PT ;
    @P1 IMAD.IADD R0, R0, 0x1, -R7 ; @P1 VIADD R6, R6, 0x1 ; ISETP.GE.U32.AND P2, PT, R0, R7, PT ;
    @P2 VIADD R6, R6, 0x1"""


def test_a_division_as_the_compiler_writes_it(draw):
    for _ in range(300):
        divisor, number = draw(32) or 3, draw(32)
        assert after(DIVISION, R7=divisor, R8=number).read(operand("R6")) == number // divisor


def test_bits_and_choices():
    found = after(
        "LOP3.LUT R0, R2, R3, R4, 0x6a, !PT ; LOP3.LUT P0, RZ, R2, 0xff, RZ, 0xc0, !PT ; SEL R1, R2, R3, !P0 ;"
        "LOP3.LUT R5, RZ, R2, RZ, 0x33, !PT ; PLOP3.LUT P1, P2, PT, P0, PT, 0x8, 0xf7 ; PRMT R6, R2, 0x7610, R3 ;"
        "PRMT R7, R2, 0xfd40, R3 ; P2R R8, PR, RZ, 0x3 ; VIMNMX R9, R2, R3, PT ; VIMNMX.U32 R10, R2, R3, PT ;"
        "VIMNMX R11, R2, R3, !PT ; IABS R12, R3 ; HFMA2.MMA R13, -RZ, RZ, 1.875, 5.9604644775390625e-08",
        R2=0x12345600,
        R3=0xFEDCBA98,
        R4=0x0F0F0F0F,
    )
    a, b, c = 0x12345600, 0xFEDCBA98, 0x0F0F0F0F
    signs_and_bytes = 0xFFFF9800  # the signs of bytes 7 and 5, byte 4, byte 0
    wanted = {0: c ^ (a & b), 1: a, 5: ~a & WORD, 6: 0xFEDC5600, 7: signs_and_bytes, 8: 0, 9: b, 10: a, 11: a}
    assert {n: found.read(operand(f"R{n}")) for n in wanted} == wanted
    assert found.read(operand("R12")) == 2**32 - b
    assert found.read(operand("R13")) == 0x3F800001
    assert not found.predicate(operand("P0"))
    assert (found.predicate(operand("P1")), found.predicate(operand("P2"))) == (False, True)


def test_what_lanes_exchange_is_known_of_oneself():
    """The thread is lane 6 of its warp."""
    found = after(
        "SHFL.IDX PT, R0, R2, R3, 0x1f ; SHFL.IDX PT, R1, R2, RZ, 0x1f ; VOTEU.ANY UP0, P0 ; VOTEU.ANY UP1, P1",
        R2=8,
        R3=6,
        P0=True,
        P1=False,
    )
    assert [found.read(operand(name)) for name in ("R0", "R1")] == [8, None]
    assert [found.predicate(operand(name)) for name in ("UP0", "UP1")] == [True, None]


def test_a_vote_of_the_block_is_that_of_its_thread():
    found = after(
        "BAR.RED.OR.DEFER_BLOCKING 0x0, P0 ; B2R.RESULT R0, P2 ; BAR.RED.OR.DEFER_BLOCKING 0x0, P1 ; B2R.RESULT RZ, P3",
        P0=True,
        P1=False,
    )
    assert [found.predicate(operand(name)) for name in ("P2", "P3")] == [True, False]
    assert found.read(operand("R0")) is None


def test_uniform_predicates_become_bits():
    found = after("UP2UR UR4, UPR, URZ, 0x3 ; UP2UR UR5, UPR, URZ, 0x2", UP0=True, UP1=False)
    assert [found.read(operand(name)) for name in ("UR4", "UR5")] == [1, 0]


# ---- Floats ----


def test_sums_are_rounded_once():
    source = random.Random(3)
    for _ in range(2000):
        a, b = (source.getrandbits(24) * 2.0 ** source.randrange(-40, 40) for _ in range(2))
        product = a * source.getrandbits(24) * source.choice((-1, 1))
        found, exact = sum_rounded_once(product, b), Fraction(product) + Fraction(b)
        others = [torch.tensor(found).nextafter(torch.tensor(end)).item() for end in (float("inf"), -float("inf"))]
        assert all(abs(Fraction(found) - exact) <= abs(Fraction(other) - exact) for other in others)
    assert sum_rounded_once(2.0**24 + 1, 2.0**-40) == 2**24 + 2  # a sum in double precision is a tie, to even
    assert [rounded_up(n) for n in (2**24, 2**24 + 1, 2**32 - 1)] == [2**24, 2**24 + 2, 2**32]


def test_floats():
    found = after(
        "I2FP.F32.U32 R0, R2 ; I2FP.F32.S32 R1, R2 ; FMUL R4, R1, -3 ; FADD R5, -R4, |R1| ; FFMA R6, R1, R1, 0.5 ;"
        "FSETP.GEU.AND P0, P1, R4, R1, PT ; FSEL R7, R1, R4, !P0 ; FMNMX R8, R1, R4, !PT ; FMUL.FTZ R9, R3, 1 ;"
        "FMUL.RZ R10, R1, 3 ; MUFU.SIN R11, R1 ; FSETP.NEU.AND P2, PT, R12, R12, PT ; F2I.U64.TRUNC R14, R0",
        R2=2**32 - 3,
        R3=1,
        R12=0x7FC00000,
    )
    values = [torch.tensor(v).view(torch.int32).item() & WORD for v in (2.0**32, -3.0, 9.0, -6.0, 9.5, 9.0, 9.0, 0.0)]
    assert [found.read(operand(f"R{n}")) for n in (0, 1, 4, 5, 6, 7, 8, 9)] == [*values[:5], values[2], *values[6:]]
    assert [found.predicate(operand(f"P{n}")) for n in range(3)] == [True, False, True]
    assert found.read(operand("R10")) is None
    assert found.read(operand("R11")) is None
    assert whole(found, "R14") == 2**32


# ---- What is not known ----


def test_unknown_values_spread_and_known_bits_stay():
    found = after(
        "IADD3 R0, R9, 0x1, RZ ; LOP3.LUT R1, R9, 0xff, RZ, 0xc0, !PT ; PRMT R2, R3, 0x7610, R9 ;"
        "LOP3.LUT P0, R4, R2, 0xff, RZ, 0xc0, !PT ; IMAD R5, R9, RZ, R3 ; ISETP.EQ.AND P1, PT, R9, RZ, !PT ;"
        "ISETP.EQ.OR P2, PT, R9, RZ, PT ; ISETP.EQ.AND P3, PT, R9, RZ, PT ; @P3 MOV R6, 0x1 ; SEL R7, R3, R3, P3",
        R3=0x1204,
        R6=1,
    )
    known = [found.read(operand(f"R{n}")) for n in range(8)]
    assert known == [None, None, None, 0x1204, 4, 0x1204, None, 0x1204]
    assert [found.predicate(operand(f"P{n}")) for n in range(4)] == [True, False, True, None]


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["ISETP.EQ.AND P0, PT, R9, RZ, PT", "@P0 BRA 0x30", "NOP", "EXIT"], "its guard depends on an unknown value"),
        (["FSETP.GT.AND P0, PT, R9, RZ, PT", "BRA P0, 0x30", "NOP", "EXIT"], "its condition depends on an unknown"),
        (["ISETP.EQ.AND P0, PT, R9, RZ, PT", "@P0 EXIT"], "its guard depends on an unknown value"),
        (["LDG.E R0, desc[UR6][R2.64]"], "its address is unknown"),
        (["CS2R R2, SRZ", "LDG.E R0, desc[UR6][R2.64]"], "4 bytes at 0x0 are in no tensor"),
        (["CS2R R2, SRZ", "STG.E.64 desc[UR6][R2.64+0x4], RZ"], "its address 0x4 is no multiple of 8"),
        (["UTMALDG R0"], "this opcode has no semantics"),
        (["BRA 0x0"], "and no end"),
        (["BRA.DIV UR4, 0x0"], "this kind of branch"),
    ],
)
def test_what_cannot_be_followed_is_refused(texts, why):
    with pytest.raises(CannotFollowError, match=why):
        follow(kernel(*texts), Constants("sm_90", 8, 128, b""), Memory([]), 5, 70)


def test_the_way_is_followed():
    """A loop, a call, convergence, a guarded exit and a switch."""
    found = follow(
        kernel(
            "S2R R0, SR_TID.X",
            "BSSY B0, 0x70",
            "IADD3 R0, R0, -0x17, RZ",
            "ISETP.GT.AND P0, PT, R0, RZ, PT",
            "@P0 BRA 0x20",
            "BSYNC B0",
            "NOP",
            "MOV R2, 0xa0",
            "MOV R3, 0x0",
            "CALL.REL.NOINC 0xc0",
            "@!P0 EXIT",
            "NOP",
            "RET.REL.NODEC R2 0x0",
        ),
        Constants("sm_90", 8, 128, b""),
        Memory([]),
        5,
        64,
    )
    loop = [0x20, 0x30, 0x40]
    assert list(found.path) == [0, 0x10, *3 * loop, 0x50, 0x70, 0x80, 0x90, 0xC0, 0xA0]
    switch = Kernel(
        {16 * n: line(16 * n, t) for n, t in enumerate(["LDC R2, c[0x2][0x4]", "BRX R2 -0x20", "NOP", "EXIT"])}
    )
    switch.jump_table = b"\x20\0\0\0\x30\0\0\0"
    assert follow(switch, Constants("sm_90", 8, 128, b""), Memory([]), 0, 0).path == (0, 0x10, 0x30)


def test_loads_before_the_first_use_are_in_flight():
    """Loads of other memory are read, and are no such use."""
    data, rows = torch.empty(64), torch.tensor([3, 5])
    regions = [Region("sample", data.data_ptr(), 256, True), Region("rows", rows.data_ptr(), 16, False)]
    parameters = b"".join(t.data_ptr().to_bytes(8, "little") for t in (data, rows))
    start = ["LDC.64 R2, c[0x0][0x210]", "LDC.64 R4, c[0x0][0x218]", "LDG.E.128 R8, desc[UR6][R2.64+0x10]"]
    rest = ["LDG.E R6, desc[UR6][R4.64+0x8]", "ISETP.EQ.AND P0, PT, R6, 0x5, PT", "LDG.E R12, desc[UR6][R2.64]"]
    rest += [
        "@!P0 EXIT",
        "FADD R14, R11, R6",
        "LDG.E R15, desc[UR6][R2.64+0x4]",
        "STG.E.64 desc[UR6][R2.64], R14",
        "EXIT",
    ]
    found = follow(kernel(*start, *rest), Constants("sm_90", 8, 128, parameters), Memory(regions), 0, 0)
    assert found.in_flight == 20
    assert found.instructions == 11
    assert [(a.region, a.address - data.data_ptr(), a.size) for a in found.loads if a.data] == [
        ("sample", 16, 16),
        ("sample", 0, 4),
        ("sample", 4, 4),
    ]
    assert [(a.region, a.size) for a in found.stores] == [("sample", 8)]


# ---- Estimates ----


def test_blocks_of_a_multiprocessor():
    """The registers of a warp are multiples of 256, and are all of one of four partitions."""
    assert [blocks(registers, 0, 128) for registers in (32, 62, 64, 65, 88, 95, 128, 255)] == [16, 8, 8, 7, 5, 5, 4, 2]
    assert (blocks(104, 0, 64), blocks(32, 64 * 1024, 128)) == (8, 3)


def test_the_longer_time_is_the_estimate():
    memory, issue = (estimate(GPUS[0], 3 * 10**9, warps, 926) for warps in (10**5, 2 * 10**6))
    assert (memory.bound, memory.time) == ("memory", 1000)
    assert memory.issue_share == pytest.approx(0.1, rel=1e-3)
    assert (issue.bound, issue.issue_share) == ("issue", 1)
    assert issue.time == pytest.approx(1998.5, rel=1e-3)
