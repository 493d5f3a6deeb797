"""What the ranks of a mesh have to agree on once a run: compared by hashes, and refused by name where they differ."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...guidance import Guidance
from ...guidance.moment_weights import MomentWeights
from ...solvers.table import StepTable
from ...step.momentum import updates_key
from ..request import SampleRequest

_HOST = torch.device("cpu")
_HASHES: WeakKeyDictionary[object, int] = WeakKeyDictionary()
"""Of tables and guidance, which never change."""


class Fact(NamedTuple):
    """Something on which ranks may differ by mistake."""

    name: str
    """The argument, for the message."""
    text: str
    """What this rank has, for the message."""
    hashed: int
    everywhere: bool
    """Whether all ranks have to agree, or those alone that make the same samples."""


def facts(whole: SampleRequest, share: SampleRequest, settings: str, cached: bool, alone: bool) -> list[Fact]:
    """Return the facts of a run, always as many and in the same order.

    Args:
        whole: the request that each rank was given.
        share: its part for this rank.
        settings: the sampler's, as text.
        cached: whether this rank has the buffers for the run.
        alone: whether no other rank makes the same samples, so that values need not be read.
    """
    x, conditions = whole.x_T, whole.conditions_signature
    given = ["labels"] if whole.labels is not None else []
    given += [f"a mask and an image from call {whole.begin} on"] if whole.inpainting is not None else []
    given += [f"a beginning at call {whole.begin}"] if whole.inpainting is None and whole.begin else []
    reads = not alone and share.x_T.numel()
    noise = None if alone else share.noise.origin()
    return [
        _fact("x_T", f"{x.dtype} of shape {tuple(x.shape)}"),
        _fact("cond", f"{conditions} for {len(whole.conditions)} predictions"),
        _fact("labels, image, mask and strength", " and ".join(given) or "none"),
        Fact("table", repr(whole.table), _hash_of_table(whole.table), True),
        Fact("guidance", repr(whole.guidance), _hash_of_guidance(whole.guidance), True),
        _fact("sampler", settings),
        _fact("x_T", _values(share.first if reads else None), everywhere=False),
        _fact("image and mask", _values(*(share.inpainting or ()) if reads else ()), everywhere=False),
        _fact("labels", _values(share.labels if reads else None), everywhere=False),
        Fact("seeds or generator", _shortened(noise), hash_of(repr((whole.noise.source, noise))), False),
        _fact("sampler", "buffers of an earlier call" if cached else "no buffers yet; call clear() on all", False),
    ]


FACTS = 11
"""How many there are."""


def difference(hashes: Sequence[Sequence[Sequence[int]]], everywhere: Sequence[bool]) -> int | None:
    """Return the first fact on which ranks differ.

    Args:
        hashes: of all facts, by the ranks' coordinates in the dimensions data and guidance.
        everywhere: for each fact, whether it is the same on all ranks.
    """
    for number, of_all in enumerate(everywhere):
        if any({ranks[number] for ranks in data} != {data[0][number]} for data in hashes):
            return number
        if of_all and {data[0][number] for data in hashes} != {hashes[0][0][number]}:
            return number
    return None


def hash_of(*parts: str | bytes) -> int:
    """Return 64 bits, as a signed integer."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "little", signed=True)


def _fact(name: str, text: str, everywhere: bool = True) -> Fact:
    return Fact(name, text, hash_of(text), everywhere)


def _shortened(noise: Any) -> str:
    text = "none" if noise is None else repr(noise)
    return text if len(text) < 80 else f"{text[:40]} ... of {hash_of(text):016x}"


def _values(*tensors: Tensor | None) -> str:
    """Return a hash of the values of some tensors, for a message; waits for the device."""
    hashes = [f"{int(torch.hash_tensor(tensor).item()):016x}" for tensor in tensors if tensor is not None]
    return f"values of hash {' and '.join(hashes)}"


def _hash_of_table(table: StepTable) -> int:
    found = _HASHES.get(table)
    if found is None:
        rows = [values for values in (table.rows, *table.forms.values()) if isinstance(values, Tensor)]
        about = repr((table.host_timesteps, table.in_scales, table.learned_variance))
        found = _HASHES[table] = hash_of(about, *map(_bytes, rows))
    return found


def _hash_of_guidance(guidance: Guidance) -> int:
    found = _HASHES.get(guidance)
    if found is None:
        parts: list[str | bytes] = [repr(guidance), _bytes(guidance.weights(_HOST, torch.float64))]
        parts.append(repr(updates_key(guidance)))
        if isinstance(guidance.weights_from, MomentWeights):
            parts += [repr(guidance.weights_from.dims), *map(_bytes, guidance.weights_from.on(_HOST))]
        found = _HASHES[guidance] = hash_of(*parts)
    return found


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.to(_HOST).contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
