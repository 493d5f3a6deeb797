"""Faults to plant in a kernel's PTX, each with a case whose comparison must find it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from tests.support.ptx.cases import Case

CURSOR = Case(3, 1029, "portable", cursor="one", timestep="int64", stride=1029, seed=1)
RAGGED = Case(3, 1029, "given", 2, offset=3, stride=1032, in_place=False)  # elements before and behind the vectors
VECTORS = Case(2, 2048, "given", 2, original=True, stride=2048, in_place=False)
BFLOAT16 = Case(2, 2048, "given", 2, dtype=torch.bfloat16, stride=2048)
PORTABLE = Case(2, 1029, "portable", 1, stride=1032)
TORCH = Case(2, 4096, "torch", 1, stride=4096)
TORCH_STATE = Case(2, 4096, "torch", 1, state=True, stride=4096)
TORCH_SINGLE = Case(3, 1021, "torch", 1, stride=1021)


@dataclass(frozen=True)
class Fault:
    """A change of PTX: a pattern, and what to put in the place of its occurrences, or of the first ``count``.

    ``otherwise`` is another such pair, for code in which there is nothing of the first pattern.
    """

    what: str
    case: Case
    pattern: str
    replacement: str
    count: int = 0
    found: str = ""  # a part of the description that the comparison gives
    otherwise: tuple[str, str] | None = None

    def change(self, text: str) -> str:
        """Plant the fault.

        Raises:
            ValueError: The text has nothing of the kind: the fault has to be written anew.
        """
        for pattern, replacement in filter(None, ((self.pattern, self.replacement), self.otherwise)):
            changed = re.sub(pattern, replacement, text, count=self.count)
            if changed != text:
                return changed
        raise ValueError(f"{self.what}: the PTX has no {self.pattern!r}")


FENCE = r"membar\.gl;|fence\.(?:acq_rel|sc)\.gpu;"
RELEASE, ACQUIRE = (rf"(?:{FENCE}|\.(?:acq_rel|{order})(?=\.gpu))" for order in ("release", "acquire"))
LOAD, STORE = r"(ld\.global\S*\.v4\.\w+ [^;]*\[%rd\d+)\+16\]", r"(st\.global\S*\.v4\.\w+ \[%rd\d+)\+16\]"
LAST_LANE = r"(shfl\.sync\.idx\.b32 [^,]*, [^,]*), [^,]*"

MINIMUM = (r"\bmin(\S*\.f32)", r"max\1")

OF_ORDER = (
    Fault("no barrier before a block counts itself", CURSOR, r"\b(bar|barrier)\.sync\s+0;", "", 1, "race"),
    Fault("nothing orders what a block read before its count", CURSOR, RELEASE, "", 1, "race"),
    Fault("nothing orders the count before the writes", CURSOR, rf"(?s)^(.*){ACQUIRE}", r"\1", 1, "race"),
    Fault("a block counts twice", CURSOR, r"(atom\.\S*add\S* [^;]*),\s*(?:1|%r\d+);", r"\1, 2;", found="cursor"),
    Fault(
        "a thread that does not know the count is asked",
        CURSOR,
        LAST_LANE,
        r"\1, 1",
        found="cursor",
        otherwise=(r"\.red\.or\.pred", ".red.and.pred"),
    ),
    Fault("the cursor moves by two", CURSOR, r"(add\.s64 %rd\d+, %rd\d+), 1;", r"\1, 2;"),
    Fault("the offset of a state is misplaced", TORCH_STATE, r"(st\S*\.u64 \[%rd\d+)\+8\]", r"\1+16]", found="state"),
)
OF_PLACES = (
    Fault("threads count within their warp", VECTORS, r"%tid\.x", "%laneid", found="times"),
    Fault("blocks count threads", VECTORS, r"%ctaid\.x", "%tid.x"),
    Fault("one more element behind the last", RAGGED, r"setp\.lt\.s64", "setp.le.s64"),
    Fault("one element less behind the vectors", RAGGED, r"setp\.ge\.s64", "setp.gt.s64", found="times"),
    Fault("single elements are not written", RAGGED, r"st\.global\S*\.f32 [^;]*;", "", found="times"),
    Fault("single elements are written twice", RAGGED, r"(st\.global\S*\.f32 [^;]*;)", r"\1 \1", found="2 times"),
    Fault("a branch is taken the other way", VECTORS, r"@%p", "@!%p", 1),
    Fault("the second half of a vector is misplaced", VECTORS, STORE, r"\1+32]", found="out of bounds"),
    Fault("half of a vector is misaligned", VECTORS, LOAD, r"\1+8]", found="misaligned"),
    Fault("half of a vector is read twice", VECTORS, LOAD, r"\1]", found="elements differ"),
    Fault("single elements are read too far", RAGGED, r"(ld\.global\S*\.u32 %r\d+, \[%rd\d+)\]", r"\1+4]"),
    Fault("a column of the row is the next one", VECTORS, r"(ld\.global\S*\.f32 %f\d+, \[%rd\d+)\+8\]", r"\1+12]"),
    Fault("threads share memory", TORCH, r"(st\.shared\.f32 \[%r\d+)\+512\]", r"\1+516]", found="race"),
    Fault("shared memory is read elsewhere", TORCH, r"(ld\.shared\.f32 %f\d+, \[%r\d+)\+512\]", r"\1+1024]"),
)
OF_VALUES = (
    Fault("elements are exchanged", VECTORS, r"(st\.global\S*\.v4\.f32 [^{]*\{)(%f\d+), (%f\d+)", r"\1\3, \2"),
    Fault("differences are sums", VECTORS, r"sub(\.rn)?\.f32", r"add\1.f32"),
    Fault("a value is clipped on the wrong side", VECTORS, r"setp\.lt\.f32", "setp.gt.f32", otherwise=MINIMUM),
    Fault("bfloat16 is rounded as float16", BFLOAT16, r"cvt\.rn\.bf16", "cvt.rn.f16"),
    Fault("another multiplier of Philox", PORTABLE, r"\b3528531795\b", "3528531793"),
    Fault("another key of Philox", PORTABLE, r"\b2654435769\b", "2654435767"),
    Fault("another multiplier of torch's Philox", TORCH_SINGLE, r"\b3449720151\b", "3449720149"),
)
FAULTS = (*OF_ORDER, *OF_PLACES, *OF_VALUES)
