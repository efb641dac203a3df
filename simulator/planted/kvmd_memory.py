"""Mistakes in kvmd's dirty logs, private memory, the host's memory and those who mirror it."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

_LOG = "kvmd.core.slots.dirty_log:DirtyLog"
_PRIVATE = "kvmd.core.slots.private_memory:PrivateMemory"
_MIRROR = "kvmd.core.mm.hmm:Mirror"
_ANNOUNCED = "kvmd.core.mm.notifier:announced"
_MM = "kvmd.core.mm.mm:Mm"

KVMD_MEMORY = (
    # -- dirty logs --------------------------------------------------------------------------------------
    Plant(
        "R19-cleared-and-not-flushed",
        "A harvest takes bits and D or W, and old translations go on storing unseen.",
        "I25",
        [Edit(f"{_LOG}._protect_again", "await self._flusher.flush(slot.span)", "pass")],
        races=["R19"],
    ),
    Plant(
        "R19-log-begins-unflushed",
        "Logging begins, entries lose W, and who has them cached stores on.",
        "I25",
        [Edit(f"{_LOG}.apply_flags", "await self._flusher.flush(slot.span)", "pass")],
        races=["R19"],
    ),
    Plant(
        "R19-rings-reset-unflushed",
        "Resetting the rings protects what was harvested and flushes nothing.",
        "I25",
        [Edit(f"{_LOG}.reset_rings", "await self._flusher.flush(None)", "pass")],
        races=["R19"],
    ),
    Plant(
        "R19-one-stale-entry-drops-all",
        "An entry of a page that the slot has no more keeps those beside it from being protected again.",
        "I25",
        [Edit(f"{_LOG}._protect_offsets", "or not there:", "or there != offsets:")],
        races=["R19"],
    ),
    Plant(
        "R19-fast-fault-marks-nothing",
        "A fault that gives W back does not mark the page dirty.",
        "I20",
        [
            Edit(
                "kvmd.core.faults.fault_path:FaultPath._fast_page_fault",
                "self._dirty_log.mark(slot, fault.gfn, None if vcpu is None else vcpu.id)",
                "pass",
            )
        ],
        races=["R19"],
    ),
    Plant(
        "R19-fast-fault-on-a-huge-leaf",
        "One store to a slot that logs makes a huge leaf writable, and one page of 512 is marked.",
        "I20",
        [
            Edit(
                "kvmd.core.tables.tdp_log:fast_page_fault",
                "if logs and met.level > LEVEL_4K:",
                "if False:",
            )
        ],
        races=["R19"],
    ),
    Plant(
        "R19-huge-leaves-stay-writable",
        "Logging protects small leaves and leaves huge ones as they are.",
        "I20",
        [
            Edit(
                "kvmd.core.tables.tdp_log:protect",
                "edit, WRITE_PROTECT, wanted)",
                "edit, edit._replace(clear=0), wanted)",
            ),
            Edit("kvmd.core.tables.tdp_mmu:split", "if count == budget:", "if True:"),
        ],
        races=["R19"],
    ),
    Plant(
        "B-35-by-dirty-bit-under-a-device",
        "Under a lent root D is cleared instead of W, and the unit, which sets no D, stores unseen.",
        "I20",
        [
            Edit(
                "kvmd.core.tables.tdp_log:logs_by_dirty_bit",
                " and not root.exported",
                "",
            )
        ],
        races=["B-35", "R19"],
    ),
    Plant(
        "B-34-no-mark-without-vcpu",
        "A mark that a device's fault makes has no vCPU, so it has no ring, and is dropped.",
        "I20",
        [
            Edit(
                f"{_LOG}.mark",
                "ring = None if vcpu_id is None else self.rings.get(vcpu_id)",
                "if vcpu_id is None and self.rings:\n        return\n"
                "    ring = None if vcpu_id is None else self.rings.get(vcpu_id)",
            )
        ],
        races=["B-34", "R19"],
    ),
    Plant(
        "R19-devices-mark-nothing",
        "What a device's fault makes writable is not marked dirty, since no vCPU stores there.",
        "I25",
        [
            Edit(
                f"{_LOG}.mark",
                "if not slot.logs:",
                "if not slot.logs or vcpu_id is None:",
            )
        ],
        races=["R19", "B-34"],
    ),
    Plant(
        "R19-full-ring-drops",
        "A mark that finds its ring full is dropped instead of put into the bitmap.",
        "I25",
        [
            Edit(
                f"{_LOG}.mark",
                "if (ring is None or not ring.push(slot.number, page)) and slot.dirty is not None:",
                "if ring is not None:\n"
                "        ring.push(slot.number, page)\n"
                "    elif slot.dirty is not None:",
            )
        ],
        races=["R19", "B-34"],
    ),
    Plant(
        "R19-unnoticed-not-dirty",
        "What a device can write unnoticed, pinned or in a root of its own, is not taken to be dirty.",
        "I20",
        [Edit(f"{_LOG}._mark_unnoticed", "dirty.mark(span.start - slot.base_gfn, span.npages)", "pass")],
        races=["R19"],
    ),
    Plant(
        "export-under-a-log",
        "A root that is lent while a slot logs by D keeps its W.",
        "I20",
        [Edit("kvmd.core.export.exports:Exports._reserve", "if self._dirty_log.lend(root):", "if False:")],
        races=["B-35"],
    ),
    Plant(
        "emulated-store-not-marked",
        "A store that the emulator makes for the guest is in no log.",
        "I25",
        [
            Edit(
                "kvmd.core.cpu.guest_ram:GuestRam.store",
                "self._dirty_log.mark(slot, gfn_of(gpa), self._vcpu.id)",
                "pass",
            )
        ],
        races=["R19"],
    ),
    Plant(
        "emulated-access-keeps-its-slot",
        "An emulated access that slept for its page goes by the slot it found before.",
        "R21",
        [
            Edit(
                "kvmd.core.cpu.guest_ram:GuestRam._reach",
                "while (slot := await self._slot(gpa)) is not None and not (write and slot.readonly):",
                "slot = await self._slot(gpa)\n    while slot is not None and not (write and slot.readonly):",
            ),
            Edit(
                "kvmd.core.cpu.guest_ram:GuestRam._reach",
                "if self._slots.find(gfn_of(gpa), self._as_id) is slot:",
                "if True:",
            ),
        ],
        races=["R21"],
    ),
    # -- private memory ----------------------------------------------------------------------------------
    Plant(
        "R24-converted-without-a-zap",
        "gfns become private, and who has their shared pages mapped or cached keeps them.",
        "I11",
        [
            Edit(
                f"{_PRIVATE}.set_attributes",
                "async with self._host_changes.zapped_gfns([span]):",
                "if True:",
            )
        ],
        races=["R24"],
    ),
    Plant(
        "R24-claim-not-asked",
        "gfns become private while another MMU maps their shared pages.",
        "I27",
        [Edit(f"{_PRIVATE}._check_unmapped", "self._mm.claims.check_replacing(*hvas)", "pass")],
        races=["R24"],
    ),
    Plant(
        "R24-mapped-while-converted",
        "Another MMU maps shared pages in the middle of their conversion.",
        "I27",
        [Edit("kvmd.core.mm.claims:Claims.check_mapping", "if any(", "if False and any(")],
        races=["R24"],
    ),
    Plant(
        "R24-hole-without-its-lock",
        "A hole in a guest_memfd does not hold off who binds it: a slot maps what is then given back.",
        "I6",
        [
            Edit(
                f"{_PRIVATE}._drop",
                "async with memfd.invalidate_lock, self._host_changes.zapped_gfns(memfd.spans_of(pages)):",
                "async with self._host_changes.zapped_gfns(memfd.spans_of(pages)):",
            )
        ],
        races=["R24", "R4"],
    ),
    Plant(
        "R24-hole-without-a-zap",
        "A hole gives pages back that gfns still map.",
        "I6",
        [
            Edit(
                f"{_PRIVATE}._drop",
                "async with memfd.invalidate_lock, self._host_changes.zapped_gfns(memfd.spans_of(pages)):",
                "async with memfd.invalidate_lock:",
            )
        ],
        races=["R24", "R4"],
    ),
    Plant(
        "R24-conversion-is-not-noticed",
        "A change of what gfns translate to moves no sequence: a lookup that slept through it is mapped.",
        "I11",
        [
            Edit(
                "kvmd.core.slots.host_changes:HostChanges.zapped_gfns",
                "self.seq = (self.seq + 1) & SEQ_MASK",
                "pass",
            )
        ],
        races=["R24", "R1"],
    ),
    # -- the host's memory -------------------------------------------------------------------------------
    Plant(
        "R4-notifiers-not-awaited",
        "The host changes its page table before it tells.",
        "I6",
        [
            Edit(
                _ANNOUNCED,
                "await notifier.invalidate_range_start(start, end)\n        yield\n",
                "pass\n        yield\n"
                "        for notifier, start, end in told:\n"
                "            await notifier.invalidate_range_start(start, end)\n",
            )
        ],
        races=["R4"],
    ),
    Plant(
        "R26-registers-in-a-change",
        "Who registers while others are told of a change hears of it no more.",
        "I6",
        [Edit(_ANNOUNCED, "while untold := [", "if untold := [")],
        races=["R26", "R4"],
    ),
    Plant(
        "B-19-exit-zaps-unflushed",
        "What a process that exits had is zapped and not flushed.",
        "I6",
        [
            Edit(
                "kvmd.core.slots.host_changes:HostChanges.invalidate_range_start",
                "await self._tdp.zapper.zap(spans)",
                "if end - start >= 1 << 40:\n"
                "        for span in spans:\n"
                "            tdp_mmu.zap_leafs(self._tdp.mmu, span)\n"
                "    else:\n"
                "        await self._tdp.zapper.zap(spans)",
            )
        ],
        races=["B-19"],
    ),
    Plant(
        "R22-fork-leaves-writable",
        "fork shares a page and leaves the parent's entry writable: both write one frame.",
        "I21",
        [Edit("kvmd.core.mm.fork:_share", "elif entry.writable:", "elif False:")],
        races=["R22"],
    ),
    Plant(
        "R22-fork-shares-what-is-pinned",
        "fork shares a pinned page; the parent's next store gets a copy, and the device keeps the other.",
        "I22",
        [
            Edit(
                "kvmd.core.mm.fork:_share",
                "if page.pins and page.kind is PageKind.ANON:",
                "if False:",
            )
        ],
        races=["R22"],
    ),
    Plant(
        "R22-pin-of-what-is-shared",
        "A page is pinned to be read though others have it too: the next store leaves the pin behind.",
        "I22",
        [Edit(f"{_MM}.fault_to_pin", "if write or vma.shared or entry.page.exclusive:", "if True:")],
        races=["R22"],
    ),
    Plant(
        "merged-and-writable",
        "Two equal pages become one, which both of their entries let a store reach.",
        "I21",
        [Edit("kvmd.core.mm.reclaim:_merge", "writable=False", "writable=True")],
    ),
    Plant(
        "a-pin-does-not-count",
        "A pin is accounted for and does not hold the page in its frame.",
        "I22",
        [
            Edit(f"{_MM}.pin", "page.pins += 1", "pass"),
            Edit(f"{_MM}.unpin", 'assert page.pins > 0, "unpinned more often than pinned"', "pass"),
            Edit(f"{_MM}.unpin", "page.pins -= 1", "pass"),
        ],
        races=["R22"],
    ),
    Plant(
        "R26-ageing-asks-who-went",
        "Ageing asks notifiers that were there when it began, one that left meanwhile too.",
        "R26",
        [
            Edit(
                "kvmd.core.mm.reclaim:age",
                "if notifier in space.notifiers:",
                "if True:",
            )
        ],
        races=["R26"],
    ),
    Plant(
        "poisoned-frame-is-lost",
        "Nothing counts the entries that say a page failed, and its frame goes back while they name it.",
        "I21",
        [Edit("kvmd.core.mm.table:PageTable.set", "entry.page.marks += 1", "pass")],
    ),
    Plant(
        "R24-file-pins-not-asked",
        "What is pinned by its offset in a file stands in the way of no conversion to private.",
        "I27",
        [
            Edit(
                "kvmd.core.mm.space:AddressSpace.shows_pinned",
                "return any(",
                "return False and any(",
            )
        ],
        races=["R24"],
    ),
    Plant(
        "R24-offsets-are-addresses",
        "A mirror takes the offsets of what it pins in files for addresses of the process.",
        "I27",
        [Edit(f"{_MIRROR}.maps", " and not pinned.by_offset", "")],
        races=["R24"],
    ),
    Plant(
        "ghosts-of-a-moved-slot",
        "A slot that is moved and stops logging in one call keeps what was not told of it.",
        "I25",
        [
            Edit(
                "kvmd.core.slots.store_record:StoreRecord.replaced",
                "if now is None or not now.logs:",
                "if now is None or (not now.logs and now.base_gfn == slot.base_gfn):",
            )
        ],
        races=["R19", "R21"],
    ),
    # -- other MMUs of the process -----------------------------------------------------------------------
    Plant(
        "R4-mirror-not-awaited",
        "A mirror is told of a change and its ack is not waited for.",
        "I6",
        [
            Edit(
                f"{_MIRROR}.invalidate_range_start",
                "await self._ops.invalidate(first, last - first, self.seq)",
                "self._ops.invalidate(first, last - first, self.seq)",
            )
        ],
        races=["R4"],
    ),
    Plant(
        "R1-mirror-answers-in-a-change",
        "A range that is being changed is answered.",
        "I5",
        [
            Edit(
                f"{_MIRROR}._is_changing",
                "any(first < end and start < last for first, last in self._changing)",
                "False",
            )
        ],
        races=["R1"],
    ),
    Plant(
        "R1-mirror-unsettled-behind-a-fault",
        "A range whose fault slept is answered though its change began meanwhile.",
        "I5",
        [
            Edit(
                f"{_MIRROR}.range_fault",
                "await self._settled(start, end)\n        pages, stopped",
                "pages, stopped",
            )
        ],
        races=["R1"],
    ),
    Plant(
        "R1-mirror-back-in-a-change",
        "A mirror goes back to a process between two turns of an unmap, and is told nothing of the rest.",
        "I5",
        [Edit(f"{_MIRROR}.undo_change_process", "async with before.mmap_lock:", "if True:")],
        races=["R1"],
        simulated=False,  # no story has files of which a takeover fails half way
    ),
    Plant(
        "R26-last-range-not-told",
        "Of a change that meets several watched ranges the last is not told.",
        "I6",
        [
            Edit(
                f"{_MIRROR}._first_from",
                "bisect_left(self._watched, (end, end))",
                "max(bisect_left(self._watched, (end, end)) - 1, 0)",
            )
        ],
        races=["R26", "R4"],
    ),
    Plant(
        "pin-outlives-its-mirror",
        "A pin that slept is not asked whether its mirror is still there.",
        "I6",
        [
            Edit(
                f"{_MIRROR}._page_to_pin",
                "write=write, tally=tally)\n    self._check(errno.EFAULT)",
                "write=write, tally=tally)",
            )
        ],
        races=["R26"],
    ),
)
