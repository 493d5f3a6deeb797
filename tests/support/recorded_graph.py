"""A CUDA graph's stand-in on the CPU: what a function did to which memory, done again without calling the function.

As with a graph, Python runs at the capture alone, every tensor keeps its memory, and what is to change from replay to
replay has to change in that memory.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastguide.sampling import capture as graphs


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.calls.append((function, arguments, keywords or {}, result))
        return result


class RecordedGraph:
    captured = 0

    def __init__(self, function, pool):
        for _ in range(graphs.WARM_UPS):
            function()
        with Recorder() as recorder:
            function()
        self.calls = recorder.calls
        RecordedGraph.captured += 1

    @torch.no_grad()
    def replay(self):
        for function, arguments, keywords, result in self.calls:
            again = function(*arguments, **keywords)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(new, torch.ScriptObject) and hasattr(new, "wait"):  # an all-gather under way
                    new.wait()
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Sampler takes the CPU for a device with graphs; returns the class that counts its captures."""
    monkeypatch.setattr("fastguide.sampling.capture.can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "Graph", RecordedGraph)
    RecordedGraph.captured = 0
    return RecordedGraph
