"""Count what a recorded computation and its backward pass allocate, byte by byte: the same numbers on every machine.

torch's own allocator reports each tensor. What C++ code keeps in vectors of its own is not counted: of a step, that is
some numbers for each 16384 elements, where a scale is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_MARK = 4093
"""Bytes of the allocation that parts the two passes."""


class _Event(NamedTuple):
    """An allocation, or the end of one."""

    address: int
    size: int
    """In bytes, negative at its end."""
    made: int
    """The number of the event that it began with."""


class Memory(NamedTuple):
    """Bytes of both passes, beyond the tensors that were there before."""

    kept: int
    """Between the passes, beside the outputs."""
    kept_of_the_caller_s: int
    """Of the inputs, which cannot be freed between the passes."""
    own: int
    """At most, beside the outputs and the gradients."""
    peak: int
    """At most, in all."""


def memory_of(forward: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], came: Sequence[Tensor]) -> Memory:
    """Return what is allocated by ``forward`` and by the backward pass of its outputs.

    Args:
        forward: called with gradients enabled; returns the outputs.
        inputs: what gets gradients.
        came: the gradients of the outputs.
    """
    _both(forward, inputs, came)  # tables and weights are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = _both(forward, inputs, came)
    events = list(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    last = _made_last(events, {tensor.untyped_storage().data_ptr() for tensor in results})
    total = own = peak = most = kept = 0
    for _, size, made in events:
        if abs(size) == _MARK:
            kept = own
            continue
        total += size
        own += 0 if made in last else size
        peak, most = max(peak, total), max(most, own)
    return Memory(kept, _kept_of(inputs, forward), most, peak)


def _made_last(events: Sequence[_Event], addresses: set[int]) -> set[int]:
    """Return the numbers of the allocations that these addresses are of in the end."""
    live: dict[int, int] = {}
    for address, size, made in events:
        if size > 0:
            live[address] = made
        else:
            live.pop(address, None)
    return {made for address, made in live.items() if address in addresses}


def _both(
    forward: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], came: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        outputs = tuple(forward())
    torch.empty(_MARK, dtype=torch.uint8)
    return *outputs, *torch.autograd.grad(outputs, inputs, came)


def _allocations(nodes: Sequence[Any]) -> Iterator[_Event]:
    """Yield what torch's allocator has done, in the order of time."""
    waiting, found = list(nodes), []
    while waiting:
        node = waiting.pop()
        waiting += node.children
        if type(node.extra_fields).__name__ == "_ExtraFields_Allocation":
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    live: dict[int, int] = {}
    for number, (_, address, size) in enumerate(sorted(found, key=lambda event: event[0])):
        made = number if size > 0 else live.pop(address, -1)
        if size > 0:
            live[address] = number
        yield _Event(address, size if made >= 0 else 0, made)  # of what was there before: nothing


def _kept_of(inputs: Sequence[Tensor], forward: Callable[[], Sequence[Tensor]]) -> int:
    """Return the bytes of inputs that autograd keeps."""
    ours = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in inputs}
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        seen.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    del outputs
    return sum(size for address, size in ours.items() if address in seen)
