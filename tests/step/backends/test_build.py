"""The build: what an install does with and without compilers, in odd places, and when it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.processes import CODE, copied_package, run_python_with_torch

ROOT = Path(__file__).resolve().parents[3]
COMPILER = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
one_process = pytest.mark.xdist_group("build")  # what is compiled, it compiles for all


def build(tmp_path, path, **environment):
    """Without CUDA, unless it is asked for: that takes half a minute. What the caller exports is left out."""
    environment = {"FASTGUIDE_CUDA": "0", "CXX": "", "CUDA_HOME": "", "TORCH_CUDA_ARCH_LIST": "", **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
    )


def test_install_without_a_compiler_says_so_and_goes_on(tmp_path):
    result = build(tmp_path, path=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "fastguide: native backend not built: no C++ compiler was found at install" in result.stderr
    assert "no C++ compiler was found" in (tmp_path / "fastguide" / "_native.txt").read_text()
    assert not (tmp_path / "fastguide" / "_native.so").exists()


def test_an_install_on_windows_says_that_there_is_no_library(tmp_path):
    code = (
        "import runpy, sys, setuptools, setuptools.command.build_ext, setuptools.command.bdist_wheel\n"
        f"sys.platform, sys.argv = 'win32', ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "fastguide: native backend not built: there is none for Windows" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def copy_checkout(clone):
    """Copy what a clone holds that an install reads."""
    for folder in ("csrc", "fastguide"):
        ignored = shutil.ignore_patterns("_native.*", "__pycache__")
        shutil.copytree(ROOT / folder, clone / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / file, clone / file)


def call_backend(call, clone, **environment):
    """Call what pip calls to build a clone, without CUDA; it succeeds. Return what it says."""
    result = subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{call}"],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTGUIDE_CUDA": "0", **environment},
        cwd=clone,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr


def test_editable_install_without_a_compiler_replaces_what_was_there(tmp_path):
    """What pip install -e calls, on a machine without a compiler: it succeeds, and says why the step is slow."""
    checkout = tmp_path / "clone"
    copy_checkout(checkout)
    (checkout / "fastguide" / "_native.so").write_bytes(b"of an earlier install")
    call_backend(f"build_editable({str(tmp_path)!r})", checkout, PATH=str(Path(sys.executable).parent), CXX="")
    assert not (checkout / "fastguide" / "_native.so").exists()
    assert "no C++ compiler was found" in (checkout / "fastguide" / "_native.txt").read_text()
    assert "not built: no C++ compiler" in run_python_with_torch(CODE, PYTHONPATH=str(checkout)).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution in which a wheel was built, as a packager does, and its CXX.

    The folder's name needs to be quoted. CXX is a command of several words: first a wrapper, such as ccache is one;
    this one compiles in half the time, because it optimises nothing.
    """
    place = tmp_path_factory.mktemp("build")
    clone, source, wrapper = place / "clone", place / "a folder with $paces", place / "wrapper"
    copy_checkout(clone)
    shutil.copytree(ROOT / "tests", clone / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "fastguide" / "_native.so").write_bytes(b"of an editable install")
    call_backend("build_sdist('dist')", clone)
    (archive,) = (clone / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, place)
    (place / archive.name.removesuffix(".tar.gz")).rename(source)
    assert not list(source.rglob("*.so"))
    left = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "fastguide" / "old.py"
    left.parent.mkdir(parents=True)
    left.touch()
    wrapper.write_text('#!/bin/sh\nexec "$@" -O0\n')
    wrapper.chmod(0o755)
    cxx = f"{wrapper} {COMPILER} -pipe -B /usr/bin"
    call_backend("build_wheel('dist')", source, CXX=cxx)
    return source, cxx


@needs_compiler
@one_process
def test_the_sdist_builds_a_wheel_for_any_python(built):
    """Headers are in it, the wheel's tag is py3-none, and what an earlier build left is not packed."""
    source, _ = built
    assert (source / "tests" / "support" / "cases.py").exists()
    (wheel,) = (source / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastguide/_native.so" in names
    assert "fastguide/old.py" not in names
    assert "fastguide/demo/run.py" in names
    assert "fastguide/py.typed" in names


@needs_compiler
@one_process
def test_an_editable_install_compiles_what_changed(built, tmp_path):
    """Objects are kept in build/native, for every kind of install."""
    source, cxx = built
    objects, library = source / "build" / "native", source / "fastguide" / "_native.so"

    def times():
        return {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}

    def install():
        said = call_backend(f"build_editable({str(tmp_path)!r})", source, CXX=cxx)
        assert "fastguide: native library built for the CPU (baseline" in said
        assert "for GPUs: none: FASTGUIDE_CUDA was 0" in said
        assert library.exists()
        return times()

    first = times()
    assert "operator.o" in first
    assert not library.exists()
    assert install() == first
    library.unlink()
    changed = source / "csrc" / "binding" / "operator.cpp"
    changed.write_text(f"{changed.read_text()}// changed\n")
    assert {name for name, when in install().items() if when != first[name]} == {"operator.o"}


@pytest.mark.parametrize("cxx", ["no-such-compiler", "no-such-wrapper g++"])
def test_a_cxx_that_is_not_there_is_an_error(tmp_path, cxx):
    result = build(tmp_path, path=os.environ["PATH"], CXX=cxx)
    assert result.returncode != 0
    assert f"fastguide: CXX: expected a compiler, got '{cxx}', which is not there" in result.stderr


def test_install_with_a_compiler_that_fails_fails(tmp_path):
    """A compiler that is there and fails is an error: nobody gets the slow backend without being told."""
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = build(tmp_path, path=os.environ["PATH"], CXX=str(compiler))
    assert result.returncode != 0
    assert "cannot compile" in result.stdout + result.stderr
    assert "fastguide: the native library could not be compiled: the error is above" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTGUIDE_CUDA": "yes"}, "FASTGUIDE_CUDA: expected 0, 1 or nothing, got 'yes'"),
        (
            {"FASTGUIDE_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "FASTGUIDE_CUDA=1: expected nvcc, which is not in CUDA_HOME=/nowhere",
        ),
        ({"FASTGUIDE_CUDA": "1", "PATH": "/nowhere", "CXX": ""}, "FASTGUIDE_CUDA=1: expected a C++ compiler too"),
    ],
)
def test_what_is_asked_of_cuda_and_cannot_be_is_an_error(tmp_path, environment, message):
    result = build(tmp_path, **{"path": os.environ["PATH"], **environment})
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("9.0;hopper", "TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got 'hopper'"),
        ("9.0+SASS", "TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got '9.0+SASS'"),
        ("1.0", "has no code for '1.0'; it knows"),
    ],
)
def test_architectures_that_cannot_be_are_an_error(tmp_path, architectures, message):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on the PATH")
    environment = {"FASTGUIDE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    result = build(tmp_path, path=os.environ["PATH"], **environment)
    assert result.returncode != 0
    assert message in result.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\necho no licence >&2; exit 3\n", "nvcc --list-gpu-arch fails with 3, and says no licence. Mend it"),
        ("not a program\n", "nvcc cannot be run: "),
        ("#!/bin/sh\necho compute_80\n", "nvcc is too old for sm_90, which is left out"),
        ("#!/bin/sh\necho compute_80\n", "nvcc --dryrun does not say where its toolkit is"),
    ],
)
def test_an_nvcc_that_does_not_work_is_named(tmp_path, script, message):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(script)
    nvcc.chmod(0o755)
    for wanted in ("", "1"):
        result = build(tmp_path, os.environ["PATH"], FASTGUIDE_CUDA=wanted, CUDA_HOME=str(tmp_path / "toolkit"))
        assert result.returncode != 0
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@needs_compiler
@one_process
def test_without_cuda_code_a_gpu_s_sample_is_refused_with_the_reasons(built, tmp_path):
    """Nobody gets the reference, a hundred times slower, without asking for it."""
    source, _ = built
    (wheel,) = (source / "dist").glob("*.whl")
    copied_package(tmp_path / "copy")
    zipfile.ZipFile(wheel).extract("fastguide/_native.so", tmp_path / "copy")
    code = (
        "import fastguide, sys, importlib.util; from fastguide.step.backends import native, triton\n"
        "print(fastguide.__file__, native.cuda_code())\n"
        "from fastguide.step.backends.registry import BACKENDS, _defaults, default_backend\n"
        "BACKENDS['triton'] = BACKENDS['triton']._replace(devices=(), status='not installed: pip install triton')\n"
        "_defaults.pop('cuda', None)\n"
        "default_backend('cuda')"
    )
    result = run_python_with_torch(code, PYTHONPATH=str(tmp_path / "copy"))
    assert result.stdout.endswith("none: FASTGUIDE_CUDA was 0\n")
    assert "ValueError: backend: no backend can run on a GPU here (native: C++" in result.stderr
    assert "triton: not installed: pip install triton); pass backend='reference'" in result.stderr
