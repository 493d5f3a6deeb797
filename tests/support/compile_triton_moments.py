"""Compiles the Triton kernel that makes weights ahead of time, for tests that interpret them themselves.

python tests/support/compile_triton_moments.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastguide.guidance.encoded import PART
from fastguide.step.backends import triton as backend
from fastguide.step.backends import triton_moments, triton_moments_kernel

ABSENT = "constexpr"
CASES = {  # dtypes of the terms, whether the last one is the sample, whether samples are whole parts, tiles of values
    "two of 16 bits": (("bf16", "bf16"), False, True, 2),
    "a mixed four": (("fp32", "bf16", "bf16", "fp32"), True, True, 4),
    "a ragged three": (("fp32", "fp32", "fp32"), False, False, 8),
}

TARGETS = {GPUTarget("cuda", 90, 32): tuple(CASES), GPUTarget("hip", "gfx942", 64): ("a mixed four",)}


def compiled(target, dtypes, weighs_sample, even, tiles):
    """The kernel for terms of these dtypes; absent tensors are None, other arguments integers of 32 bits."""
    kernel = triton_moments_kernel.moments_kernel
    kinds = {"tensors": tuple("*" + dtype for dtype in dtypes), "strides": ("i32",) * len(dtypes)}
    kinds |= {"scratch": "*fp64", "rows": "*fp32", "weights": "*fp32", "program": "*i32", "parameters": "*fp64"}
    kinds |= {"made": "*fp32", "indices": ABSENT, "cursor": "*i64"}
    constants = {"TERMS": len(dtypes), "WEIGHS_SAMPLE": weighs_sample, "EVEN": even, "PART": PART, "TILES": tiles}
    aligned = (*(name for name in kinds if name != "strides" or even), *["size"] * even)
    signature, constexprs, attributes = {}, {}, {}
    for k, name in enumerate(kernel.arg_names):
        kind = ABSENT if name in constants else kinds.get(name, "i32")
        signature[name] = kind
        if kind == ABSENT:
            constexprs[(k,)] = constants.get(name)
        elif name in aligned:
            places = [(k, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(k,)]
            attributes |= {place: [["tt.divisibility", 16]] for place in places}
    code = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(code, target=target, options={"num_warps": triton_moments.WARPS, **backend.OPTIONS})


def main(folder: Path) -> None:
    for target, cases in TARGETS.items():
        for name in cases:
            for kind, code in compiled(target, *CASES[name]).asm.items():
                if kind in ("ptx", "cubin", "amdgcn"):
                    file = folder / f"{name}.{target.arch}.{kind}"
                    file.write_bytes(code if isinstance(code, bytes) else code.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
