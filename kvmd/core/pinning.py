"""On-demand pinning: guest frames that a device which cannot ask for pages may reach at any time.

Models the option the RFC leaves open for devices that tolerate IO page faults only in part [RFC 00/42]: an
importer names gfns, KVM pins their host pages for long (FOLL_LONGTERM, for write) and maps them at once.
What a pin must not suffer is asked of one place, `Pinned`, by every writer of entries:

 a. entries change atomically: a pinned one never is absent, nor maps another frame, nor loses W or D;
 b. only the removal of its slot zaps one: zap, flush, ack, unpin.  A host that unmaps the page has unmapped
    it for itself: entry and frame stay, and a vCPU that faults there gets the pinned frame;
 c. nothing write-protects one: dirty logging reports it dirty in every GET, whatever was cleared (also where
    vCPUs log into rings: in the bitmap behind them), tracking it is refused, ageing passes it by;
 d. the host does not move, swap, merge or hint the page (kvmd/core/mm).

A pinned gfn is mapped by a 4 KiB entry, so that no huge one is part pinned.  Invariant I22 has its home here:
a pinned gfn is writable in the exported root, and maps the pinned frame wherever it is mapped.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvmd.core.memslot import Change, Memslot, Region
from kvmd.core.mm.page import HostPage, Page
from kvmd.core.page_fault import MAX_TRIES, first_pfn
from kvmd.core.tdp_mmu import Mapped, Outcome
from kvmd.core.tdp_table import Root
from protocol.errors import UapiError
from protocol.pt.geometry import INDEX_BITS, gfn_limit
from protocol.units import LEVEL_2M, LEVEL_4K, Gfn, GfnSpan, Pfn

if TYPE_CHECKING:
    from kvmd.core.vm import Kvm

AS_ID = 0  # what can be exported, and so what can be pinned
_BATCH = 512  # pages pinned before others get a turn


@dataclass(slots=True, eq=False)
class Pin:
    page: Page
    pfn: Pfn
    count: int = 0


@dataclass(slots=True, eq=False)
class Account:
    """Whose pins they are, and how many of each gfn; `everything`: each page of each slot, once.  `whole` are
    those of the same importer that pin everything."""

    everything: bool = False
    closed: bool = False
    counts: Counter[Gfn] = field(default_factory=Counter)
    whole: list[Account] = field(default_factory=list)


class Pinned(dict[Gfn, Pin]):
    """The pinned gfns of a VM; changed by `add` and `remove` alone."""

    def __init__(self) -> None:
        super().__init__()
        self._regions: Counter[int] = Counter()  # how many lie in each 2 MiB

    def holds(self, as_id: int, gfn: Gfn) -> bool:
        return as_id == AS_ID and gfn in self

    def any_in(self, as_id: int, span: GfnSpan) -> bool:
        """Of a span of whole 2 MiB."""
        if as_id != AS_ID or not self:
            return False
        regions = range(span.start >> INDEX_BITS, span.end >> INDEX_BITS)
        if len(regions) > len(self._regions):
            return any(region in regions for region in self._regions)
        return any(region in self._regions for region in regions)

    def within(self, as_id: int, span: GfnSpan) -> list[Gfn]:
        if as_id != AS_ID:
            return []
        if span.npages < len(self):
            return [Gfn(gfn) for gfn in range(span.start, span.end) if gfn in self]
        return sorted(gfn for gfn in self if gfn in span)

    def add(self, gfn: Gfn, pin: Pin) -> None:
        self[gfn] = pin
        self._regions[gfn >> INDEX_BITS] += 1

    def remove(self, gfn: Gfn) -> Page:
        region = gfn >> INDEX_BITS
        self._regions[region] -= 1
        if not self._regions[region]:
            del self._regions[region]
        return self.pop(gfn).page


class Pinning:
    """Pins and unpins in one VM."""

    def __init__(self, vm: Kvm) -> None:
        self.pinned = Pinned()
        vm.mmu.keep = self.pinned
        self._vm = vm
        self._accounts: list[Account] = []

    # -- whose pins ------------------------------------------------------------------------------------

    def open(self) -> Account:
        """Of an importer that is registered now."""
        account = Account()
        self._accounts.append(account)
        return account

    async def open_everything(self, owner: Account) -> None:
        """Pin what every slot has, and every slot that comes.  Read-only slots and private memory are left
        out: no device writes the one or reaches the other.  Errors as of `pin`; then nothing is pinned.
        """
        account = Account(everything=True)
        self._accounts.append(account)
        owner.whole.append(account)
        try:
            for slot in self._vm.slots:
                await self._pin_slot(account, slot)
        except UapiError:
            if account in owner.whole:
                owner.whole.remove(account)
            await self.close(account)
            raise

    async def close_everything(self, owner: Account) -> None:
        """EINVAL: everything is not pinned for `owner`."""
        if not owner.whole:
            raise UapiError(errno.EINVAL, "unpin everything: it was not pinned")
        await self.close(owner.whole.pop())

    async def close(self, account: Account) -> None:
        """Its owner is gone: nothing of it is left when this returns."""
        while account.whole:
            await self.close(account.whole.pop())
        account.closed = True
        if account in self._accounts:
            self._accounts.remove(account)
        await self._unpin(account, list(account.counts.elements()))

    async def close_all(self) -> None:
        for account in list(self._accounts):
            await self.close(account)

    # -- ranges ----------------------------------------------------------------------------------------

    async def pin(self, account: Account, span: GfnSpan) -> None:
        """All of `span` or none; pins count.  EINVAL: no slot, private, or no gfn of the table; EFAULT: a
        read-only slot, no host page; EBUSY: write-tracked; ENOMEM: no page, no table, or the limit;
        ENODEV: the owner or the export is gone; EAGAIN: the host would not hold still.
        """
        self._check_span(span)
        done: list[Gfn] = []
        try:
            for gfn in range(span.start, span.end):
                await self._pin(account, Gfn(gfn))
                done.append(Gfn(gfn))
                if len(done) % _BATCH == 0:
                    await self._vm.host.cond_resched()
        except UapiError:
            await self._unpin(account, done)
            raise

    async def unpin(self, account: Account, span: GfnSpan) -> int:
        """Take one pin of each page back; how many.  What went with its slot or never was pinned is none."""
        self._check_span(span)
        return await self._unpin(account, [gfn for gfn in account.counts if gfn in span])

    def _check_span(self, span: GfnSpan) -> None:
        exported = self._vm.exported.get(AS_ID)
        if exported is None:
            raise UapiError(errno.ENODEV, "the TDP is not exported any more")
        if not span.npages or span.end > gfn_limit(exported.root.role.level):
            raise UapiError(errno.EINVAL, f"gfns {span.start:#x}..{span.end:#x}: none, or beyond the table")

    # -- slots -----------------------------------------------------------------------------------------

    async def follow(self, region: Region, change: Change) -> None:
        """The slots have changed: whoever pins everything pins what is new.  A slot that cannot be pinned is
        deleted again: a device that does not ask for pages could not use it."""
        slot = self._vm.slots.numbered(region.slot)
        if slot is None or change not in (Change.CREATE, Change.MOVE):
            return
        try:
            for account in [account for account in self._accounts if account.everything]:
                await self._pin_slot(account, slot)
        except UapiError:
            await self._vm.slots_change.set_memory_region(replace(region, memory_size=0))
            raise

    async def _pin_slot(self, account: Account, slot: Memslot) -> None:
        if slot.as_id != AS_ID or slot.readonly:
            return
        for page, number in enumerate(range(slot.span.start, slot.span.end), 1):
            gfn = Gfn(number)
            try:
                if gfn not in account.counts and not self._vm.private.serves(slot, gfn):
                    await self._pin(account, gfn)
            except UapiError:
                if self._vm.slots.find(gfn) is None:  # deleted meanwhile: no page of it to pin
                    return
                raise
            if page % _BATCH == 0:
                await self._vm.host.cond_resched()

    def forget(self, slot: Memslot) -> list[Page]:
        """The slot goes, and its entries may be zapped now; `put` the pages once that is flushed (rule b)."""
        gone = self.pinned.within(slot.as_id, slot.span)
        for account in self._accounts:
            for gfn in gone:
                account.counts.pop(gfn, None)
        return [self.pinned.remove(gfn) for gfn in gone]

    def put(self, pages: Iterable[Page]) -> None:
        for page in pages:
            self._vm.mm.unpin(page)

    # -- one page --------------------------------------------------------------------------------------

    def page_of(self, slot: Memslot, gfn: Gfn) -> HostPage | None:
        """What a fault maps at a pinned gfn: the pinned frame, whatever the host has there by now."""
        pin = self.pinned.get(gfn) if slot.as_id == AS_ID else None
        return None if pin is None else HostPage(slot.hva_of(gfn), pin.pfn, LEVEL_4K, writable=True)

    async def _pin(self, account: Account, gfn: Gfn) -> None:
        vm = self._vm
        for _ in range(MAX_TRIES):
            slot = await self._slot(account, gfn)
            if self.pinned.holds(AS_ID, gfn):
                self._count(account, gfn)
                return
            hva = slot.hva_of(gfn)
            if (change := vm.host_changes.changing(hva, gfn)) is not None:
                await change
                continue
            page = await vm.mm.pin_user_page(hva)
            # It is what the host has there now.  Until it is counted nothing may await.
            stands = vm.slots.find(gfn) is slot and slot is not vm.slots_change.going
            mapped = None
            if (
                stands
                and not account.closed
                and vm.host_changes.changing(hva, gfn) is None
                and self.pinned.get(gfn) is None
            ):
                mapped = self._map(slot, gfn, page)
            if mapped is None or mapped.outcome is Outcome.RETRY:
                vm.mm.unpin(page)
                await vm.flusher.drain()
                continue
            self._count(account, gfn)
            if mapped.flush is not None:
                await vm.flusher.flush(mapped.flush)
            return
        raise UapiError(errno.EAGAIN, f"pin of gfn {gfn:#x}: something was in the way {MAX_TRIES} times")

    def _count(self, account: Account, gfn: Gfn) -> None:
        pin = self.pinned.get(gfn)
        assert pin is not None
        if not (account.everything and account.counts[gfn]):
            account.counts[gfn] += 1
            pin.count += 1

    async def _slot(self, account: Account, gfn: Gfn) -> Memslot:
        """The slot, if a page of it may be pinned."""
        vm = self._vm
        slot = await vm.settled_slot(gfn, AS_ID)
        if slot is None or vm.private.serves(slot, gfn):
            what = "is in no memslot" if slot is None else "is private memory"
            raise UapiError(errno.EINVAL, f"pin of gfn {gfn:#x}: it {what}")
        if slot.readonly:
            raise UapiError(
                errno.EFAULT, f"pin of gfn {gfn:#x}: slot {slot.id} is read-only, pins are for write"
            )
        if vm.page_track.is_tracked(slot, gfn):
            raise UapiError(errno.EBUSY, f"pin of gfn {gfn:#x}: its stores are tracked, and must fault")
        if account.closed:
            raise UapiError(errno.ENODEV, f"pin of gfn {gfn:#x}: the importer is gone")
        return slot

    def _map(self, slot: Memslot, gfn: Gfn, page: Page) -> Mapped:
        """Map the pinned page, writable; unless somebody else froze the entry it is pinned from here on.
        ENOMEM: no page for a table; the page is unpinned then."""
        vm = self._vm
        host = vm.mm.present_page(slot.hva_of(gfn))
        assert host is not None, "pinned just now"
        pfn = first_pfn(slot, gfn, host, LEVEL_4K)
        try:
            for root in vm.mmu.roots_of(AS_ID):
                self._split(root, gfn)
            mapped = vm.mmu.map(vm.exported[AS_ID].root, gfn, pfn, LEVEL_4K, writable=True)
        except UapiError:
            vm.mm.unpin(page)
            raise
        if mapped.outcome is not Outcome.RETRY:
            self.pinned.add(gfn, Pin(page, pfn))
            vm.mark_page_dirty(slot, gfn, None)
        return mapped

    def _split(self, root: Root, gfn: Gfn) -> None:
        """No huge leaf maps a pinned gfn.  ENOMEM."""
        if not any(root.leaves[LEVEL_2M:]):
            return
        mmu = self._vm.mmu
        for wanted in (True, False):
            met = mmu.leaf_at(root, gfn)
            if met is None or met.level == LEVEL_4K:
                return
            if wanted:
                mmu.split(root, GfnSpan.of_pages(gfn, 1), LEVEL_4K)
        raise UapiError(errno.ENOMEM, f"pin of gfn {gfn:#x}: no page for a table of small entries")

    async def _unpin(self, account: Account, gfns: Iterable[Gfn]) -> int:
        """The last pin of a page lets go of it, once nobody reaches what the host gave up meanwhile."""
        pages, count, zapped = [], 0, False
        for gfn in gfns:
            if not account.counts[gfn]:
                continue
            account.counts[gfn] -= 1
            if not account.counts[gfn]:
                del account.counts[gfn]
            count += 1
            pin = self.pinned.get(gfn)
            assert pin is not None, f"gfn {gfn:#x} is counted and not pinned"
            pin.count -= 1
            if not pin.count:
                pages.append(self.pinned.remove(gfn))
                if not self._is_backed(gfn, pin):
                    zapped |= self._vm.mmu.zap_leafs(GfnSpan.of_pages(gfn, 1))
        if zapped:
            await self._vm.flusher.flush(None)
        await self._vm.flusher.drain()
        self.put(pages)
        return count

    def _is_backed(self, gfn: Gfn, pin: Pin) -> bool:
        """Does the host still have the page there, writable, and mean to keep it?"""
        slot = self._vm.slots.find(gfn)
        assert slot is not None, "a pin goes with its slot"
        hva = slot.hva_of(gfn)
        page = self._vm.mm.present_page(hva)
        if page is None or not page.writable or self._vm.host_changes.changing(hva, gfn) is not None:
            return False
        return first_pfn(slot, gfn, page, LEVEL_4K) == pin.pfn
