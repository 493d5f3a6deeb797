"""Fixtures of the tests that interpret the native library's PTX."""

from __future__ import annotations

import pytest

from fastguide.step.backends import native
from tests.support.machine_code import cuobjdump
from tests.support.ptx.step import Library


@pytest.fixture(scope="session")
def library():
    """The library's kernels; the tests that use it are of one group, so that one process reads them."""
    if not native.LIBRARY.exists():
        pytest.skip("the native library is not built; fastguide info says why")
    if "PTX" not in native.cuda_code():
        pytest.skip(f"the native library holds no PTX: {native.cuda_code()}")
    return Library(cuobjdump("-ptx", native.LIBRARY))
