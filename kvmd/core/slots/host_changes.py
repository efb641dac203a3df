"""Changes of the host's memory, as KVM hears of them before they are made.

Models KVM's mmu notifier [KVM kvm_main.c], [RFC 41/42]: what a range of the process backs is zapped in
every root, every CPU and importer has acked, and only then the host goes on.  Faults on the range wait
until it is done, and one that looked its page up before looks again: `is_changing` and `seq` tell (I5).

A fault looks a page up, sleeps, and maps what it found.  Between the two the host may

 1. begin to take the page and be still at it: the fault would map what is about to be freed.  The range is in
    `_in_progress` from before the zap until after the host is done, and `is_changing` is asked after the
    lookup;
 2. have begun *and* ended: nothing is in progress any more, and the page is another's.  `seq` moved
    (`invalidate_range_end`), and the fault compares it with what it read before the lookup.

Either question alone misses the other case; the fault asks both in the turn in which it stores
(`FaultPath._try`, `stale`).  The range is noted before the first leaf is cleared and taken off after `seq`
moved, both without a sleep in between, so that there is no moment at which both answers are "no".
tests/properties/test_kvmd.py plants the loss of each: "R1-sequence-stands",
"R1-range-not-looked-at".
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kvmd.core.slots.memslot import Memslots
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.tdp import VmTdp
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.trace import TRACE, KvmUnmapHvaRange
from protocol.units import PAGE_SHIFT, PAGE_SIZE, Gfn, GfnSpan, Gpa, Hva, gfn_of

SEQ_MASK = (1 << 64) - 1


class HostChanges:
    """The MmuNotifier of one VM."""

    def __init__(self, slots: Memslots, tdp: VmTdp, seq_start: int) -> None:
        # The sequence may wrap (R2): it is compared for equality alone.
        self.seq = seq_start & SEQ_MASK  # of invalidations that are over
        self.over: Wait[None] = Wait()  # set when the next one is over
        self._in_progress: list[tuple[Hva, Hva]] = []
        self._gfns_in_progress: list[GfnSpan] = []
        self._slots = slots
        self._tdp = tdp

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        """Zap what start..end backs, flush, wait for every ack [RFC 41/42].  A slot made meanwhile maps
        nothing of it: faults wait."""
        self._in_progress.append((start, end))
        if TRACE.on:
            TRACE.emit(KvmUnmapHvaRange(start, end))
        spans = self._slots.backed_by(start, end)
        await self._tdp.zapper.zap(spans)  # KVM flushes everything for a notifier event

    def invalidate_range_end(self, start: Hva, end: Hva) -> None:
        self.seq = (self.seq + 1) & SEQ_MASK
        self._in_progress.remove((start, end))
        self._end()

    def _end(self) -> None:
        over, self.over = self.over, Wait()
        over.set(None)

    # awaits: spans: cannot change: the caller's list
    @asynccontextmanager
    async def zapped_gfns(self, spans: Sequence[GfnSpan], told: GfnSpan | None = None) -> AsyncIterator[None]:
        """Around a change of what guest frames translate to [KVM kvm_zap_gfn_range, guest_memfd.c]: inside
        nobody can use them, and faults on them wait.  Walkers were told `told`, or everything."""
        self._gfns_in_progress += spans
        try:
            await self._tdp.zapper.zap(spans, told=told)
            yield
        finally:
            self.seq = (self.seq + 1) & SEQ_MASK
            for span in spans:
                self._gfns_in_progress.remove(span)
            self._end()

    # awaits: asked: cannot change: the width of the guest's addresses is the VM's for good
    async def zap_gfn_range(self, gpa: Gpa, size: int) -> None:
        """What changes of MTRRs and of APICv have zapped.  EINVAL: not whole pages, or beyond the guest."""
        if not size or (gpa | size) % PAGE_SIZE or gpa + size > self._slots.gfn_limit << PAGE_SHIFT:
            raise UapiError(errno.EINVAL, f"zap of {gpa:#x}+{size:#x}: not whole pages the guest can have")
        span = GfnSpan.of_pages(gfn_of(gpa), size >> PAGE_SHIFT)
        async with self.zapped_gfns([span], told=span):
            pass  # the change itself is the CPU's

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        """Whether the range was used; it counts as not used now, and copies of it go, importers' too."""
        young = False
        for span in self._slots.backed_by(start, end):
            young |= tdp_mmu.age_leafs(self._tdp.mmu, span)
        if young:
            await self._tdp.flusher.flush(None)
        return young

    @property
    def in_progress(self) -> bool:
        """An invalidation is in progress: the table is ahead of the host's page map."""
        return bool(self._in_progress or self._gfns_in_progress)

    async def settled(self, hva: Hva, gfn: Gfn) -> None:
        """Returns when the host is done with what it has at `hva`, however many other changes end before."""
        while self.is_changing(hva, gfn):
            await self.over

    def is_changing(self, hva: Hva, gfn: Gfn) -> bool:
        if not self.in_progress:
            return False
        return any(start <= hva < end for start, end in self._in_progress) or any(
            gfn in span for span in self._gfns_in_progress
        )
