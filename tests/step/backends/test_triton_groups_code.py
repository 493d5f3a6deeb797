"""The Triton step that makes weights of groups, compiled ahead of time: in registers, with wide accesses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.machine_code import instructions, resource_usage

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("triton code")

WIDE = {  # of compile_triton_groups.py: loads and stores of 16 bytes of a thread's eight elements, two for float32
    "tokens in 16 bits": (1 + 1 + 1, 1),
    "portable noise": (1 + 1 + 2, 2),
    "three and the sample": (3 * 2 + 2, 2),
    "a large group": (2 * (1 + 1) + 2, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All compiled, in a process that does not interpret."""
    folder = tmp_path_factory.mktemp("triton-groups")
    script = Path(__file__).parents[2] / "support" / "compile_triton_groups.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[2])}
    run = subprocess.run([sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


def test_machine_code(folder):
    cubins = {cubin.stem: cubin for cubin in folder.glob("*.cubin")}
    assert cubins.keys() == WIDE.keys()
    for name, cubin in cubins.items():
        ((_, _, used),) = resource_usage(cubin)
        assert used.registers <= 144, name  # 139 with Triton 3.6, of three predictions and the sample
        assert used.stack == used.local == 0
        (counts,) = instructions(cubin).values()
        assert not any(each.startswith(("LDL", "STL")) for each in counts)
        wide = [
            sum(n for each, n in counts.items() if re.match(kind + r"\.E(\.\w+)*\.128", each))
            for kind in ("LDG", "STG")
        ]
        assert all(got >= least for got, least in zip(wide, WIDE[name], strict=True)), (name, wide)
        assert not re.search(r"\b(div|sqrt)\.(approx|full)", cubin.with_suffix(".ptx").read_text())
    (code,) = folder.glob("*.amdgcn")
    assert "scratch_store" not in code.read_text()
