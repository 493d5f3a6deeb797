"""Python processes of their own, and copies of the package, for tests of what an installation finds."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(code, **environment):
    """Run code in a new process, with these variables of its environment beside those of this one."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT / "tests",
    )


SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    code, environment, out, error = json.loads(line)
    child = os.fork()
    if child == 0:
        for path, descriptor in ((out, 1), (error, 2)):
            os.dup2(os.open(path, os.O_WRONLY), descriptor)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[1:1] = environment.get("PYTHONPATH", "").split(os.pathsep)
        status = 0
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT / "tests", **pipes)
    atexit.register(server.kill)
    return server


def run_python_with_torch(code, **environment):
    """Do the same in a process that is forked where torch has been imported, and nothing else: it begins at once.

    An exception of any kind makes the return code 1.
    """
    server = _server()
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as error:
        request = [code, {**os.environ, **environment}, out.name, error.name]
        print(json.dumps(request), file=server.stdin, flush=True)
        returncode = int(server.stdout.readline())
        return subprocess.CompletedProcess(server.args, returncode, out.read(), error.read())


def copied_package(folder: Path) -> None:
    """The Python part of the package alone, as an installation without a compiler leaves it."""
    shutil.copytree(ROOT / "fastguide", folder / "fastguide", ignore=shutil.ignore_patterns("_native.*", "__pycache__"))


CODE = """
import torch, fastguide
from fastguide.__main__ import info
print(fastguide.__file__)
table = fastguide.ddim(fastguide.NoiseSchedule.linear(), 5)
x = torch.ones(1, 2)
print(fastguide.guided_step(table, 0, x, [x]).tolist())
print(info())
try:
    fastguide.guided_step(table, 0, x, [x], backend="native")
except ValueError as error:
    print(error)
"""
