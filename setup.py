"""Builds csrc/ into fastguide/_native.so with ninja. Everything else about the package is in pyproject.toml.

Environment: ``CXX`` names the C++ compiler. With nvcc (``CUDA_HOME``, or on the PATH) the GPU kernels are built too;
``FASTGUIDE_CUDA=0`` leaves them out, ``FASTGUIDE_CUDA=1`` makes a missing nvcc an error. ``TORCH_CUDA_ARCH_LIST``
chooses their architectures, such as ``"8.0+PTX;9.0"``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit('fastguide: building needs a newer setuptools: pip install "setuptools>=77"') from None

TORCH_FLOOR = runpy.run_path(str(Path(__file__).resolve().parent / "fastguide" / "_version.py"))["TORCH_FLOOR"]
# -ffp-contract=off, -fmad=false: the formulas say where a product and a sum are joined, or an element's bits would
# depend on its place, and the portable noise on the device.
FLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Werror=switch"  # a dtype that a switch forgets does not compile
)
SMALL = "-Os"  # for what makes checks and messages
THROWS_NOTHING = "-fno-exceptions -fno-unwind-tables -fno-asynchronous-unwind-tables"  # 40 kB of tables less
INSTRUCTION_SETS = {"baseline": "-fno-unswitch-loops"}  # else loops are there twice, and take three times as long
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["baseline"] = "-O2"  # for processors from before 2013: smaller rather than faster
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c -DFASTGUIDE_WITHOUT_DOUBLE"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    INSTRUCTION_SETS["avx512"] += " -fno-unswitch-loops -DFASTGUIDE_WITHOUT_DOUBLE"

CUDA_FILES = ("step", "moments", "groups", "thresholds", "backward")
CODE_FOR = {"groups": ("80", "90")}  # a wheel has a limit: others compile the PTX of this at its first launch
CUDA_ARCHITECTURES = "8.0+PTX;9.0;10.0;12.0"  # the PTX serves every other GPU from 8.0 on
CUDA_FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden,-Wswitch,-Werror=switch --threads=2"


class BuildNative(build_ext):
    """Build one shared library for every version of Python and torch."""

    def finalize_options(self) -> None:
        # One folder for every Python and kind of install: ninja then compiles what changed, and nothing else.
        chosen = self.build_temp
        super().finalize_options()
        self.build_temp = chosen or str(Path(__file__).resolve().parent / "build" / "native")

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        note = library.with_suffix(".txt")
        windows = sys.platform == "win32"
        compiler = None if windows else find_compiler()
        if compiler is None:
            if os.environ.get("FASTGUIDE_CUDA") == "1":
                expected = "Linux" if windows else "a C++ compiler too (g++, c++, clang++ or $CXX)"
                raise SystemExit(f"fastguide: FASTGUIDE_CUDA=1: expected {expected}")
            library.unlink(missing_ok=True)
            why = "no C++ compiler was found at install (g++, c++, clang++ or $CXX); install one, reinstall"
            note.write_text(("there is none for Windows; the Linux subsystem has it" if windows else why) + "\n")
            announce(f"fastguide: native backend not built: {note.read_text().strip()}. The reference works, slower.")
            return
        note.unlink(missing_ok=True)
        directory = Path(self.build_temp).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        code = cuda_code()
        (directory / "build.ninja").write_text(ninja_file(compiler, library, code))
        if subprocess.run([ninja(), "-C", str(directory)]).returncode != 0:
            hint = "" if code.nvcc is None else "; if it is nvcc's, FASTGUIDE_CUDA=0 builds without it"
            raise SystemExit(f"fastguide: the native library could not be compiled: the error is above{hint}")
        print(
            f"fastguide: native library built for the CPU ({', '.join(INSTRUCTION_SETS)}); "
            f"for GPUs: {code.description}",
            file=sys.stderr,
        )

    def copy_extensions_to_source(self) -> None:
        """Replace the library of an earlier editable install by the new one, or by the note why there is none."""
        source = Path(__file__).resolve().parent / "fastguide"
        for name in ("_native.so", "_native.txt"):
            (source / name).unlink(missing_ok=True)
            built = Path(self.build_lib) / "fastguide" / name
            if built.exists():
                self.copy_file(str(built), str(source / name))


class AnyPythonWheel(bdist_wheel):
    """Tag the wheel for every Python 3 on the platform: csrc/binding/python.h says why it fits them all."""

    def run(self) -> None:
        # An earlier build may have left files that were deleted since: they would be packed.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def find_compiler() -> str | None:
    """Return the command of $CXX, which must exist if it is set; else the first of the usual names."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        if shutil.which(shlex.split(chosen)[0]) is None:
            raise SystemExit(f"fastguide: CXX: expected a compiler, got {chosen!r}, which is not there")
        return chosen
    return next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def program_of(compiler: str) -> str:
    """Return the compiler in a command such as ``ccache g++ -pipe``: the last program before the options."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), shlex.split(compiler)))
    return words[-1]


def find_nvcc() -> Path | None:
    """Find nvcc, unless FASTGUIDE_CUDA=0.

    Raises:
        SystemExit: FASTGUIDE_CUDA=1, and there is no nvcc.
    """
    wanted = os.environ.get("FASTGUIDE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"fastguide: FASTGUIDE_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if found is None and wanted == "1":
        place = f"CUDA_HOME={home}" if home else "the PATH"
        raise SystemExit(f"fastguide: FASTGUIDE_CUDA=1: expected nvcc, which is not in {place}")
    return Path(found) if found else None


class CudaCode(NamedTuple):
    """How the GPU kernels are compiled, and for which architectures."""

    nvcc: Path | None
    architectures: list[tuple[str, bool]]
    """("90", with PTX)."""
    description: str
    """For people: such as ``sm_80 sm_90 PTX 80``; or ``none: `` and the reason. ``fastguide info`` shows it."""


def cuda_code() -> CudaCode:
    """Choose what this machine's nvcc compiles, as the environment variables ask for it."""
    nvcc = find_nvcc()
    if nvcc is None:
        missing = "no nvcc was found" + (" in CUDA_HOME" if os.environ.get("CUDA_HOME") else "")
        off = os.environ.get("FASTGUIDE_CUDA") == "0"
        return CudaCode(None, [], f"none: {'FASTGUIDE_CUDA was 0' if off else missing}")
    architectures = cuda_architectures(nvcc)
    names = [f"sm_{name}" for name, _ in architectures]
    return CudaCode(nvcc, architectures, " ".join([*names, *(f"PTX {name}" for name, ptx in architectures if ptx)]))


def cuda_architectures(nvcc: Path) -> list[tuple[str, bool]]:
    """List what to compile for: ("90", with PTX). Defaults that an older nvcc does not support are left out."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    supported = run_nvcc(nvcc, "--list-gpu-arch").stdout.split()
    architectures = []
    for entry in (chosen or CUDA_ARCHITECTURES).replace(";", " ").split():
        version, plus, ptx = entry.partition("+")
        name = version.replace(".", "")
        if not name.rstrip("af").isdigit() or ptx not in ("", "PTX") or (plus and not ptx):
            raise SystemExit(f"fastguide: TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got {entry!r}")
        if f"compute_{name.rstrip('af')}" in supported:
            architectures.append((name, bool(ptx)))
        elif chosen:
            raise SystemExit(
                f"fastguide: TORCH_CUDA_ARCH_LIST: {nvcc} has no code for {entry!r}; it knows {' '.join(supported)}. "
                "Ask for some of these, or take another CUDA toolkit (12.8 and newer know 12.0)"
            )
        else:
            announce(f"fastguide: {nvcc} is too old for sm_{name}, which is left out")
    if not architectures:
        if not chosen:
            raise SystemExit(f"fastguide: {nvcc} is too old: expected one that knows some of {CUDA_ARCHITECTURES}")
        raise SystemExit(f"fastguide: TORCH_CUDA_ARCH_LIST: expected architectures, got {chosen!r}")
    return architectures


def run_nvcc(nvcc: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run nvcc with arguments that compile nothing.

    Raises:
        SystemExit: it cannot be run, or fails.
    """
    advice = "Mend it, name another with CUDA_HOME, or build without the GPU kernels: FASTGUIDE_CUDA=0"
    try:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"fastguide: {nvcc} cannot be run: {error}. {advice}") from None
    if result.returncode != 0:
        output = (result.stderr or result.stdout).strip() or "nothing"
        raise SystemExit(
            f"fastguide: {nvcc} {arguments[0]} fails with {result.returncode}, and says {output}. {advice}"
        )
    return result


def compression(nvcc: Path) -> str:
    """Return the option for the smallest code that every driver of the toolkit loads."""
    # Before CUDA 13, some drivers read the older format only.
    release = re.search(r"release (\d+)", run_nvcc(nvcc, "--version").stdout)
    return "--compress-mode=size" if release and int(release[1]) >= 13 else "-Xfatbin=-compress-all"


def generated(file: str, architectures: list[tuple[str, bool]]) -> list[str]:
    """Return the options for what a file is compiled for: machine code, but where PTX serves, and PTX."""

    def number(name: str) -> int:
        return int(name.rstrip("af"))

    served = [number(name) for name, ptx in architectures if ptx]
    code = [
        name
        for name, _ in architectures
        if name in CODE_FOR.get(file, (name,)) or not any(least <= number(name) for least in served)
    ]
    options = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in code]
    return options + [f"-gencode=arch=compute_{name},code=compute_{name}" for name, ptx in architectures if ptx]


def ninja_file(compiler: str, library: Path, code: CudaCode) -> str:
    """Write the build file: what ninja compiles, and how."""
    torch_root = find_torch()
    target = f"0x{TORCH_FLOOR[0]:02X}{TORCH_FLOOR[1]:02X}000000000000"
    source = Path(__file__).resolve().parent / "csrc"
    nvcc, architectures, description = code
    # torch loads the library itself: it must name libtorch, or its symbols are not found.
    # Python's weak symbols are found in the process that loads it; macOS has to be told so.
    darwin = sys.platform == "darwin"
    keep = "-Wl,-undefined,dynamic_lookup " if darwin else "-Wl,--no-as-needed -Wl,--strip-all "
    include = f"-isystem {quote(torch_root / 'include')}"
    lines = [
        "ninja_required_version = 1.5",
        "cxx = " + compiler.replace("$", "$$"),
        f"flags = {FLAGS} -I{quote(source)}",
        "rule compile",
        "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{quote(torch_root / 'lib')} $libraries",
    ]
    on_torch = (  # error messages name files, without the folder of the build
        f"-DTORCH_TARGET_VERSION={target} {include} -ffile-prefix-map={quote(source)}=csrc"
        + (" -DFASTGUIDE_CUDA" if nvcc else "")
    )
    objects = []
    for name, extra in (
        ("operator", f"{on_torch} {SMALL}"),
        ("answers", f"{on_torch} {SMALL} '-DFASTGUIDE_CUDA_CODE=\"{description}\"'"),
        ("backward", f"{on_torch} {SMALL}"),  # its loops are those of the instruction sets
        ("run", on_torch),
        ("run_on_cpu", f"{on_torch} {SMALL}"),
        ("torch_stream", f"{on_torch} {SMALL}"),
        ("repeat", include),  # for the header of DLPack
        ("draw", f"{include} {SMALL}"),
    ):
        objects.append(f"{name}.o")
        lines += [f"build {name}.o: compile {escape(source / 'binding' / f'{name}.cpp')}", f"  extra = {extra}"]
    for name, flags in INSTRUCTION_SETS.items():
        files = ["step", "moments", "groups", "noise"]
        for file in files + (["torch_stream"] if name != "baseline" else []):
            objects.append(f"{file}_{name}.o")
            lines += [
                f"build {file}_{name}.o: compile {escape(source / 'kernels' / 'cpu' / f'{file}.cpp')}",
                f"  extra = -DFASTGUIDE_ISA={name} {THROWS_NOTHING} {flags}"
                + (" -O2" if file == "moments" and name != "baseline" else ""),  # written as vectors
            ]
    libraries = f"{keep}-ltorch"
    if nvcc is not None:
        objects += [f"{name}_gpu.o" for name in CUDA_FILES]
        lines += [
            f"nvcc = {quote(nvcc)} -ccbin {quote(program_of(compiler))}",
            "rule compile_cuda",
            f"  command = $nvcc {CUDA_FLAGS} -I{quote(source)} $extra -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            *(
                line
                for name in CUDA_FILES
                for line in (
                    f"build {name}_gpu.o: compile_cuda {escape(source / 'kernels' / 'gpu' / f'{name}.cu')}",
                    f"  extra = {' '.join([*generated(name, architectures), compression(nvcc)])}",
                )
            ),
        ]
        # The runtime is linked in: the library then needs no CUDA to be loaded. Its symbols are kept inside.
        libraries += f" {cudart(nvcc)} -ldl -lrt -lpthread -Wl,--exclude-libs,ALL"
    lines += [f"build {escape(library)}: link {' '.join(objects)}", f"  libraries = {libraries}", ""]
    return "\n".join(lines)


def find_torch() -> Path:
    """Find torch without importing it: the build needs its headers and one library to link."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "fastguide: building needs torch. Install it first and use --no-build-isolation:\n"
            "    pip install torch 'setuptools>=77' ninja && pip install --no-build-isolation ."
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TORCH_FLOOR:
        floor = f"{TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}"
        raise SystemExit(f"fastguide: expected torch {floor} or newer, got {version}: pip install 'torch>={floor}'")
    return Path(spec.submodule_search_locations[0])


def cudart(nvcc: Path) -> str:
    """Find the static CUDA runtime of nvcc's toolkit; nvcc itself names the toolkit, because it may be a script."""
    plan = run_nvcc(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    root = re.search(r"\bTOP=(.+)", plan.stderr)
    if root is None:
        raise SystemExit(f"fastguide: {nvcc} --dryrun does not say where its toolkit is:\n{plan.stderr}")
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        library = Path(root[1].strip()) / folder / "libcudart_static.a"
        if library.exists():
            return quote(library.resolve())
    raise SystemExit(f"fastguide: expected libcudart_static.a in {root[1]}; FASTGUIDE_CUDA=0 builds without CUDA")


def escape(path: str | Path) -> str:
    """Escape a path for a build line of ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(word: str | Path) -> str:
    """Quote a word of a command that ninja passes to the shell."""
    return shlex.quote(str(word)).replace("$", "$$")


def ninja() -> str:
    """Find ninja: that of the build environment, else the one on the PATH."""
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise SystemExit("fastguide: building needs ninja: pip install ninja")
    return found


def announce(message: str) -> None:
    """Print a message where a person sees it: pip hides what a successful build prints, but not the terminal."""
    print(message, file=sys.stderr)
    with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:  # if there is one
        print(f"\n{message}", file=terminal)


NATIVE = Extension(
    "fastguide._native",
    sources=sorted(str(p) for p in Path("csrc").rglob("*.c*")),
    depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
)

setup(
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
