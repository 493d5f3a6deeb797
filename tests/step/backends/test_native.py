"""The native backend: where it is, that it is chosen, and what is said when it is not there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastguide
from fastguide.__main__ import info
from fastguide.step.backends import native
from fastguide.step.backends.registry import BACKENDS, default_backend
from tests.support.cases import TABLES
from tests.support.processes import CODE, copied_package, run_python_with_torch

ROOT = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="there is no C++ compiler"
)


def test_native_is_built_wherever_there_is_a_compiler():
    if shutil.which("g++") or shutil.which("clang++"):
        assert BACKENDS["native"].serves("cpu"), BACKENDS["native"].status
        assert default_backend("cpu") == "native"


def test_gpus_are_served_wherever_there_is_nvcc_too():
    if native.cuda_code().startswith("none"):
        pytest.skip(f"the native library holds no CUDA code: {native.cuda_code()}")
    assert BACKENDS["native"].serves("cuda")
    assert BACKENDS["native"].torch_stream
    assert default_backend("cuda") == "native"


def test_a_driver_that_is_too_old_leaves_gpus_to_others(monkeypatch):
    if native.cuda_code().startswith("none"):
        pytest.skip(f"the native library holds no CUDA code: {native.cuda_code()}")

    class Old:
        def __getattr__(self, name):
            return (lambda: 1) if name == "fastguide_driver_too_old" else getattr(library, name)

    library = native._loaded()
    monkeypatch.setattr(native, "_library", library)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: Old())
    found = native.backend()
    assert found.devices == ("cpu",)
    assert not found.torch_stream
    assert "of no use here: the driver is older than its CUDA runtime" in found.status


def test_capability_is_bounded_by_the_processor_and_kept():
    before = native.cpu_capability()
    try:
        assert native.set_cpu_capability("baseline") == "baseline" == native.cpu_capability()
        assert native.set_cpu_capability(before) == before
        with pytest.raises(ValueError, match=r"capability: expected one of .* got 'sse9'"):
            native.set_cpu_capability("sse9")
    finally:
        native.set_cpu_capability(before)


def test_capability_variable_bounds_and_is_announced():
    code = "from fastguide.__main__ import info; print(info())"
    out = run_python_with_torch(code, FASTGUIDE_CPU_CAPABILITY="baseline").stdout
    assert "instruction set baseline (bounded by FASTGUIDE_CPU_CAPABILITY=baseline)" in out
    assert (
        "FASTGUIDE_CPU_CAPABILITY: expected one of"
        in run_python_with_torch(code, FASTGUIDE_CPU_CAPABILITY="fast").stderr
    )


def test_without_the_library_the_reference_works_and_info_says_why(tmp_path):
    copied_package(tmp_path)
    (tmp_path / "fastguide" / "_native.txt").write_text("no C++ compiler was found at install\n")
    result = run_python_with_torch(CODE, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert "native     serves nothing here: not built: no C++ compiler was found at install" in result.stdout
    assert "cpu        reference" in result.stdout
    assert "backend: 'native' does not serve a sample on 'cpu' here: not built" in result.stdout
    x = torch.ones(1, 2)
    table = fastguide.ddim(fastguide.NoiseSchedule.linear(), 5)
    assert str(fastguide.guided_step(table, 0, x, [x], backend="reference").tolist()) in result.stdout


BROKEN = """
import torch, fastguide
from fastguide.__main__ import info
print(info())
table = fastguide.ddim(fastguide.NoiseSchedule.linear(), 5)
x = torch.ones(1, 2)
for backend in (None, None, "native", "reference"):
    try:
        print("a step:", fastguide.guided_step(table, 0, x, [x], backend=backend).shape)
    except ValueError as error:
        print(error)
"""


def loads_and_needs(tmp_path, symbol):
    """A library that is one, but needs what no torch has."""
    source = tmp_path / "needs.c"
    source.write_text(f"void {symbol}(void);\nvoid fastguide(void) {{ {symbol}(); }}\n")
    library = tmp_path / "fastguide" / "_native.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)


@pytest.mark.parametrize(
    ("what", "meaning"),
    [
        ("no library", r"it is no library for \w+ on \w+; install fastguide again \(.*ELF"),
        ("half of it", r"it was not copied whole; install fastguide again \(.*file too short: 99999 bytes of \d+\)"),
        ("its head", r"it was not copied whole; install fastguide again \(.*file too short: 40 bytes of 64\)"),
        ("another's", r"install fastguide again .* \(.*another library, or another version: it has no fastguide_"),
        ("nothing", r"install fastguide again .* \(.*No such file"),
        ("a newer torch's", r"torch [\w.+]+ lacks what it was built for, .* \(.*undefined symbol: torch_of_tomorrow\)"),
    ],
)
def test_a_library_that_cannot_be_loaded_is_an_error_once_it_is_used(tmp_path, what, meaning):
    """Importing says so, info shows it, and nothing slower is taken in its place."""
    copied_package(tmp_path)
    library = tmp_path / "fastguide" / "_native.so"
    if what == "no library":
        library.write_bytes(b"not a library" * 100)
    elif what in ("half of it", "its head"):
        if not native.LIBRARY.exists():
            pytest.skip("the native library is not built; fastguide info says why")
        library.write_bytes(native.LIBRARY.read_bytes()[: 40 if what == "its head" else 99999])
    elif what != "nothing":
        if shutil.which("gcc") is None:
            pytest.skip("there is no gcc")
        loads_and_needs(tmp_path, "torch_of_tomorrow" if what == "a newer torch's" else "abort")
    there = "not there" if what == "nothing" else "there, but cannot be loaded"
    result = run_python_with_torch(BROKEN, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"UserWarning: fastguide: the native backend is {there}: " in result.stderr
    lines = result.stdout.splitlines()
    (shown,) = [line for line in lines if line.startswith("  native ")]
    assert re.search(f"serves nothing here: {there}: {meaning}", shown), shown
    assert any(line.startswith("  cpu        none: backend: no backend for a sample on 'cpu'") for line in lines)
    (first, second, named, reference) = lines[-4:]
    assert first == second
    assert re.search(
        rf"no backend for a sample on 'cpu' \(native: {there}: {meaning}.*; pass backend='reference'", first
    )
    assert f"'native' does not serve a sample on 'cpu' here: {there}" in named
    assert reference == "a step: torch.Size([1, 2])"


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("/a.so: undefined symbol: torch_x", "lacks what it was built for"),
        ("/lib/libc.so.6: version `GLIBC_2.39' not found (required by /a.so)", "built on a newer system"),
        ("/lib/libstdc++.so.6: version `CXXABI_1.3.15' not found", "built on a newer system"),
        ("/a.so: wrong ELF class: ELFCLASS32", "no library for"),
        ("/a.so: file too short", "not copied whole"),
        ("/a.so: cannot open shared object file: Permission denied", "install fastguide again"),
    ],
)
def test_what_the_loader_says_is_explained(error, meaning):
    explanation = native._explain(error)
    assert meaning in explanation
    assert explanation.endswith(f"({error})")


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cpu"])
def test_a_torch_below_the_floor_is_named(version):
    code = f"import torch; torch.__version__ = {version!r}; import fastguide"
    result = run_python_with_torch(code, PYTHONPATH=str(ROOT))
    assert result.returncode != 0
    said = f"expected torch 2.10 or newer, got {version}: pip install 'torch>=2.10'"
    assert result.stderr.strip().endswith(said)
    assert re.search(r"ImportError: fastguide \d", result.stderr)


def test_info_names_versions_backends_and_packages():
    text = info()
    for part in (
        f"fastguide {fastguide.__version__}",
        f"torch {torch.__version__}",
        "native",
        "reference",
        "torch's noise on the CPU: drawn by t",
        "diffusers",
    ):
        assert part in text


def test_threads_give_the_same_bits_as_one(generator):
    table = TABLES["ddim"]
    x, p = torch.randn(2, 3, 5, 100, 101, generator=generator)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(fastguide.guided_step(table, 2, x, [p]))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
