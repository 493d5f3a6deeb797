"""Runs kernels of a few lines, which say only their bodies: for tests of the interpreter itself."""

from __future__ import annotations

import numpy as np

from tests.support.ptx.generate import code_of
from tests.support.ptx.launch import Launch
from tests.support.ptx.memory import INITIALISED, READ, WRITE, Memory
from tests.support.ptx.parse import Module
from tests.support.ptx.races import races

TEXT = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0) .maxntid 64, 1, 1
{
.reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<12>; .reg .f32 %f<4>; .reg .b64 %rd<6>;
.shared .align 4 .b8 words[256];
ld.param.u64 %rd1, [kernel_param_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
BODY
ret;
}
"""
FIRST_BLOCK = "setp.ne.s32 %p1, %r2, 0; @%p1 ret;"


def run(
    body: str,
    flags: int = READ | WRITE | INITIALISED,
    classes: int = 1,
    blocks: int = 2,
    cluster: int = 1,
    agreeing: bool = False,
) -> tuple[list[str], list[int]]:
    """Run blocks of 64 threads, and return what was wrong, and 64 words of memory.

    ``flags`` say what they allow; ``agreeing``: see ``races``.
    """
    memory = Memory(1 << 16)
    place = memory.allocate(256, "words")
    memory.allow(place, 256, flags)
    code = code_of(Module(TEXT.replace("BODY", body)), "kernel")
    parameters = (memory.base + place).to_bytes(8, "little")
    launch = Launch(memory, code, blocks, 64, parameters, cluster=cluster).run(classes=classes)
    return launch.findings + races(launch, agreeing=agreeing), memory.bytes[place : place + 256].view(
        np.uint32
    ).tolist()
