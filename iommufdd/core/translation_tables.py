"""What leads a remapping unit from a function and a PASID to a table: root, contexts, directories, entries.

Models the tables that the VT-d driver keeps for a unit in scalable mode [VT-d 9], [Linux intel/pasid.c]: one
root table; half a bus to a context table; for each function a directory of its own, since functions share no
PASID entry, with a table of 64 PASIDs, which is all that is ever used.
Must hold (I29):
  - an entry goes in by stores of 8 bytes, word 0 with P last: nobody sees P over the rest of another entry;
  - it goes out by P first, and the rest is cleared when the unit was told to forget it and said it did.
The unit keeps no entry that was not present (CAP.CM is 0): one that goes in needs no invalidation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from protocol.hw.context_entry import (
    ContextEntry,
    PasidDirEntry,
    RootEntry,
    context_index,
    pasid_index,
    root_index,
)
from protocol.hw.pasid_entry import PASID_ENTRY_SIZE, PasidEntry
from protocol.hw.vtd_regs import RTADDR_RTA, RTADDR_TTM, TranslationTableMode
from protocol.pt.mem import TableWriter
from protocol.units import Hpa, Pasid

_WORD = 8


class TranslationTables:
    """Of one unit; `allocate` gives a zeroed page of `memory`.  Raises UapiError as that does."""

    def __init__(self, memory: TableWriter, allocate: Callable[[], Hpa]) -> None:
        self._memory = memory
        self._allocate = allocate
        self._root = allocate()
        self._contexts: dict[tuple[int, bool], Hpa] = {}
        self._pasid_tables: dict[int, Hpa] = {}

    @property
    def rtaddr(self) -> int:
        """What RTADDR is to be."""
        return RTADDR_RTA.put(self._root) | RTADDR_TTM.put(TranslationTableMode.SCALABLE)

    def add_function(self, rid: int, *, ats: bool, pasid: bool, pri: bool) -> None:
        """What it may ask at all [Linux intel/iommu.c]; which table translates it its PASID entry says."""
        context = self._context_of(rid)
        directory, table = self._allocate(), self._allocate()
        self._put(directory, PasidDirEntry(present=True, pasid_table=table).words())
        entry = ContextEntry(present=True, dte=ats, paside=pasid, pre=pri, pasid_dir=directory)
        self._put(context, entry.words())
        self._pasid_tables[rid] = table

    def _context_of(self, rid: int) -> Hpa:
        """Where its context entry lies, the table there made if it has to be."""
        upper, index = context_index(rid)
        bus = root_index(rid)
        if (bus, upper) not in self._contexts:
            table = self._contexts[bus, upper] = self._allocate()
            half = RootEntry(lower_present=True, lower=table).words()[0]
            self._memory.store64(Hpa(self._root + bus * RootEntry.SIZE + upper * _WORD), half)
        return Hpa(self._contexts[bus, upper] + index * ContextEntry.SIZE)

    def has(self, rid: int) -> bool:
        """Was it ever added?"""
        return rid in self._pasid_tables

    def retire_context_entry(self, rid: int) -> None:
        """The function may ask for nothing more; the unit may remember what it might until it is told."""
        self._retire(self._context_of(rid))

    def clear_context_entry(self, rid: int) -> None:
        """Nobody remembers it."""
        self._clear(self._context_of(rid), ContextEntry.SIZE, f"function {rid:#x}")

    def put_pasid_entry(self, rid: int, pasid: Pasid, entry: PasidEntry) -> None:
        at = self._pasid_entry_at(rid, pasid)
        assert not self._memory.load64(at) & 1, f"I29: function {rid:#x}, PASID {pasid}: an entry is present"
        raw = entry.to_bytes()
        self._put(at, [int.from_bytes(raw[n : n + _WORD], "little") for n in range(0, len(raw), _WORD)])

    def retire_pasid_entry(self, rid: int, pasid: Pasid) -> None:
        """It is not present any more; the unit may remember it until it is told."""
        self._retire(self._pasid_entry_at(rid, pasid))

    def clear_pasid_entry(self, rid: int, pasid: Pasid) -> None:
        """Nobody remembers it."""
        what = f"function {rid:#x}, PASID {pasid}"
        self._clear(self._pasid_entry_at(rid, pasid), PASID_ENTRY_SIZE, what)

    def _pasid_entry_at(self, rid: int, pasid: Pasid) -> Hpa:
        directory, index = pasid_index(pasid)
        assert directory == 0, f"PASID {pasid:#x}: the driver uses the first 64"
        return Hpa(self._pasid_tables[rid] + index * PASID_ENTRY_SIZE)

    def _retire(self, at: Hpa) -> None:
        self._memory.store64(at, self._memory.load64(at) & ~1)

    def _clear(self, at: Hpa, size: int, what: str) -> None:
        assert not self._memory.load64(at) & 1, f"I29: {what}: the entry is present"
        self._put(at, [0] * (size // _WORD))

    def _put(self, at: Hpa, words: Sequence[int]) -> None:
        """Word 0 last: it has P, and x86 keeps stores in order."""
        for n in reversed(range(len(words))):
            self._memory.store64(Hpa(at + n * _WORD), words[n])
