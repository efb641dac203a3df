"""On-demand pinning: guest frames that a device which cannot ask for pages may reach at any time.

Models the option the RFC leaves open for devices that tolerate IO page faults only in part [RFC 00/42]: an
importer names gfns, KVM pins their host pages for long (FOLL_LONGTERM, for write) and maps them at once.
What a pin must not suffer is asked of one place, `PinnedGfns`, by every writer of entries:

 a. entries change atomically: a pinned one never is absent, nor maps another frame, nor loses W or D;
 b. only the removal of its slot zaps one: zap, flush, ack, unpin.  A host that unmaps the page has unmapped
    it for itself: entry and frame stay, and a vCPU that faults there gets the pinned frame;
 c. nothing write-protects one: dirty logging reports it dirty in every GET, whatever was cleared (also where
    vCPUs log into rings: in the bitmap behind them), tracking it is refused, ageing passes it by;
 d. the host does not move, swap, merge or hint the page (kvmd/core/mm).

A pinned gfn is mapped by a 4 KiB entry, so that no huge one is part pinned.  Invariant I22 has its home here:
a pinned gfn is writable in the exported root, and maps the pinned frame wherever it is mapped.

A pin sleeps to find its page, and again to break sharing; while it does, its slot may go, its importer may
go, the request may be unpinned, the host may take the page.  So it decides nothing before a sleep that it
does not ask again after it: `_pinnable` (slot, request) and the sequence of `HostChanges` before the page is
taken, `_check_wanted` when all are.  What breaks without: a pin held by nobody, its frame lost for good
(tests/unit/kvmd/test_pinning_sleeps.py::test_an_importer_that_goes_with_a_slot_pins_nothing), or a frame that
the host has given away
(test_pinning.py::test_rule_b_an_invalidation_in_progress_is_waited_for_and_its_page_is_not_pinned). Going,
the order is `forget`, zap, flush, ack, `put`: a `put` before the ack would give the frame away under a device
(::test_rule_b_a_slot_that_goes_is_zapped_flushed_acked_and_only_then_unpinned).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvmd.core.faults.leaf_levels import first_pfn
from kvmd.core.faults.page_fault import MAX_TRIES
from kvmd.core.mm.hmm import PIN_BATCH
from kvmd.core.mm.page import Page
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.memslot import Memslot
from kvmd.core.slots.pinned import AS_ID, Pin
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.tdp import VmTdp
from kvmd.core.tables.tdp_mmu import MapOutcome, Mapped
from kvmd.core.tables.tdp_table import Root
from protocol.errors import UapiError
from protocol.flow import Flow
from protocol.pt.geometry import gfn_limit
from protocol.units import LEVEL_2M, LEVEL_4K, Gfn, GfnSpan


@dataclass(slots=True, eq=False)
class Request:
    """What one request pinned, of which its unpin takes back what is left; `everything`: each page of each
    slot.  `over`: unpinned, or its owner is gone; it pins no more."""

    everything: bool = False
    over: bool = False
    gfns: set[Gfn] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Account:
    """Whose pins they are: an importer's.  Its requests have the names they were answered with."""

    requests: dict[int, Request] = field(default_factory=dict)
    asked: int = 0  # requests so far


class Pinning:
    """Pins and unpins in one VM."""

    def __init__(
        self,
        frames: GuestFrames,
        tdp: VmTdp,
        dirty_log: DirtyLog,
    ) -> None:
        self.pinned = frames.pinned
        self._frames = frames
        self._mmu = tdp.mmu
        self._flusher = tdp.flusher
        self._dirty_log = dirty_log
        self._accounts: list[Account] = []

    # -- whose pins ------------------------------------------------------------------------------------

    def open(self) -> Account:
        """Of an importer that is registered now."""
        account = Account()
        self._accounts.append(account)
        return account

    async def close(self, account: Account) -> None:
        """Its owner is gone: nothing of it is left when this returns, nor comes of requests that sleep."""
        if account in self._accounts:
            self._accounts.remove(account)
        requests, account.requests = list(account.requests.values()), {}
        for request in requests:
            request.over = True
        if requests:
            await self._take_back(*requests)

    async def close_all(self) -> None:
        while self._accounts:
            await self.close(self._accounts[0])

    def requests(self) -> Iterator[Request]:
        return (request for account in self._accounts for request in account.requests.values())

    # -- requests --------------------------------------------------------------------------------------

    async def pin(self, account: Account, span: GfnSpan) -> int:
        """All of `span` or none; the request's name.  Pins count.  EINVAL: no slot, private, or no gfn of
        the table; EFAULT: a read-only slot, no host page; EBUSY: write-tracked; ENOMEM: no page, no table,
        or the limit; ENODEV: the owner or the export is gone; EAGAIN: the host or the VMM would not hold
        still.
        """
        self._check_open(account)
        self._check_span(span)
        request = Request()
        return await self._ask(account, request, self._pin_span(request, span))

    async def pin_all(self, account: Account) -> int:
        """Pin what every slot has, and every slot that comes; the request's name.  Read-only slots and
        private memory are left out: no device writes the one or reaches the other.  Errors as of `pin`; then
        nothing is pinned.
        """
        self._check_open(account)
        request = Request(everything=True)
        return await self._ask(account, request, self._pin_slots(request, self._frames.slots))

    async def unpin(self, account: Account, name: int) -> int:
        """Take back what is left of a request; how many pages that is: what went with its slot is none.
        EINVAL: no request is called so."""
        request = account.requests.pop(name, None)
        if request is None:
            raise UapiError(errno.EINVAL, f"unpin of request {name}: this importer has none of that name")
        request.over = True
        return await self._take_back(request)

    async def _ask(self, account: Account, request: Request, pinned: Flow[None]) -> int:
        account.asked = name = account.asked + 1
        account.requests[name] = request
        try:
            # await: request: may be unpinned, or its importer go; asked again: `_check_wanted`
            # (tests/unit/kvmd/test_pinning_sleeps.py::test_a_request_over_at_its_end_is_none)
            # | account, name: cannot change: a name is given once
            await pinned
            self._check_wanted(request)
        except UapiError:
            account.requests.pop(name, None)
            request.over = True  # a slot that comes may be pinning for it just now
            await self._take_back(request)
            raise
        return name

    def _check_open(self, account: Account) -> None:
        """Its lease may have ended, and the export gone with all pins, before its owner leaves."""
        if account not in self._accounts:
            raise UapiError(errno.ENODEV, "pin: the export is gone, and nobody would take it back")

    def _check_wanted(self, request: Request) -> None:
        if request.over:
            raise UapiError(errno.ENODEV, "pin: the importer is gone, or has unpinned it already")

    async def _pin_span(self, request: Request, span: GfnSpan) -> None:
        for page, gfn in enumerate(range(span.start, span.end), 1):
            # await: request: may lose what it has, with a slot; asked again: below, of all
            # (tests/unit/kvmd/test_pinning_sleeps.py::test_a_pin_whose_first_pages_went_is_none)
            # | each page, page: cannot change: numbers
            await self._pin(request, Gfn(gfn))
            if page % PIN_BATCH == 0:
                # await: request: may be over; asked again: `_pinnable`, of the next page, or `_ask`
                # (tests/unit/kvmd/test_pinning_sleeps.py::test_a_request_over_at_its_end_is_none)
                # | each page: cannot change: numbers
                await self._frames.mm.memory.cond_resched()
        if len(request.gfns) < span.npages:
            raise UapiError(
                errno.EAGAIN, f"pin of {span}: a slot of it went meanwhile, and what was pinned with it"
            )

    def _check_span(self, span: GfnSpan) -> None:
        root = self._exported_root()
        if not span.npages or span.end > gfn_limit(root.role.level):
            raise UapiError(errno.EINVAL, f"gfns {span.start:#x}..{span.end:#x}: none, or beyond the table")

    def _exported_root(self) -> Root:
        root = self._mmu.exported_root(AS_ID)
        if root is None:
            raise UapiError(errno.ENODEV, "the TDP is not exported any more")
        return root

    # -- slots -----------------------------------------------------------------------------------------

    async def follow(self, slot: Memslot) -> None:
        """A slot came, and no other can while this runs: whoever pins everything pins it.  Errors as of
        `pin`: the slot must go again, a device that does not ask for pages could not use it."""
        for request in [request for request in self.requests() if request.everything]:
            try:
                # await: request, each request: may be over; asked again: `_pinnable`, and below
                # (tests/unit/kvmd/test_pinning_sleeps.py::test_a_slot_comes_though_its_pinner_went)
                # | slot: cannot change: our caller has the slots_lock
                await self._pin_slots(request, [slot])
            except UapiError:
                if not request.over:  # else nobody is there to need it
                    raise

    async def _pin_slots(self, request: Request, slots: Iterable[Memslot]) -> None:
        for slot in slots:
            if slot.as_id != AS_ID:
                continue
            for page, number in enumerate(range(slot.span.start, slot.span.end), 1):
                gfn = Gfn(number)
                try:
                    if gfn not in request.gfns:
                        # await: each slot, gfn: it may go, or change; asked again: `_is_left_out`
                        # (tests/unit/kvmd/test_pinning_sleeps.py::test_everything_leaves_out_the_private)
                        # | request: may be over; asked again: `_pinnable`
                        # (tests/unit/kvmd/test_pinning_sleeps.py::test_a_pin_is_refused_by_what_came_later)
                        # | each page, page: cannot change: numbers
                        await self._pin(request, gfn)
                except UapiError:
                    if not self._is_left_out(gfn):
                        raise
                if page % PIN_BATCH == 0:
                    # await: each slot: may go; asked again: `_is_left_out`
                    # (tests/unit/kvmd/test_pinning_sleeps.py::test_everything_goes_on_past_a_lost_slot)
                    # | request: may be over; asked again: `_pinnable`, or `_ask`
                    # (tests/unit/kvmd/test_pinning_sleeps.py::test_a_request_over_at_its_end_is_none)
                    # | each page: cannot change: numbers
                    await self._frames.mm.memory.cond_resched()

    def _is_left_out(self, gfn: Gfn) -> bool:
        """Of everything."""
        slot = self._frames.slots.find(gfn)
        return slot is None or slot.readonly or self._frames.private.serves(slot, gfn)

    def forget(self, slot: Memslot) -> list[Page]:
        """The slot goes, and its entries may be zapped now; `put` the pages once that is flushed (rule b)."""
        gone = self.pinned.within(slot.as_id, slot.span)
        for request in self.requests():
            request.gfns.difference_update(gone)
        return [self.pinned.remove(gfn) for gfn in gone]

    def put(self, pages: Iterable[Page]) -> None:
        for page in pages:
            self._frames.mm.unpin(page)

    # -- one page --------------------------------------------------------------------------------------

    async def _pin(self, request: Request, gfn: Gfn) -> None:
        for _ in range(MAX_TRIES):
            # await: request: may be over; asked again: `_pinnable`
            # (tests/unit/kvmd/test_pinning_sleeps.py::test_an_importer_that_goes_with_a_slot_pins_nothing)
            await self._frames.slots.settled_slot(gfn, AS_ID)
            slot = self._pinnable(request, gfn)
            if gfn in self.pinned:
                self._hold(request, gfn)
                return
            hva = slot.hva_of(gfn)
            if self._frames.host_changes.is_changing(hva, gfn):
                # await: asked, request: all of it; asked again: from the start
                # (tests/unit/kvmd/test_pinning_sleeps.py::test_what_is_tracked_meanwhile_is_not_pinned)
                await self._frames.host_changes.settled(hva, gfn)
                continue
            # await: asked, request, slot: all of it; asked again: `_stands`
            # (tests/unit/kvmd/test_pinning_sleeps.py::test_a_pin_is_refused_by_what_came_later)
            page = await self._frames.mm.pin_user_page(hva)
            # It is what the host has there now.  Until it is counted nothing may await.
            try:
                mapped = self._map(slot, gfn, page) if self._stands(request, slot, gfn) else None
            except UapiError:
                self._frames.mm.unpin(page)
                raise
            if mapped is None or mapped.outcome is MapOutcome.RETRY:
                self._frames.mm.unpin(page)
                # await: asked, request: all of it; asked again: from the start
                # (tests/unit/kvmd/test_pinning_sleeps.py::test_a_page_that_comes_as_its_slot_goes)
                await self._flusher.drain()
                continue
            self._hold(request, gfn)
            assert mapped.flush is None, f"I11: gfn {gfn:#x} was mapped to what the host does not have there"
            return
        raise UapiError(errno.EAGAIN, f"pin of gfn {gfn:#x}: something was in the way {MAX_TRIES} times")

    def _hold(self, request: Request, gfn: Gfn) -> None:
        if gfn not in request.gfns:
            request.gfns.add(gfn)
            self.pinned[gfn].count += 1

    def _pinnable(self, request: Request, gfn: Gfn) -> Memslot:
        """The slot, if a page of it may be pinned: all that is asked before a page is waited for, and asked
        again after."""
        self._check_wanted(request)
        self._exported_root()
        slot = self._frames.slots.find(gfn)
        if slot is None or self._frames.private.serves(slot, gfn):
            what = "is in no memslot" if slot is None else "is private memory"
            raise UapiError(errno.EINVAL, f"pin of gfn {gfn:#x}: it {what}")
        if slot.readonly:
            raise UapiError(
                errno.EFAULT, f"pin of gfn {gfn:#x}: slot {slot.id} is read-only, pins are for write"
            )
        if self._frames.page_track.is_tracked(slot, gfn):
            raise UapiError(errno.EBUSY, f"pin of gfn {gfn:#x}: its stores are tracked, and must fault")
        return slot

    def _stands(self, request: Request, slot: Memslot, gfn: Gfn) -> bool:
        """Was the page that came meanwhile looked up for what is there now?  Errors as of `_pinnable`."""
        return (
            self._pinnable(request, gfn) is slot
            and slot is not self._frames.slots.going
            and not self._frames.host_changes.is_changing(slot.hva_of(gfn), gfn)
            and gfn not in self.pinned
        )

    def _map(self, slot: Memslot, gfn: Gfn, page: Page) -> Mapped:
        """Map the pinned page, writable; unless somebody else froze the entry it is pinned from here on.
        ENOMEM: no page for a table."""
        host = self._frames.mm.present_page(slot.hva_of(gfn))
        assert host is not None, "pinned just now"
        pfn = first_pfn(slot, gfn, host, LEVEL_4K)
        for root in self._mmu.roots_of(AS_ID):
            self._split(root, gfn)
        mapped = tdp_mmu.map_page(self._mmu, self._exported_root(), gfn, pfn, LEVEL_4K, writable=True)
        if mapped.outcome is not MapOutcome.RETRY:
            self.pinned.add(gfn, Pin(page, pfn))
            self._dirty_log.mark(slot, gfn, None)
        return mapped

    def _split(self, root: Root, gfn: Gfn) -> None:
        """No huge leaf maps a pinned gfn.  ENOMEM."""
        if not any(root.leaves[LEVEL_2M:]):
            return
        mmu = self._mmu
        for wanted in (True, False):
            met = mmu.leaf_at(root, gfn)
            if met is None or met.level == LEVEL_4K:
                return
            if wanted:
                tdp_mmu.split(mmu, root, GfnSpan.of_pages(gfn, 1), LEVEL_4K)
        raise UapiError(errno.ENOMEM, f"pin of gfn {gfn:#x}: no page for a table of small entries")

    async def _take_back(self, *requests: Request) -> int:
        """The last pin of a page lets go of it, once nobody reaches what the host gave up meanwhile.  Of all
        of them in one turn: `forget` would not find a request that waits for its own."""
        gfns = sorted(gfn for request in requests for gfn in request.gfns)
        pages, zapped = [], False
        for request in requests:
            request.gfns = set()
        for gfn in gfns:
            pin = self.pinned[gfn]
            pin.count -= 1
            if not pin.count:
                pages.append(self.pinned.remove(gfn))
                if not self._is_backed(gfn, pin):
                    zapped |= tdp_mmu.zap_leafs(self._mmu, GfnSpan.of_pages(gfn, 1))
        # They are ours alone: in no request, and no gfn's pin.
        if zapped:
            # await: gfns, pages: cannot change: nobody else has them
            await self._flusher.flush(None)
        # await: gfns, pages: cannot change: nobody else has them
        await self._flusher.drain()
        self.put(pages)
        return len(gfns)

    def _is_backed(self, gfn: Gfn, pin: Pin) -> bool:
        """Does the host still have the page there, writable, and mean to keep it?"""
        slot = self._frames.slots.find(gfn)
        assert slot is not None, "a pin goes with its slot"
        hva = slot.hva_of(gfn)
        page = self._frames.mm.present_page(hva)
        if page is None or not page.writable or self._frames.host_changes.is_changing(hva, gfn):
            return False
        return first_pfn(slot, gfn, page, LEVEL_4K) == pin.pfn
