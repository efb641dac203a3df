"""Changes of a range of leaves as compiled code: the one module that imports numba.

Stands for the loops of the kernel's TDP MMU at the speed of compiled ones.  It works on the very memory that
walkers read: every entry is one aligned 8-byte load and one such store, which is what the two intrinsics
below are for (plain stores of a loop may be made several at a time).  What it does not know (huge leaves,
pinned entries, traces) it leaves to kvmd/core/tables/ranges.py, whose loop run by run says what is right
(docs/decisions/0029).  Importing takes half a second, and the first time on a machine some more: never before
a daemon's socket listens.  `python -m protocol.pt.kernels` compiles and keeps it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from protocol.pt.bits import SAVED_SHIFT
from protocol.pt.format import TableFormat
from protocol.pt.geometry import ENTRIES, INDEX_BITS, MAX_LEVEL
from protocol.pt.leaf_edit import ALL_BITS, LeafEdit, RangeChange, SomePages
from protocol.pt.mem import TableWriter
from protocol.units import Hpa, Level

_U64 = types.uint64
_U64S = types.Array(_U64, 1, "C")
_U8S = types.Array(types.uint8, 1, "C", readonly=True)

# Signed constants would make numba reckon in floats.
_ONE, _THREE, _SEVEN, _NONE = (np.uint64(number) for number in (1, 3, 7, 0))
_INDEX_BITS, _ENTRIES, _INDEX_MASK = (np.uint64(number) for number in (INDEX_BITS, ENTRIES, ENTRIES - 1))
_SAVED_SHIFT = np.uint64(SAVED_SHIFT)
_LEAF, _ADDRESS = (np.uint64(at) for at in (2 * (MAX_LEVEL + 1), 4 * (MAX_LEVEL + 1)))  # places in `_rules`


@intrinsic  # type: ignore[untyped-decorator]
def _load(_: Any, words: Any, index: Any) -> Any:
    """One 8-byte load."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)

    return _U64(words, _U64), code


@intrinsic  # type: ignore[untyped-decorator]
def _store(_: Any, words: Any, index: Any, value: Any) -> Any:
    """One 8-byte store."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.store_atomic(args[2], builder.gep(data, [args[1]]), "release", 8)
        return context.get_dummy_value()

    return types.void(words, _U64, _U64), code


@njit  # type: ignore[untyped-decorator]
def _down(words: Any, base: Any, fmt: Any, root: Any, levels: Any, frame: Any) -> Any:
    """Where a way down towards `frame` ends: (level, entry, table of level 1 if the level is 1).  Level 0: a
    table lies in no memory."""
    table, level, entry = root, levels, _NONE
    while level > _ONE:
        entry = _load(words, (table - base >> _THREE) + (frame >> _INDEX_BITS * (level - _ONE) & _INDEX_MASK))
        if entry & fmt[level + level] != fmt[level + level + _ONE]:
            break
        table = entry & fmt[_ADDRESS]
        level -= _ONE
        if table < base or (table - base >> _THREE) + _ENTRIES > np.uint64(words.size):
            return _NONE, entry, table
    return level, entry, table


def _edit_leaves(
    words: Any,
    base: Any,
    fmt: Any,
    root: Any,
    levels: Any,
    frame: Any,
    end: Any,
    clear: Any,
    save: Any,
    wanted: Any,
    first_wanted: Any,
    limit: Any,
) -> Any:
    changed = had = _NONE
    keep = ~clear
    leaf_mask, leaf_value = fmt[_LEAF + _ONE + _ONE], fmt[_LEAF + _THREE]
    while frame < end and changed < limit:
        level, entry, table = _down(words, base, fmt, root, levels, frame)
        rule = _LEAF + level + level
        if level == _NONE or (level > _ONE and entry & fmt[rule] == fmt[rule + _ONE]):
            break
        if level > _ONE:
            shift = _INDEX_BITS * (level - _ONE)
            frame = (frame >> shift) + _ONE << shift
            continue
        at = (table - base >> _THREE) + (frame & _INDEX_MASK)
        stop = min(end, (frame >> _INDEX_BITS) + _ONE << _INDEX_BITS)
        if wanted.size == 0 and save == _NONE and stop - frame <= limit - changed:  # 0.16 ms a GiB, not 0.23
            last = at + (stop - frame)
            while at < last:
                entry = _load(words, at)
                if entry & leaf_mask == leaf_value:
                    new = entry & keep
                    if new != entry:
                        _store(words, at, new)
                        changed += _ONE
                        had |= entry
                at += _ONE
            frame = stop
            continue
        while frame < stop and changed < limit:
            entry = _load(words, at)
            page = frame - first_wanted
            if entry & leaf_mask == leaf_value and (
                wanted.size == 0 or np.uint64(wanted[page >> _THREE]) >> (page & _SEVEN) & _ONE
            ):
                new = entry & keep | (entry & save) << _SAVED_SHIFT
                if new != entry:
                    _store(words, at, new)
                    changed += _ONE
                    had |= entry
            at += _ONE
            frame += _ONE
    return min(frame, end), changed, had & clear


def _compiled(function: Any, *arguments: Any) -> Any:
    """Kept beside this file or among the user's, where one of both can be written to."""
    signature = types.UniTuple(_U64, 3)(*arguments)
    try:
        return njit(signature, cache=True)(function)
    except RuntimeError:  # nowhere to keep it
        return njit(signature)(function)


_edit = _compiled(_edit_leaves, _U64S, _U64, _U64S, *[_U64] * 6, _U8S, _U64, _U64)
_EVERY = np.frombuffer(b"", np.uint8)
_NOTHING = np.zeros(ENTRIES, np.uint64)
_edit(_NOTHING, 0, _NOTHING, 0, 1, 0, 0, 0, 0, _EVERY, 0, 0)  # the first call of a process is slow


class Kernels:
    """The port `RangeKernels`, over the tables that `writer` stores to."""

    def __init__(self, writer: TableWriter) -> None:
        self._base = writer.base
        self._words = np.frombuffer(writer.words, np.uint64)
        self._formats: dict[TableFormat, Any] = {}

    def edit_leaves(
        self,
        fmt: TableFormat,
        root: Hpa,
        levels: Level,
        start: int,
        end: int,
        edit: LeafEdit,
        wanted: SomePages | None,
        limit: int,
    ) -> RangeChange:
        assert 0 <= root - self._base <= self._words.nbytes - ENTRIES * 8, f"no table at {root:#x}"
        bits, base = _EVERY, start
        if wanted is not None:
            base = wanted.base
            bits = np.frombuffer(wanted.bits, np.uint8)
            assert base <= start <= end <= base + 8 * len(wanted.bits), f"{start:#x}..{end:#x} of {base:#x}"
        rules = self._formats.get(fmt)
        if rules is None:
            rules = self._formats[fmt] = _rules(fmt)
        where = self._words, self._base, rules, root, levels, start, end
        reached, changed, lost = _edit(*where, edit.clear, edit.save, bits, base, limit)
        return RangeChange(reached, changed, lost, gone=changed if edit.clear == ALL_BITS else 0)


def _rules(fmt: TableFormat) -> Any:
    """What tells entries apart: (mask, value) of a table by level, of a leaf by level, and the address."""
    return np.array([*sum(fmt.table, ()), *sum(fmt.leaf, ()), fmt.address], np.uint64)
