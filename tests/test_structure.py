"""The architecture, enforced: imports go down, C++ floors too, names agree, and files stay short."""

from __future__ import annotations

import ast
import ctypes
import graphlib
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastguide
from fastguide.step import noise
from fastguide.step.backends import native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastguide"

FLOORS = [  # a package imports packages of lower floors, and has no circle of imports within
    ["schedules"],
    ["solvers", "guidance"],
    ["step"],
    ["sampling", "training"],
    ["fastguide", "diffusers", "demo"],  # fastguide: the public names
    ["__main__"],
]
FLOOR = {package: height for height, packages in enumerate(FLOORS) for package in packages}
FOUNDATION = {
    "_version",
    "_require_torch",
    "_counts",
    "_plain_tensors",
    "_token",
}  # single files, which every floor may use


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    package = list(path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            candidate = ".".join([*base, alias.name])
            found.add(candidate if candidate in MODULES else ".".join(base))
    return found - {module_name(path)}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FOUNDATION])
def test_packages_import_downward(name):
    package = name.partition(".")[0] or "fastguide"
    assert package in FLOOR, f"{name}: which floor is it on?"
    for imported in imported_modules(MODULES[name]) - FOUNDATION:
        other = imported.partition(".")[0] or "fastguide"
        assert other == package or FLOOR[other] < FLOOR[package], f"{name} imports {imported}, which is no lower"


def test_no_circle_within_a_package():
    graph = {name: imported_modules(path) for name, path in MODULES.items()}
    at_the_first_step = ("kernel", "backward", "moments", "groups")
    graph["step.backends.triton"] -= {f"step.backends.triton_{name}" for name in at_the_first_step}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle: {' <- '.join(error.args[1])}") from None


def test_the_package_is_imported_relatively():
    for path in PACKAGE.rglob("*.py"):
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)
        assert not re.search(r"^\s*(import fastguide|from fastguide)", code, re.M), path


CPP_FLOORS = [
    "maths",
    "kernels",
    "kernels/cpu",
    "kernels/gpu",
    "binding",
]  # files include their own folder and lower ones
CPP_FILES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())


def cpp_folder(path: Path) -> str:
    return path.parent.relative_to(ROOT / "csrc").as_posix()


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda p: p.relative_to(ROOT / "csrc").as_posix())
def test_cpp_folders_include_downward(path):
    text, folder = path.read_text(), cpp_folder(path)
    for included in re.findall(r'#include "([^"]+)"', text):
        other = cpp_folder(ROOT / "csrc" / included)
        assert CPP_FLOORS.index(other) <= CPP_FLOORS.index(folder), f"{path.name} includes {included}"
        assert (other, folder) != ("kernels/cpu", "kernels/gpu"), f"{path.name} includes {included}"
    if folder != "binding":
        assert not re.search(r"#include <(torch|ATen|c10)/", text)


def test_the_gpu_s_code_is_kept_from_what_it_does_not_need():
    """The kernel's threads compile for the host and the device; only element.h and the .cu files know CUDA."""
    for path in CPP_FILES:
        if path.name != "element.h" and path.suffix != ".cu":
            assert not re.search(r"#include <cu", path.read_text()), path


def test_row_columns_are_the_same_in_cpp():
    """And the only list of them in C++."""
    names = re.findall(r"^  X\((\w+)\)", (ROOT / "csrc/maths/step.h").read_text(), re.M)
    assert tuple(names) == fastguide.ROW_COLUMNS


def test_the_operator_s_arguments_are_the_same_in_cpp():
    schema = torch.ops.fastguide.guided_step.default._schema.arguments
    arguments = re.findall(r"^  X\((\w+), (\w+)\)", (ROOT / "csrc/kernels/arguments.h").read_text(), re.M)
    assert arguments == [(native._ARGUMENT_TYPES[str(argument.type)], argument.name) for argument in schema]


def test_switches_over_dtypes_have_no_default():
    """The compiler then refuses a switch that forgets one: -Werror=switch."""
    seen = 0
    for path in CPP_FILES:
        for body in re.findall(r"^( *)switch \([\w.]*element\) \{\n(.*?)\n\1\}", path.read_text(), re.M | re.S):
            seen += 1
            assert "default:" not in body[1], path
    assert seen >= 9
    assert "-Werror=switch" in (ROOT / "setup.py").read_text()


def test_sources_of_noise_are_the_same_in_python_and_cpp():
    text = (ROOT / "csrc/kernels/arguments.h").read_text()
    enum = re.search(r"enum class Noise : int \{(.*?)\};", text, re.S).group(1)
    assert tuple(re.findall(r"^\s*(\w+),", enum, re.M)) == noise.SOURCES


def test_no_fast_math_anywhere():
    for path in [ROOT / "setup.py", *CPP_FILES]:
        assert not re.search(r"-ffast-math|-Ofast|funsafe-math|use_fast_math", path.read_text()), path


def test_every_file_says_its_job_in_its_first_lines():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert re.match(r'"""[^\s"]', path.read_text()), path
    for path in CPP_FILES:
        assert path.read_text().startswith("// "), path


def test_no_file_is_longer_than_450_lines():
    for path in [
        *PACKAGE.rglob("*.py"),
        *CPP_FILES,
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]:
        assert len(path.read_text().splitlines()) <= 450, path


def test_the_public_api_is_all_and_documented():
    """What is not in ``__all__`` has no promise, and is a module."""
    names = {name for name in vars(fastguide) if not name.startswith("_")}
    assert {name for name in names if not isinstance(getattr(fastguide, name), types.ModuleType)} == set(
        fastguide.__all__
    )
    for name in fastguide.__all__:
        value = getattr(fastguide, name)
        assert value.__doc__ or isinstance(value, tuple), name


def test_what_type_checkers_read_of_guided_step_is_what_it_takes():
    """An overload repeats the parameters; only what return_log_prob may be differs."""
    source = (ROOT / "fastguide" / "step" / "guided_step.py").read_text()
    found = [node.args for node in ast.parse(source).body if getattr(node, "name", "") == "guided_step"]
    (told, last), (taken, last_taken) = (
        (
            [ast.unparse(each) for each in (*a.args, *a.kwonlyargs[:-1], *a.defaults, *a.kw_defaults)],
            a.kwonlyargs[-1].arg,
        )
        for a in (found[0], found[-1])
    )
    assert told == taken
    assert last == last_taken == "return_log_prob"


def test_import_needs_torch_only():
    """No optional package is imported by the library itself."""
    packages = ("diffusers", "sklearn", "matplotlib", "tqdm", "triton")
    code = (
        "import sys, torch\n"
        f"for _ in range(2):\n    print([m for m in {packages} if m in sys.modules])\n    import fastguide"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = run.stdout.splitlines()
    assert before == after


def test_native_library_needs_no_build_of_python_and_no_unstable_torch():
    """Its undefined symbols are libtorch's C shim, the system's, and weak functions of Python's C API."""
    if not native.LIBRARY.exists():
        pytest.skip("the native library is not built; fastguide info says why")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(native.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1].split("@")[0] for line in symbols.splitlines()]
    assert any(n.startswith("torch_") for n in names)
    weak = {line.split()[-1] for line in symbols.splitlines() if " w " in line}
    assert {n for n in names if n.startswith(("aoti_torch_get_current_cuda", "torch_c10_cuda", "Py", "_Py"))} <= weak
    for name in names:
        assert not name.startswith("_Py"), name
        assert not name.startswith("Py") or hasattr(ctypes.pythonapi, name), name
        assert not re.match(r"_ZN?K?\d*(2at|3c10|5torch)", name), name


def test_floors_of_torch_are_one():
    """What pip asks for, what the build asks for, what the import asks for, and what the C++ code is compiled for."""
    from fastguide._version import TORCH_FLOOR

    floor = ".".join(map(str, TORCH_FLOOR))
    assert set(re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())) == {floor}
    assert f"torch {floor} or newer" in (ROOT / "README.md").read_text()


def test_native_library_exports_no_kernel_symbols():
    """What it exports cannot clash with another library's."""
    if not native.LIBRARY.exists():
        pytest.skip("the native library is not built; fastguide info says why")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(native.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    found = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2] in "TDBR"]
    ours = [name for name in found if name not in ("__bss_start", "_edata", "_end")]  # the linker's
    assert sorted(ours) == sorted(native._EXPORTS)


def test_every_package_is_installed():
    """An editable install finds them all; a wheel has those that are named."""
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'"([^"]+)"', re.search(r"^packages = \[(.*?)^\]$", text, re.M | re.S).group(1))
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(named) == there
