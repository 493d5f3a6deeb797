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
PORTABLE = Case(2, 1029, "portable", 1, stride=1032, values="pure")
TORCH = Case(2, 4096, "torch", 1, stride=4096, values="pure")
TORCH_STATE = Case(2, 4096, "torch", 1, state=True, stride=4096)
TORCH_SINGLE = Case(3, 1021, "torch", 1, stride=1021, values="pure")


@dataclass(frozen=True)
class Fault:
    """A change of PTX: a pattern, and what to put in the place of its occurrences, or of the first ``count``."""

    what: str
    case: Case
    pattern: str
    replacement: str
    count: int = 0
    found: str = ""  # a part of the description that the comparison gives

    def change(self, text: str) -> str:
        """Plant the fault.

        Raises:
            ValueError: The text has nothing of the kind: the fault has to be written anew.
        """
        changed = re.sub(self.pattern, self.replacement, text, count=self.count)
        if changed == text:
            raise ValueError(f"{self.what}: the PTX has no {self.pattern!r}")
        return changed


FENCE = r"membar\.gl;|fence\.(?:acq_rel|sc)\.gpu;"
RELEASE, ACQUIRE = (rf"(?:{FENCE}|\.(?:acq_rel|{order})(?=\.gpu))" for order in ("release", "acquire"))
LOAD, STORE = r"(ld\.global\S*\.v4\.\w+ [^;]*\[%rd\d+)\+16\]", r"(st\.global\S*\.v4\.\w+ \[%rd\d+)\+16\]"
VOTE = r"bar\.red\.or\.pred\s+(%p\d+), 0, (%p\d+);"

LAST_OFFSET = r"(?s)^(.*st\.global\.u64 \[%rd\d+)\](, %rd\d+;\s+\$\w+:\s+mov\.u64 %rd\d+, 0;)"

OF_ORDER = (
    Fault("no barrier before a block counts itself", CURSOR, VOTE, r"mov.pred \1, \2;", 1, "race"),
    Fault("the first thread alone is told that its block is the last", CURSOR, VOTE, r"mov.pred \1, \2;", 0, "cursor"),
    Fault("no barrier before the last block writes", CURSOR, r"bar\.sync\s+0;", "", 1, "race"),
    Fault("nothing orders what a block read before its count", CURSOR, RELEASE, "", 1, "race"),
    Fault("nothing orders the count before the writes", CURSOR, rf"(?s)^(.*){ACQUIRE}", r"\1", 1, "race"),
    Fault("a block counts twice", CURSOR, r"(atom\.\S*add\S* [^;]*),\s*(?:1|%r\d+);", r"\1, 2;", found="cursor"),
    Fault("all threads are asked who is the last", CURSOR, r"\.red\.or\.pred", ".red.and.pred", found="cursor"),
    Fault("the cursor moves by two", CURSOR, r"(add\.s64 %rd\d+, %rd\d+), 1;", r"\1, 2;"),
    Fault("the offset of a state is misplaced", TORCH_STATE, LAST_OFFSET, r"\1+8]\2", found="state"),
)
OF_PLACES = (
    Fault("threads count within their warp", VECTORS, r"%tid\.x", "%laneid", found="times"),
    Fault("blocks count threads", VECTORS, r"%ctaid\.x", "%tid.x"),
    Fault("a tile takes the next sample", VECTORS, r"(shr\.u64 (%rd\d+), %rd\d+, %r\d+;)", r"\1 add.s64 \2, \2, 1;"),
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
    Fault("a value is clipped on the wrong side", VECTORS, r"\bmin(\S*\.f32)", r"max\1"),
    Fault("bfloat16 is rounded as float16", BFLOAT16, r"cvt\.rn\.bf16", "cvt.rn.f16"),
    Fault("another multiplier of Philox", PORTABLE, r"-766435501\b", "-766435503"),
    Fault("Philox counts every other element", PORTABLE, r"shr\.u64 (%rd\d+), (%rd\d+), 2;", r"shr.u64 \1, \2, 1;"),
    Fault("another key of Philox", PORTABLE, r"-1640531527\b", "-1640531529"),
    Fault("another multiplier of torch's Philox", TORCH_SINGLE, r"-845247145\b", "-845247147"),
)
FAULTS = (*OF_ORDER, *OF_PLACES, *OF_VALUES)
