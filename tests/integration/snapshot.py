"""The tables of a running system as they lie in memory at one moment, taken as a debugger would.

Those who store into tables are stopped (SIGSTOP) wherever they are, between any two stores; their memfds are
read by /proc.  Which tables units walk is found as a unit finds it: from RTADDR by root, context and PASID
entries [VT-d 9.1], [VT-d 9.4] to [VT-d 9.6], read here from raw words once more.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from iommufdd.memory import TABLES_START
from iommufdd.unit_memory import STRUCTURES_START
from protocol.hostmem import LOW_RAM_START
from protocol.units import MIB
from tests.kit.daemons import System
from tests.oracle.table import RawTables

RTADDR = 0x20
ADDRESS = 0x000F_FFFF_FFFF_F000
SECOND_STAGE = 2  # PGTT


class Root(NamedTuple):
    hpa: int
    levels: int


@dataclass(frozen=True)
class Snapshot:
    """`kvm`: the TDP's memory; `io`: that of IOASes' tables; `walked`: the tables before which a unit is."""

    kvm: RawTables
    io: RawTables
    walked: list[Root]

    def memory_of(self, root: int) -> RawTables:
        return self.io if root >= self.io.base else self.kvm


@contextmanager
def stopped(system: System, *names: str) -> Iterator[None]:
    """Those daemons stand still meanwhile, wherever they are."""
    try:
        for name in names:
            system.signal(name, signal.SIGSTOP)
        yield
    finally:
        for name in names:
            system.signal(name, signal.SIGCONT)


def snapshot(system: System) -> Snapshot:
    kvm = RawTables(LOW_RAM_START, memory_file(system.pid("kvmd"), "tdp-tables"))
    iommufdd = system.pid("iommufdd")
    io = RawTables(TABLES_START, memory_file(iommufdd, "iommu-tables"))
    structures = RawTables(STRUCTURES_START, memory_file(iommufdd, "dmar-tables"))
    stores = RawTables(0, memory_file(iommufdd, "dmar-stores"))
    return Snapshot(kvm, io, list(walked_roots(structures, stores.entry(0, RTADDR // 8))))


def memory_file(pid: int, name: str) -> bytearray:
    """What a process has written into its memfd of that name, and some of the hole behind the last of it:
    there may be tables that nothing was stored into yet.
    """
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if re.fullmatch(rf"/memfd:{name}( \(deleted\))?", os.readlink(fd)):
            with fd.open("rb", buffering=0) as file:
                return bytearray(os.pread(file.fileno(), _end_of_data(file.fileno()), 0) + bytes(MIB))
    raise LookupError(f"process {pid} has no memfd {name}")


def _end_of_data(fd: int) -> int:
    """It is sparse: to read all of it would take long."""
    size, at = os.fstat(fd).st_size, 0
    while at < size:
        try:
            at = os.lseek(fd, os.lseek(fd, at, os.SEEK_DATA), os.SEEK_HOLE)
        except OSError:  # ENXIO: no more data
            return at
    return size


def walked_roots(structures: RawTables, rtaddr: int) -> Iterator[Root]:
    """Of every present PASID entry that a function has."""
    for context in _present_halves(structures, rtaddr & ADDRESS):
        for index in range(128):
            low = structures.entry(context, 4 * index)
            if low & 1:
                yield from _of_directory(structures, low & ADDRESS, 1 << (low >> 9 & 7) + 7)


def _present_halves(structures: RawTables, root: int) -> Iterator[int]:
    for half in range(2 * 256):
        word = structures.entry(root, half)
        if word & 1:
            yield word & ADDRESS


def _of_directory(structures: RawTables, directory: int, entries: int) -> Iterator[Root]:
    for number in range(min(entries, 512)):
        table = structures.entry(directory, number)
        if table & 1:
            for pasid in range(64):
                word = structures.entry(table & ADDRESS, 8 * pasid)
                if word & 1:
                    assert word >> 6 & 7 == SECOND_STAGE, f"PASID entry {word:#x}"
                    yield Root(word & ADDRESS, (word >> 2 & 7) + 2)
