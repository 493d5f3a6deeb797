"""Compiles the Triton kernels that make weights ahead of time, for tests that interpret them themselves.

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
CASES = {  # dtypes of the terms, whether the last one is the sample, whether samples are whole parts, values
    "two of 16 bits": (("bf16", "bf16"), False, True, 64),
    "a mixed four": (("fp32", "bf16", "bf16", "fp32"), True, True, 128),
    "a ragged three": (("fp32", "fp32", "fp32"), False, False, 256),
}

TARGETS = {GPUTarget("cuda", 90, 32): tuple(CASES), GPUTarget("hip", "gfx942", 64): ("a mixed four",)}


def compiled(kernel, target, warps, kinds, constants, aligned):
    """A kernel for these types of its arguments; absent ones are None, others ``constants``, or of 32 bits."""
    signature, constexprs, attributes = {}, {}, {}
    for k, name in enumerate(kernel.arg_names):
        kind = kinds.get(name, "i32")
        if name in constants:
            signature[name], constexprs[(k,)] = ABSENT, constants[name]
            continue
        signature[name] = kind
        if kind == ABSENT:
            constexprs[(k,)] = None
        elif name in aligned:
            places = [(k, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(k,)]
            attributes |= {place: [["tt.divisibility", 16]] for place in places}
    code = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(code, target=target, options={"num_warps": warps, **backend.OPTIONS})


def of_parts(target, dtypes, weighs_sample, even, _values):
    kinds = {"tensors": tuple("*" + dtype for dtype in dtypes), "strides": ("i32",) * len(dtypes)}
    kinds |= {"sums": "*fp64", "indices": ABSENT, "cursor": "*i64"}
    constants = {"TERMS": len(dtypes), "WEIGHS_SAMPLE": weighs_sample, "EVEN": even, "PART": PART}
    aligned = ("tensors", "strides", "size", "sums", "cursor") if even else ("tensors", "sums", "cursor")
    warps = triton_moments.PART_WARPS
    return compiled(triton_moments_kernel.moments_kernel, target, warps, kinds, constants, aligned)


def of_samples(target, dtypes, weighs_sample, _even, values):
    kinds = {"sums": "*fp64", "rows": "*fp32", "weights": "*fp32", "program": "*i32", "parameters": "*fp64"}
    kinds |= {"made": "*fp32", "read": "*fp32" if weighs_sample else ABSENT, "indices": ABSENT, "cursor": "*i64"}
    constants = {"TERMS": len(dtypes), "WEIGHS_SAMPLE": weighs_sample, "VALUES": values}
    warps = triton_moments.SAMPLE_WARPS
    return compiled(triton_moments_kernel.weights_kernel, target, warps, kinds, constants, tuple(kinds))


def main(folder: Path) -> None:
    for target, cases in TARGETS.items():
        for name in cases:
            for which, make in (("parts", of_parts), *([("samples", of_samples)] if name == "a mixed four" else [])):
                for kind, code in make(target, *CASES[name]).asm.items():
                    if kind in ("ptx", "cubin", "amdgcn"):
                        file = folder / f"{name}, {which}.{target.arch}.{kind}"
                        file.write_bytes(code if isinstance(code, bytes) else code.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
