"""From a function to the table that translates it: root, context, PASID directory, PASID entry.

Models [VT-d 3.4], [VT-d 9] in scalable mode, second stage only: the tables lie in memory, where the driver
stores; the unit reads an entry in words of 8 bytes, word 0 with P first, and believes nothing else of it
without P.  Context entries are cached by requester, PASID entries by requester and PASID with their domain id
as a tag, each until it is invalidated; what is not present never is (CAP.CM = 0).

Must hold: every pointer is software's word: what lies outside table memory is the access error of its level
and ends nothing; an index is within its table because of how it is made, or refused (PDTS).
FPD of any entry on the way hides what it qualifies in that entry and in all below it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeVar

from device_sim.core.physmem import PhysicalMemory
from protocol.hw import qi
from protocol.hw.caps import Cap, Ecap
from protocol.hw.context_entry import (
    WORD_BYTES,
    ContextEntry,
    Entry,
    PasidDirEntry,
    RootEntry,
    context_index,
    pasid_index,
    root_index,
)
from protocol.hw.faults import FaultReason
from protocol.hw.fields import FormatError
from protocol.hw.pasid_entry import PASID_ENTRY_SIZE, PasidEntry, Pgtt
from protocol.hw.vtd_regs import RTADDR_RTA, RTADDR_TTM, TranslationTableMode
from protocol.pt.geometry import address_bits
from protocol.pt.mem import TableOutside
from protocol.units import PAGE_SHIFT, Hpa, Level, Pasid

_ROOT_REASONS = (FaultReason.SRT_1, FaultReason.SRT_3)
_CONTEXT_REASONS = (FaultReason.SCT_1, FaultReason.SCT_3)
_DIRECTORY_REASONS = (FaultReason.SPD_1, FaultReason.SPD_3)
_PASID_ENTRY = struct.Struct("<8Q")
_FPD = 1 << 1  # of word 0; a root entry has none, nor a fault that it would hide
_Read = TypeVar("_Read", bound=Entry)


class NoTable(Exception):
    """Nothing translates the request; `fpd`: whether the entry that says so hides qualified faults."""

    def __init__(self, reason: FaultReason, *, fpd: bool = False) -> None:
        super().__init__(reason.name)
        self.reason = reason
        self.fpd = fpd


@dataclass(slots=True)
class SecondStage:
    """A valid second-stage PASID entry, decoded."""

    did: int
    root: Hpa
    levels: Level
    npages: int  # what the root and the unit's own width can address
    fpd: bool


class ContextTables:
    def __init__(self, cap: Cap, ecap: Ecap, haw: int, memory: PhysicalMemory) -> None:
        self._cap = cap
        self._ecap = ecap
        self._device_tlbs = bool(ecap.dt)
        self._haw = haw
        self._memory = memory
        self._rtaddr: int | None = None  # while translation tables are in use
        self._contexts: dict[int, ContextEntry] = {}
        self._pasids: dict[tuple[int, Pasid], SecondStage] = {}

    def use(self, rtaddr: int | None) -> None:
        """RTADDR as it was latched, or none; caches are empty (CAP.ESRTPS)."""
        self._rtaddr = rtaddr
        self._contexts.clear()
        self._pasids.clear()

    # -- what the driver invalidates -------------------------------------------------------------------

    def invalidate_contexts(self, descriptor: qi.ContextInv) -> None:
        """Contexts have no domain id in scalable mode: a domain's are all."""
        if descriptor.granularity is not qi.ContextGranularity.DEVICE:
            self._contexts.clear()
            return
        ignored = (0, 0b100, 0b110, 0b111)[descriptor.fm]
        for rid in [rid for rid in self._contexts if not (rid ^ descriptor.sid) & ~ignored]:
            del self._contexts[rid]

    def invalidate_pasids(self, descriptor: qi.PasidCacheInv) -> None:
        kind = descriptor.granularity
        for key, cached in list(self._pasids.items()):
            if kind is not qi.PasidCacheGranularity.GLOBAL and cached.did != descriptor.did:
                continue
            if kind is qi.PasidCacheGranularity.PASID and key[1] != descriptor.pasid:
                continue
            del self._pasids[key]

    # -- what a request finds --------------------------------------------------------------------------

    def second_stage(self, rid: int) -> SecondStage:
        """What translates the function's requests without PASID, checked in the unit's order.  Raises
        NoTable.
        """
        if not self._device_tlbs:
            raise NoTable(FaultReason.SCT_5)
        context = self._context(rid)
        if not context.dte:
            raise NoTable(FaultReason.SCT_5, fpd=context.fpd)
        key = rid, context.rid_pasid
        cached = self._pasids.get(key)
        if cached is None:
            cached = self._pasids[key] = self._read_second_stage(context)
        return cached

    def check_page_request(self, rid: int) -> None:
        """May the function ask for pages?  Raises NoTable: its context entry is not there or has no PRE."""
        context = self._context(rid)
        if not context.pre:
            raise NoTable(FaultReason.SCT_8, fpd=context.fpd)

    def _context(self, rid: int) -> ContextEntry:
        context = self._contexts.get(rid)
        if context is None:
            context = self._contexts[rid] = self._read_context(rid)
        return context

    def _read_context(self, rid: int) -> ContextEntry:
        if self._rtaddr is None:
            raise NoTable(FaultReason.SPT_2)  # as of a function without an entry
        if RTADDR_TTM.get(self._rtaddr) != TranslationTableMode.SCALABLE:
            raise NoTable(FaultReason.RTA_4)
        root = Hpa(RTADDR_RTA.get(self._rtaddr) + root_index(rid) * RootEntry.SIZE)
        entry = self._read(RootEntry, root, _ROOT_REASONS)
        upper, index = context_index(rid)
        if not (entry.upper_present if upper else entry.lower_present):
            raise NoTable(FaultReason.SRT_2)
        table = entry.upper if upper else entry.lower
        context = self._read(ContextEntry, Hpa(table + index * ContextEntry.SIZE), _CONTEXT_REASONS)
        if not context.present:
            raise NoTable(FaultReason.SCT_2, fpd=context.fpd)
        return context

    def _read_second_stage(self, context: ContextEntry) -> SecondStage:
        words, fpd = self._read_pasid_words(context)
        try:
            entry = PasidEntry.from_bytes(_PASID_ENTRY.pack(*words))
        except FormatError:
            raise NoTable(FaultReason.SPT_3, fpd=fpd or bool(words[0] & _FPD)) from None
        fpd = fpd or entry.fpd
        if not entry.present:
            raise NoTable(FaultReason.SPT_2, fpd=fpd)
        level = entry.level
        usable = entry.pgtt == Pgtt.SECOND_STAGE and bool(self._ecap.ssts) and level in self._cap.levels
        if not usable or level is None or (entry.pgsnp and not self._ecap.sc):
            raise NoTable(FaultReason.SPT_4, fpd=fpd)
        if entry.ss_ptr >> self._haw:
            raise NoTable(FaultReason.SSS_4, fpd=fpd)
        npages = 1 << min(address_bits(level), self._cap.mgaw) - PAGE_SHIFT
        return SecondStage(entry.did, entry.ss_ptr, level, npages, fpd)

    def _read_pasid_words(self, context: ContextEntry) -> tuple[list[int], bool]:
        """The PASID entry, and whether what leads to it hides qualified faults."""
        directory, index = pasid_index(context.rid_pasid)
        if directory >= context.directory_entries:
            raise NoTable(FaultReason.SCT_9, fpd=context.fpd)
        at = Hpa(context.pasid_dir + directory * PasidDirEntry.SIZE)
        entry = self._read(PasidDirEntry, at, _DIRECTORY_REASONS, fpd=context.fpd)
        fpd = context.fpd or entry.fpd
        if not entry.present:
            raise NoTable(FaultReason.SPD_2, fpd=fpd)
        at = Hpa(entry.pasid_table + index * PASID_ENTRY_SIZE)
        return self._load(at, PASID_ENTRY_SIZE, FaultReason.SPT_1), fpd

    def _read(
        self, kind: type[_Read], at: Hpa, reasons: tuple[FaultReason, FaultReason], *, fpd: bool = False
    ) -> _Read:
        """`reasons`: not readable, and a reserved bit set."""
        words = self._load(at, kind.SIZE, reasons[0])
        try:
            return kind.from_words(words)
        except FormatError:
            raise NoTable(reasons[1], fpd=fpd or bool(words[0] & _FPD)) from None

    def _load(self, at: Hpa, size: int, reason: FaultReason) -> list[int]:
        """Word 0 first.  Raises NoTable(reason) where no table memory is."""
        tables = self._memory.tables_at(at)
        if tables is None:
            raise NoTable(reason)
        try:
            return tables.load_run(at, size // WORD_BYTES)
        except TableOutside:
            raise NoTable(reason) from None

    # -- for checks ------------------------------------------------------------------------------------

    def entry_in_memory(self, rid: int) -> bytes:
        """The PASID entry of requests without PASID as it lies in memory now; empty if none is reached."""
        try:
            words, _ = self._read_pasid_words(self._read_context(rid))
        except NoTable:
            return b""
        return _PASID_ENTRY.pack(*words)
