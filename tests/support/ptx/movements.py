"""Writes Python for the opcodes that move data and order it: registers, memory, atomics, fences, barriers, shuffles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.support.ptx import accesses, warps
from tests.support.ptx.arithmetic import UNSIGNED
from tests.support.ptx.opcodes import Handler
from tests.support.ptx.operands import EVERY_THREAD, Writer

VECTORS = {"v2": 2, "v4": 4, "v8": 8}
CACHE_HINTS = ("ca", "cg", "cs", "cv", "lu", "wb", "wt")
CACHE_HINTS += tuple(f"L1::{hint}" for hint in ("evict_first", "evict_last", "evict_normal", "no_allocate"))
CACHE_HINTS += tuple(f"L2::{size}" for size in ("64B", "128B", "256B"))

# ---- Registers ----


def _move(w: Writer) -> list[str]:
    w.only()
    if w.operands[1].startswith("{"):
        return _pack(w)
    if w.operands[0].startswith("{"):
        return _unpack(w)
    return w.write(w.read(1))


def _parts(w: Writer, position: int) -> tuple[tuple[str, ...], type, type]:
    """Return an operand's parts in braces, the dtype of a part, and that of all of them together."""
    parts, size = w.list_of(position), np.dtype(w.dtype).itemsize
    if len(parts) not in (2, 4) or size // len(parts) < 2:
        raise w.unknown()
    return parts, UNSIGNED[size // len(parts)], UNSIGNED[size]


def _pack(w: Writer) -> list[str]:
    parts, small, whole = _parts(w, 1)
    bits, dtype = 8 * np.dtype(small).itemsize, w.constant(whole)
    wide = (f"np.asarray({w.read_text(part, small)}).astype({dtype})" for part in parts)
    return w.write(" | ".join(f"({part} << {w.constant(whole(bits * k))})" for k, part in enumerate(wide)), whole)


def _unpack(w: Writer) -> list[str]:
    parts, small, whole = _parts(w, 0)
    bits, dtype = 8 * np.dtype(small).itemsize, w.constant(small)
    values = (f"(value >> {w.constant(whole(bits * k))}).astype({dtype})" for k in range(len(parts)))
    lines = [w.write_text(part, value, small) for part, value in zip(parts, values, strict=True)]
    return [f"value = {w.read(1, whole)}", *lines]


def _same_address(w: Writer) -> list[str]:
    """``cvta``: all state spaces that are known here have their generic addresses."""
    if w.modifiers not in (["to", "global", "u64"], ["global", "u64"]):
        raise w.unknown()
    return w.write(w.read(1))


# ---- Memory ----


def _space_and_order(w: Writer, *, load: bool) -> tuple[str, int, str]:
    """Return an access's state space, how many values it has, and its kind in trace.py."""
    space, count, kind = "any", 1, "read" if load else "write"
    orders = ("relaxed", "acquire") if load else ("relaxed", "release")
    order = next((modifier for modifier in w.modifiers if modifier in orders), None)
    for modifier in w.modifiers[:-1]:
        if modifier in ("global", "shared", "param", "shared::cta"):
            space = modifier.partition("::")[0]
        elif modifier in VECTORS:
            count = VECTORS[modifier]
        elif modifier == "nc" and load:
            kind = "constant read"
        elif modifier not in (*CACHE_HINTS, "weak", order) and not (modifier == "gpu" and order):
            raise w.unknown()
    if order is not None:
        if "gpu" not in w.modifiers or count > 1 or space not in ("any", "global") or kind == "constant read":
            raise w.unknown()
        kind = order
    return space, count, kind


def _load(w: Writer) -> list[str]:
    space, count, kind = _space_and_order(w, load=True)
    names, (named, address) = w.list_of(0), w.address(1)
    if len(names) != count:
        raise w.unknown()
    dtype = w.constant(w.dtype)
    if space == "param":
        lines = [f"values = {w.call(accesses.load_parameters, 'wave', address, dtype, count)}"]
        return lines + [w.write_text(name, f"values[..., {k}]", w.dtype, widen=True) for k, name in enumerate(names)]
    if space == "shared":
        call = w.call(accesses.load_shared, "wave", address, dtype, count, w.threads)
    elif named != "any":
        raise w.unknown()
    else:
        call = w.call(accesses.load, "wave", address, dtype, count, w.threads, repr(kind))
    lines = [w.write_text(name, f"values[:, {k}]", w.dtype, widen=True) for k, name in enumerate(names)]
    return [f"values = {call}", *lines]


def _store(w: Writer) -> list[str]:
    space, count, kind = _space_and_order(w, load=False)
    names, (named, address) = w.list_of(1), w.address(0)
    if len(names) != count or space == "param" or (named != "any" and space != named):
        raise w.unknown()
    values = "(" + ", ".join(w.read_text(name, w.dtype, narrow=True) for name in names) + ",)"
    if space == "shared":
        return [w.call(accesses.store_shared, "wave", address, w.constant(w.dtype), values, w.threads)]
    return [w.call(accesses.store, "wave", address, w.constant(w.dtype), values, w.threads, repr(kind))]


def _atomic(w: Writer) -> list[str]:
    """``atom`` and ``red``; without a word about its order it is relaxed, and of the GPU's scope."""
    operation = next((modifier for modifier in w.modifiers if modifier in accesses.UPDATES), None)
    shared = not {"shared", "shared::cta"}.isdisjoint(w.modifiers)
    orders = () if shared else ("global", "relaxed", "acquire", "release", "acq_rel", "gpu")
    w.only(*orders, *(("shared", "shared::cta") if shared else ()), operation or "")
    if operation is None or w.dtype not in (np.uint32, np.int32, np.uint64, np.int64):
        raise w.unknown()
    acquires, releases = (not {order, "acq_rel"}.isdisjoint(w.modifiers) for order in ("acquire", "release"))
    place, value = (1, 2) if w.instruction.root == "atom" else (0, 1)
    if len(w.operands) != value + 1:
        raise w.unknown()
    arguments = [w.address(place)[1], w.read(value), w.constant(w.dtype), repr(operation), w.threads]
    if shared:
        call = w.call(accesses.update_shared, "wave", *arguments)
    else:
        call = w.call(accesses.update, "wave", *arguments, acquires, releases)
    return w.write(call) if place else [call]


def _fence(w: Writer) -> list[str]:
    """A fence of the GPU's scope, or of a larger one; in a block, barriers are all that is known here."""
    known = ("membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.sc.gpu", "fence.acq_rel.sys", "fence.sc.sys")
    if w.instruction.opcode not in known:
        raise w.unknown()
    return [f"wave.order('fence', {w.threads})"]


# ---- Threads together ----


def _barrier(w: Writer) -> list[str]:
    kinds = [modifier for modifier in w.modifiers if modifier != "aligned"]
    if kinds in (["cluster", "wait"], ["cluster", "wait", "acquire"]) and not w.operands:
        return [f"wave.order('cluster', {w.threads})"]
    if w.instruction.opcode == "bar.warp.sync":
        if w.operands not in (("-1",), ("0xffffffff",), ("4294967295",)):
            raise w.unknown()
        return [f"wave.order('warp', {w.threads})"]
    if kinds == ["sync"] and w.operands == ("0",):
        return [f"wave.order('block', {w.threads})"]
    if kinds in (["red", "or", "pred"], ["red", "and", "pred"]) and len(w.operands) == 3 and w.operands[1] == "0":
        vote = w.call(warps.of_block, "wave", repr(kinds[1]), w.read(2, np.bool_), w.threads)
        return [f"wave.order('block', {w.threads})", *w.write(vote, np.bool_)]
    raise w.unknown()


def _shuffle(w: Writer) -> list[str]:
    if len(w.modifiers) != 3 or w.modifiers[0] != "sync" or w.modifiers[1] not in warps.SHUFFLES:
        raise w.unknown()
    if w.modifiers[2] != "b32" or len(w.operands) != 5:
        raise w.unknown()
    result, _, predicate = w.operands[0].partition("|")
    every = replace(w, threads=EVERY_THREAD).read(1, np.uint32)
    numbers = [w.read(k, np.uint32) for k in (2, 3, 4)]
    lines = [f"values, inside = {w.call(warps.shuffle, 'wave', repr(w.modifiers[1]), every, *numbers, w.threads)}"]
    lines.append(w.write_text(result, "values", np.uint32))
    return [*lines, w.write_text(predicate, "inside", np.bool_)] if predicate else lines


def _vote(w: Writer) -> list[str]:
    if w.modifiers not in (["sync", "any", "pred"], ["sync", "all", "pred"], ["sync", "ballot", "b32"]):
        raise w.unknown()
    if w.operands[2] not in ("-1", "0xffffffff", "4294967295"):
        raise w.unknown()
    return w.write(w.call(warps.vote, "wave", repr(w.modifiers[1]), w.read(1, np.bool_), w.threads))


def _matrix(w: Writer) -> list[str]:
    """``ldmatrix`` and ``stmatrix`` of 8 by 8 elements of 16 bits, not transposed."""
    sync, aligned, shape, count, *rest = [*w.modifiers, "", "", "", ""][:6]
    if [sync, aligned, shape] != ["sync", "aligned", "m8n8"] or count not in ("x1", "x2", "x4"):
        raise w.unknown()
    if rest not in (["shared", "b16"], ["shared::cta", "b16"]):
        raise w.unknown()
    load = w.instruction.root == "ldmatrix"
    address, names = w.address(int(load), EVERY_THREAD)[1], w.list_of(int(not load))
    if len(names) != int(count[1]):
        raise w.unknown()
    if load:
        lines = [f"values = {w.call(warps.load_matrix, 'wave', address, len(names), w.threads)}"]
        return lines + [w.write_text(name, f"values[{k}]", np.uint32) for k, name in enumerate(names)]
    every = replace(w, threads=EVERY_THREAD)
    values = "(" + ", ".join(every.read_text(name, np.uint32) for name in names) + ",)"
    return [w.call(warps.store_matrix, "wave", address, values, w.threads)]


HANDLERS: dict[str, Handler] = {
    **{"mov": _move, "cvta": _same_address, "ld": _load, "st": _store, "atom": _atomic, "red": _atomic},
    **{"membar": _fence, "fence": _fence, "bar": _barrier, "barrier": _barrier, "shfl": _shuffle, "vote": _vote},
    **{"ldmatrix": _matrix, "stmatrix": _matrix},
}
