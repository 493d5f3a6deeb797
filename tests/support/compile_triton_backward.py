"""Compiles the Triton kernel of the backward pass ahead of time, for tests that interpret it themselves.

python tests/support/compile_triton_backward.py
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastguide.step.backends import triton as backend
from fastguide.step.backends import triton_backward_kernel as kernels

ABSENT, FLOAT, PAIR = "constexpr", "*fp32", ("*bf16", "*bf16")
TARGET = GPUTarget("cuda", 90, 32)
EVERYTHING = {
    "came": (FLOAT,) * 3,
    "inputs": (FLOAT, PAIR, FLOAT, FLOAT, "*i64", *(FLOAT,) * 4),
    "outputs": (FLOAT, PAIR, *(FLOAT,) * 5),
    "sums": FLOAT,
}
PLAIN = {
    "came": (FLOAT, ABSENT, ABSENT),
    "inputs": (FLOAT, PAIR, FLOAT, FLOAT, *(ABSENT,) * 5),
    "outputs": (FLOAT, PAIR, *(ABSENT,) * 5),
    "sums": ABSENT,
}
STRIDES = {
    "came_strides": ("i32",) * 3,
    "input_strides": ("i32", ("i32",) * 2, *("i32",) * 4),
    "output_strides": ("i32", ("i32",) * 2, *("i32",) * 5),
}


def compiled(tensors, *, even):
    """For aligned tensors whose strides are multiples of 16, of two predictions."""
    constants = {"K": 2, "CLIPS": True, "EVEN": even, "BLOCK": 1024}
    signature, constexprs, attributes = {}, {}, {}

    def note(kind, at):
        for k, part in enumerate(kind if isinstance(kind, tuple) else ()):
            note(part, (*at, k))
        if kind == ABSENT:
            constexprs[at] = None
        elif not isinstance(kind, tuple):
            attributes[at] = [["tt.divisibility", 16]]

    for k, name in enumerate(kernels.backward_kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(k,)] = ABSENT, constants[name]
        else:
            signature[name] = (tensors | STRIDES).get(name, "i32")
            if name in (*tensors, *STRIDES, "size"):
                note(signature[name], (k,))
    code = ASTSource(fn=kernels.backward_kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(code, target=TARGET, options={"num_warps": backend.WARPS, **backend.OPTIONS})


if __name__ == "__main__":
    compiled(EVERYTHING, even=False)
    text = compiled(PLAIN, even=True).asm["ptx"]
    print(sum("st.global" in line and ".v4." in line for line in text.splitlines()))
