"""Runs GPU kernels' PTX on all cases: the native library's, or what nvcc or Triton compile.

python -m tests.support.ptx [--arch 90] [--triton]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import triton_interpreter

if TYPE_CHECKING:
    from tests.support.ptx.step import Library, Totals

ROOT = Path(__file__).resolve().parents[3]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.support.ptx", description=__doc__)
    parser.add_argument("--arch", type=int, help="compile for this compute capability; else, the library's own PTX")
    parser.add_argument("--triton", action="store_true", help="Triton's kernel, compiled for --arch (80)")
    parser.add_argument("--few", action="store_true", help="the cases of CI")
    parser.add_argument("--count", type=int, default=300, help="how many cases of any kind to draw (%(default)s)")
    parser.add_argument("--each", type=int, default=12, help="how many cases to draw for each kernel (%(default)s)")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th case")
    parser.add_argument("--first", type=int, default=0, help="begin at this case")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    return parser.parse_args()


def compiled_ptx(architecture: int, file: str = "step") -> str:
    """Compile the kernels of a file as setup.py does, to PTX."""
    flags = re.search(r'^CUDA_FLAGS = "([^"]+)"', (ROOT / "setup.py").read_text(), flags=re.M)[1].split()
    flags = [flag for flag in flags if not flag.startswith(("-Xcompiler", "--threads"))]  # of objects
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else "nvcc"
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / f"{file}.ptx"
        source = ROOT / "csrc" / "kernels" / "gpu" / f"{file}.cu"
        command = [nvcc, *flags, f"-I{ROOT / 'csrc'}", "-ptx", f"-arch=compute_{architecture}", str(source)]
        subprocess.run([*command, "-o", str(compiled)], check=True)
        return compiled.read_text()


def why_not(chosen: argparse.Namespace) -> str | None:
    """Name what is missing."""
    from fastguide.step.backends import native
    from tests.support import device_code
    from tests.support.machine_code import tool

    if chosen.triton:
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if chosen.arch is None and (not native.LIBRARY.exists() or "PTX" not in native.cuda_code()):
        return "the native library is not built, or holds no PTX; fastguide info says why"
    if chosen.arch is None and tool() is None:
        return "there is no cuobjdump: neither Triton nor a CUDA toolkit that has it is installed"
    return device_code.why_not()


def main(chosen: argparse.Namespace) -> int:
    """Run, and print a summary; 1 if a case failed."""
    import torch

    from fastguide.step.backends import native
    from tests.support.machine_code import cuobjdump
    from tests.support.ptx import far, listed
    from tests.support.ptx.step import Comparison, Library

    reason = why_not(chosen)
    if reason is not None:
        print(f"not run: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    start, library, distant = time.monotonic(), None, []
    if chosen.triton:
        from tests.support.ptx.triton_step import TritonKernels

        comparison = Comparison(TritonKernels(chosen.arch or 80).prepare, host=False)
    else:
        library = Library(compiled_ptx(chosen.arch) if chosen.arch else cuobjdump("-ptx", native.LIBRARY))
        comparison = Comparison(library.prepare)
    if chosen.few:
        cases = list(listed.chosen_layouts()) if chosen.triton else listed.few()
    else:
        cases = listed.everything(chosen.count, chosen.each, chosen.seed)
        distant = list(far.far_cases())[:: chosen.every] if library is not None else []
    cases = cases[chosen.first :: chosen.every]
    failed = sum(report(case, comparison.run(case)) for case in cases)
    failed += sum(report(case, far.run_far(comparison.memory, library, case)) for case in distant)

    summarize(comparison.totals, library)
    print(f"{len(distant)} cases far from their tensors' beginning")
    seconds = time.monotonic() - start
    print(f"{len(cases)} cases of {comparison.totals.launches} launches, {seconds:.0f} s: {failed} failed")
    return 1 if failed else 0


def report(case: object, wrong: list[str]) -> bool:
    """Print a case that failed, and return whether it did."""
    if wrong:
        print(f"FAIL {case}", *(f"     {text}" for text in wrong[:5]), sep="\n", flush=True)
    return bool(wrong)


def summarize(totals: Totals, library: Library | None) -> None:
    """Print what was run and compared."""
    if library is None:
        print(f"{len(totals.kernels)} kernels were compiled and run")
    else:
        sizes = {name: library.code(name).sizes for name in totals.kernels}
        executed = sum(sizes[name][block] for name, blocks in totals.kernels.items() for block in blocks)
        print(f"{len(totals.kernels)} of {len(library.kernels)} kernels were run,", end=" ")
        print(f"{executed / max(sum(map(sum, sizes.values())), 1):.2%} of their instructions")
    print(f"{totals.instructions:.3g} thread instructions, {totals.accesses:.3g} checked accesses to global memory")
    print(f"{totals.compared_with_host} elements compared to the bit with the same code on the host")
    print(f"{totals.equal_to_reference} equal to the float32 reference, of {totals.elements}")
    print(f"worst error {totals.worst:.2f} roundings of the terms, at {totals.worst_case}")


if __name__ == "__main__":
    given = options()
    if not given.triton:
        triton_interpreter.start()
    sys.exit(main(given))
