"""The oldest diffusers that is supported lacks schedulers that newer ones have: all others are served without them."""

import subprocess
import sys

import pytest

pytest.importorskip("diffusers")

NEWER = [
    "FlowMapEulerDiscreteScheduler",
    "HeliosScheduler",
    "LTXEulerAncestralRFScheduler",
    "PiflowScheduler",
    "RFD4ProteinaScheduler",
]
WITHOUT_THEM = """
import sys
import diffusers

newer = set(sys.argv[1:])
lazy, found = type(diffusers), type(diffusers).__getattr__

def older(module, name):
    if name in newer:
        raise AttributeError(name)
    return found(module, name)

lazy.__getattr__ = older
import fastguide.diffusers as ours

assert not newer & set(ours.__all__) and not any(hasattr(ours, name) for name in newer)
assert {"FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DDIMScheduler"} <= set(ours.__all__)
"""


def test_schedulers_that_diffusers_lacks_are_left_out() -> None:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_THEM, *NEWER], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
