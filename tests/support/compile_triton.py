"""Compiles the Triton kernel ahead of time for tests/step/backends/test_triton_code.py, which interprets itself.

python tests/support/compile_triton.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastguide.step.backends import triton as backend
from fastguide.step.backends import triton_kernel as kernels
from fastguide.step.operator import ELEMENTWISE, StepArguments

CUDA = [GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)]
AMD = [GPUTarget("hip", architecture, 64) for architecture in ("gfx90a", "gfx942")]

CASES = {  # each with what it is there for
    "a mixed pair of predictions": {"NOISE": kernels.NONE.value},
    "16 bits throughout": {"NOISE": kernels.GIVEN.value, "state": "bf16", "model": "bf16"},
    "a ragged sample": {"NOISE": kernels.GIVEN.value, "EVEN": False},
    "portable noise": {"NOISE": kernels.PORTABLE.value, "K": 1},
    "torch's noise, one by one": {"NOISE": kernels.TORCH_STREAM.value},
    "torch's noise, shared": {"NOISE": kernels.TORCH_STREAM.value, "SHARED": True},
    "everything": {"NOISE": kernels.GIVEN.value, "K": 4, "optional": ("gradient", "variance", "original", "staged")},
    "a loop's": {"NOISE": kernels.PORTABLE.value, "optional": ("staged", "cursor", "timestep")},
    "a loop's, torch's noise": {"NOISE": kernels.TORCH_STREAM.value, "optional": ("cursor", "timestep", "philox")},
    "a known image": {"NOISE": kernels.GIVEN.value, "optional": ("mask", "known", "known_noise")},
    "a history": {"NOISE": kernels.NONE.value, "optional": ("anchor", "history")},
    "thresholds": {"NOISE": kernels.NONE.value, "optional": ("inverse_thresholds",)},
    "float16": {"NOISE": kernels.PORTABLE.value, "state": "fp16", "model": "fp16", "optional": ("staged",)},
}
TORCH_STREAM = ("torch's noise, one by one", "torch's noise, shared", "a loop's, torch's noise")


def compiled(target, *, NOISE, K=2, EVEN=True, SHARED=False, state="fp32", model="bf16", optional=()):  # noqa: N803
    """The kernel for aligned tensors whose strides are multiples of 16, as Triton's own launcher would ask for it."""
    block = backend.VECTOR * backend.WARPS * target.warp_size
    constants = {"NOISE": NOISE, "K": K, "EVEN": EVEN, "COUNTED": True, "SHARED": SHARED}
    constants |= {"PTX": target.backend == "cuda", "BLOCK": block}
    dtypes = {"out": state, "sample": state, "predictions": model, "rows": "fp32", "weights": "fp32", "indices": "i64"}
    dtypes |= {"original": state, "staged": model, "gradient": model, "variance": model, "noise": state, "seeds": "i64"}
    dtypes |= {"philox": "i64", "cursor": "i64", "timestep": "i64", "mask": state, "known": state, "known_noise": state}
    dtypes |= {"anchor": state, "history": "fp32", "inverse_thresholds": "fp32"}
    source = {kernels.GIVEN.value: ["noise"], kernels.PORTABLE.value: ["seeds"]}.get(NOISE, [])
    present = {"out", "sample", "predictions", "rows", "weights", "indices", *optional, *source}
    tensors = [name for name in StepArguments._fields if name in dtypes]
    strided = [name for name in tensors if name in (*ELEMENTWISE, "staged", "predictions", "history")]
    aligned = [["tt.divisibility", 16]]

    def nested(names, kinds, at):
        """A tuple's types, with the predictions' a tuple in it; what is absent is the constant None."""
        for k, name in enumerate(names):
            kind = kinds(name)
            if kind == "constexpr":
                constexprs[(at, k)] = None
            for place in [(at, k, i) for i in range(K)] if name == "predictions" else [(at, k)]:
                if kind != "constexpr":
                    attributes[place] = aligned
            yield (kind,) * K if name == "predictions" else kind

    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernels.step_kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        elif name == "tensors":
            kinds = lambda name: "*" + dtypes[name] if name in present else "constexpr"  # noqa: E731
            signature[name] = tuple(nested(tensors, kinds, i))
        elif name == "strides":
            signature[name] = tuple(nested(strided, lambda _: "i32", i))
        else:
            signature[name] = "i32"
            if name in ("size", "threads"):
                attributes[(i,)] = aligned
    code = ASTSource(fn=kernels.step_kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(code, target=target, options={"num_warps": backend.WARPS, **backend.OPTIONS})


def main(folder: Path) -> None:
    for target in [*CUDA, *AMD]:
        for name, case in CASES.items():
            if target in AMD and name in TORCH_STREAM:  # torch's stream on AMD is another one
                continue
            for kind, code in compiled(target, **case).asm.items():
                if kind in ("ptx", "cubin", "amdgcn", "llir"):
                    file = folder / f"{name}.{target.arch}.{kind}"
                    file.write_bytes(code if isinstance(code, bytes) else code.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
