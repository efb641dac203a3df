"""Changes of the host's memory, as KVM hears of them before they are made.

Models KVM's mmu notifier [KVM kvm_main.c], [RFC 41/42]: what a range of the process backs is zapped in
every root, every CPU and importer has acked, and only then the host goes on.  Faults on the range wait
until it is done, and one that looked its page up before looks again: `is_changing` and `seq` tell (I5).
"""

from __future__ import annotations

from kvmd.core.flush import Flusher
from kvmd.core.memslot import Memslots
from kvmd.core.tdp_mmu import TdpMmu
from protocol.flow import Wait
from protocol.trace import TRACE, KvmUnmapHvaRange
from protocol.units import Hva

SEQ_MASK = (1 << 64) - 1


class HostChanges:
    """The MmuNotifier of one VM.  `seq_start`: tests start the sequence near a wrap (R2)."""

    def __init__(self, slots: Memslots, mmu: TdpMmu, flusher: Flusher, seq_start: int = 0) -> None:
        self.seq = seq_start & SEQ_MASK  # of invalidations that are over
        self.over: Wait[None] = Wait()  # set when the next one is over
        self._in_progress: list[tuple[Hva, Hva]] = []
        self._slots = slots
        self._mmu = mmu
        self._flusher = flusher

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        """Zap what start..end backs, flush, wait for every ack [RFC 41/42]."""
        self._in_progress.append((start, end))
        if TRACE.on:
            TRACE.emit(KvmUnmapHvaRange(start, end))
        zapped = False
        for slot in self._slots:
            span = slot.gfns_of(start, end)
            if span is not None:
                zapped |= self._mmu.zap_leafs(span)
        if zapped:
            await self._flusher.flush(None)  # KVM flushes everything for a notifier event
        await self._flusher.drain()

    def invalidate_range_end(self, start: Hva, end: Hva) -> None:
        self.seq = (self.seq + 1) & SEQ_MASK
        self._in_progress.remove((start, end))
        over, self.over = self.over, Wait()
        over.set(None)

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        """Whether the range was used; it counts as not used now, and copies of it go, importers' too."""
        young = False
        for slot in self._slots:
            span = slot.gfns_of(start, end)
            if span is not None:
                young |= self._mmu.age_leafs(span)
        if young:
            await self._flusher.flush(None)
        return young

    def test_young(self, start: Hva, end: Hva) -> bool:
        spans = (slot.gfns_of(start, end) for slot in self._slots)
        return any(span is not None and self._mmu.has_young(span) for span in spans)

    @property
    def in_progress(self) -> bool:
        """An invalidation is in progress: the table is ahead of the host's page map."""
        return bool(self._in_progress)

    def is_changing(self, hva: Hva) -> bool:
        return bool(self._in_progress) and any(start <= hva < end for start, end in self._in_progress)
