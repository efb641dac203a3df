"""Mistakes in kvmd's tables, flushes and faults."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

_FLUSHER = "kvmd.core.tables.flush:Flusher"
_ZAPPER = "kvmd.core.tables.zap:Zapper"
_MMU = "kvmd.core.tables.tdp_table:TdpMmu"
_FAULTS = "kvmd.core.faults.fault_path:FaultPath"
_CHANGES = "kvmd.core.slots.host_changes:HostChanges"
_POOL = "protocol.pt.table_pool:TablePool"
_FOUND_AGAIN = "frames.slots.find(gfn, fault.as_id) is not slot"
_STALE = "stale = seq != frames.host_changes.seq or frames.host_changes.is_changing(hva, gfn)"

KVMD_TDP = (
    # -- a fault and a change of what it looked up -------------------------------------------------------
    Plant(
        "R1-not-asked-again",
        "A fault maps the page it looked up without asking whether the host took it meanwhile.",
        "I5",
        [Edit(f"{_FAULTS}._try", _STALE, "stale = False")],
        races=["R1"],
    ),
    Plant(
        "R1-sequence-stands",
        "The end of an invalidation does not move the sequence, so one that began and ended is not noticed.",
        "I5",
        [Edit(f"{_CHANGES}.invalidate_range_end", "self.seq = (self.seq + 1) & SEQ_MASK", "pass")],
        races=["R1"],
        simulated=False,  # a page is found and mapped in one step here: nothing sleeps between
    ),
    Plant(
        "R1-range-not-looked-at",
        "A fault compares sequences and does not look whether its page is just being changed.",
        "I5",
        [Edit(f"{_CHANGES}.is_changing", "if not self.in_progress:", "if True:")],
        races=["R1"],
    ),
    Plant(
        "R2-sequence-of-32-bits",
        "The sequence is read as a signed 32-bit number: from 2^31 on every fault retries for ever.",
        "R2",
        [
            Edit(
                f"{_FAULTS}._try",
                "seq = frames.host_changes.seq\n",
                "seq = (frames.host_changes.seq & 0xFFFF_FFFF ^ 1 << 31) - (1 << 31)\n",
            )
        ],
        races=["R2"],
    ),
    Plant(
        "R3-obsolete-root-is-found",
        "A root that a change of the slots made obsolete is given to the next vCPU that asks for its role.",
        "R3",
        [Edit(f"{_MMU}.get_root", "r.role == role and not r.invalid", "r.role == role")],
        races=["R3"],
    ),
    Plant(
        "R3-vcpu-keeps-its-root",
        "A vCPU does not look whether its root became obsolete, and faults into it.",
        "R3",
        [Edit("kvmd.core.cpu.vcpu_arch:VcpuArch.load_root", "and root.invalid", "and False")],
        races=["R3"],
    ),
    Plant(
        "root-put-and-kept",
        "A vCPU whose new root cannot be made keeps the obsolete one it has put.",
        "R3",
        [
            Edit(
                "kvmd.core.cpu.vcpu_arch:VcpuArch.load_root",
                "self.roots[as_id] = None",
                "pass",
            )
        ],
        races=["R3"],
    ),
    Plant(
        "R21-slot-not-found-again",
        "A fault maps for the slot it found before its lookup slept, though it is deleted or another's now.",
        "I11",
        [Edit(f"{_FAULTS}._try", _FOUND_AGAIN, "False")],
        races=["R21"],
    ),
    Plant(
        "R21-slot-that-goes",
        "A fault whose lookup slept maps for a slot that is being deleted, behind its zap.",
        "I11",
        [Edit(f"{_FAULTS}._try", f"{_FOUND_AGAIN} or slot is frames.slots.going", _FOUND_AGAIN)],
        races=["R21"],
    ),
    Plant(
        "equal-slot",
        "A fault takes a slot that was made anew, equal in all, for its own: its mark goes to the old one.",
        "I20",
        [Edit(f"{_FAULTS}._try", _FOUND_AGAIN, "frames.slots.find(gfn, fault.as_id) != slot")],
        races=["R21", "R19"],
    ),
    Plant(
        "B-13-spurious-is-an-error",
        "A fault that finds the same entry there fails, though somebody else was only faster.",
        "I8",
        [Edit(f"{_FAULTS}._map", "else FaultResult.SPURIOUS", "else FaultResult.NO_PAGE")],
        races=["B-13"],
    ),
    Plant(
        "B-14-poison-retries",
        "A fault on a page whose memory failed is tried again instead of refused.",
        "R20",
        [
            Edit(
                f"{_FAULTS}._try",
                "return LOOKUP_RESULT.get(error.errno, FaultResult.NO_PAGE)",
                "return None if error.errno == 133 else LOOKUP_RESULT.get(error.errno, FaultResult.NO_PAGE)",
            )
        ],
        races=["B-14", "R2", "R20"],
    ),
    Plant(
        "B-25-slots-lock-over-faults",
        "Faults hold the slots_lock while they sleep: they wait for each other, and for a change of slots.",
        "R27",
        [
            Edit(
                f"{_FAULTS}.handle_fault",
                "result = await self._resolve(fault, vcpu)",
                "async with self._frames.slots.lock:\n        result = await self._resolve(fault, vcpu)",
            )
        ],
        races=["B-25", "R27"],
    ),
    Plant(
        "B-26-faults-wait-for-acks",
        "Importers are waited for under the MMU lock: no fault gets on until every flush is acked.",
        "R27",
        [
            Edit(
                f"{_FAULTS}._try",
                "slot = frames.slots.find(gfn, fault.as_id)\n    if slot is None:",
                "await self._flusher.drain()\n"
                "    slot = frames.slots.find(gfn, fault.as_id)\n"
                "    if slot is None:",
            )
        ],
        races=["B-26", "R27"],
    ),
    Plant(
        "R20-tracked-is-writable",
        "What is stored for a fault does not ask whether the gfn is tracked.",
        "I19",
        [
            Edit(
                f"{_FAULTS}._store",
                "policy.tracks and self._frames.page_track.is_tracked(slot, gfn)",
                "False",
            )
        ],
        races=["R20"],
    ),
    Plant(
        "B-24-tracked-not-refused",
        "A device's store to a tracked gfn gets a read-only entry and asks again, for ever.",
        "R20",
        [
            Edit(
                f"{_FAULTS}._try",
                "frames.page_track.is_tracked(slot, gfn) and (vcpu or self._mmu.lent_policy.tracks)",
                "False",
            )
        ],
        races=["R20", "B-24"],
    ),
    Plant(
        "other-root-not-filled",
        "With a root of the IOMMU's own, what a vCPU faults in is not mapped beside it.",
        "I23",
        [Edit(f"{_FAULTS}._map", "if self._mmu.lent_policy.filled_beside:", "if False:")],
    ),
    # -- flushes -----------------------------------------------------------------------------------------
    Plant(
        "R4-acks-not-awaited",
        "A flush tells all who walk and does not wait until they have forgotten.",
        "I6",
        [Edit(f"{_FLUSHER}.flush", "await wait", "pass")],
        races=["R4", "R17"],
    ),
    Plant(
        "R17-nobody-is-told",
        "A flush is counted, and nobody hears of it.",
        "I6",
        [Edit(f"{_FLUSHER}.flush", "in self._tell(span, epoch):", "in ():")],
        races=["R17", "R4"],
    ),
    Plant(
        "R4-only-the-first-ack",
        "A flush is over when the first of several importers has acked it.",
        "I6",
        [Edit(f"{_FLUSHER}.flush", "await wait", "await wait\n        break")],
        races=["R4", "R17"],
    ),
    Plant(
        "B-18-drain-is-skipped",
        "Who finds nothing to clear does not wait for the flush of who cleared it.",
        "I6",
        [Edit(f"{_FLUSHER}.drain", "await wait", "pass")],
        races=["B-18", "R17"],
    ),
    Plant(
        "R5-youngest-ack-counts",
        "The youngest flush that was acked counts, though an older one is not.",
        "I7",
        [
            Edit(
                f"{_FLUSHER}.acked",
                "min(self._outstanding, default=self.epoch + 1) - 1",
                "max({*range(self.epoch + 1)} - {*self._outstanding})",
            )
        ],
        races=["R5"],
    ),
    Plant(
        "R5-no-quarantine",
        "A table page is free from the moment it is unlinked, before anybody flushed.",
        "I7",
        [
            Edit(f"{_POOL}.quarantine", "held.append(_Held(table, epoch))", "self._clear(table)"),
        ],
        races=["R5"],
    ),
    Plant(
        "R5-epoch-too-early",
        "An unlinked table waits for the flush before the one that follows its unlinking.",
        "I7",
        [
            Edit(
                f"{_MMU}.change",
                "until = self.next_epoch() if epoch is None else epoch",
                "until = self.next_epoch() - 1 if epoch is None else epoch",
            )
        ],
        races=["R5"],
    ),
    Plant(
        "R17-zap-unflushed",
        "What a zap cleared since its last full batch is not flushed.",
        "I6",
        [Edit(f"{_ZAPPER}.zap", "if unflushed:", "if False:")],
        races=["R17"],
    ),
    Plant(
        "B-33-turn-before-flush",
        "A long zap gives others a turn before it flushed what it cleared.",
        "I6",
        [
            Edit(
                f"{_ZAPPER}.zap",
                "            await self._flusher.flush(told)\n            await self._cond_resched()\n",
                "            await self._cond_resched()\n            await self._flusher.flush(told)\n",
            )
        ],
        races=["B-33", "R17"],
    ),
    Plant(
        "B-33-cursor-goes-on",
        "A long zap walks on below a table that was cut off while others had a turn.",
        "I18",
        [Edit(f"{_ZAPPER}.zap", "cursor.resume()", "pass")],
        races=["B-33"],
        # A batch that ends within a table begins anew at the root (ranges); one that ends with it goes on
        # in the table above, whose place only a leaf of 1 GiB takes.
        simulated=False,
    ),
    Plant(
        "R21-obsolete-roots-unflushed",
        "Roots become obsolete with a slot and their walkers are not told.",
        "I7",
        [
            Edit(
                f"{_ZAPPER}.zap_all_fast",
                "unflushed = self._mmu.invalidate_roots()",
                "unflushed = self._mmu.invalidate_roots() and False",
            )
        ],
        races=["R21", "R17"],
    ),
    Plant(
        "R21-slot-goes-unzapped",
        "A slot is deleted and nothing of it is zapped.",
        "R21",
        [
            Edit(
                "kvmd.core.slots.slots_change:SlotsChange._replace",
                "await self._tdp.zapper.zap_all_fast(old.as_id, old.span)",
                "pass",
            )
        ],
        races=["R21"],
    ),
    Plant(
        "R21-all-slots-lose-their-leaves",
        "Deleting a slot takes every slot's leaves from a root whose policy keeps them.",
        "I23",
        [
            Edit(
                "kvmd.core.tables.zap:_lost_by",
                "if root.role.policy.zapped_whole:",
                "if True:",
            )
        ],
        races=["R21"],
    ),
    Plant(
        "R5-mapping-over-unflushed",
        "A huge leaf replaces a table, or another frame's an entry, and cached copies of the old one stay.",
        "I6",
        [
            Edit(f"{_FAULTS}._map", "if flush is not None:", "if False:"),
        ],
        races=["R5", "R6"],
    ),
    Plant(
        "cpus-are-not-flushed",
        "A flush tells importers and leaves vCPUs their translations.",
        "I6",
        [Edit("kvmd.core.vm:Kvm._tell_walkers", "self.vcpus.flush_tlb(span)", "pass")],
        races=["R4", "R17"],
    ),
    Plant(
        "importers-are-not-told",
        "A flush is for vCPUs alone: importers are not told.",
        "I6",
        [
            Edit(
                "kvmd.core.vm:Kvm._tell_walkers",
                "return self.exports.flush_notify(span, epoch)",
                "return []",
            )
        ],
        races=["R4", "R17"],
    ),
    # -- entries -----------------------------------------------------------------------------------------
    Plant(
        "read-only-slot-is-writable",
        "A load from a read-only slot maps its page writable, if it is so in the host.",
        "I21",
        [Edit(f"{_FAULTS}._store", " and not slot.readonly", "")],
    ),
    Plant(
        "R14-torn-store",
        "An entry is stored in two halves: a walker between them reads half of each.",
        "I4",
        [
            Edit(
                "protocol.pt.mem:TableWriter.store64",
                "self.words[offset >> 3] = entry",
                "self.words[offset >> 3] = self.words[offset >> 3] >> 32 << 32 | entry & 0xFFFF_FFFF\n"
                "        self.words[offset >> 3] = entry",
            )
        ],
        races=["R14"],
    ),
    Plant(
        "R14-split-links-first",
        "A split links its new table before it is filled.",
        "I4",
        [
            Edit(
                f"{_MMU}.split_leaf",
                "self.writer.fill_unlinked(table, split_children(root.format, leaf, level))",
                "self.link(root, gfn, level, at, leaf, table)\n"
                "    self.writer._linked.discard(table)  # or it would say so itself\n"
                "    self.writer.fill_unlinked(table, split_children(root.format, leaf, level))",
            ),
            Edit(
                f"{_MMU}.split_leaf",
                "\n    self.splits += 1\n    self.link(root, gfn, level, at, leaf, table)",
                "\n    self.splits += 1",
            ),
        ],
        races=["R14", "R19"],
    ),
    Plant(
        "R16-bit-11",
        "Entries that point to tables are marked by bit 11, which the remapping unit reserves.",
        "I2",
        [Edit("protocol.pt.format:TableFormat.make_table", "return table", "return 1 << 11 | table")],
        races=["R16"],
    ),
    Plant(
        "R19-split-loses-dirty",
        "A split of a dirty huge leaf makes clean small ones.",
        "I25",
        [
            Edit(
                "kvmd.core.tables.spte:split_children",
                "return fmt.split(leaf, level)",
                "return fmt.split(leaf & ~bits.DIRTY, level)",
            )
        ],
        races=["R19"],
    ),
    Plant(
        "B-22-mmio-entry-with-rights",
        "An entry that remembers MMIO has W and X without R, and the unit reads W: hpa = gpa.",
        "I3",
        [
            Edit(
                "kvmd.core.tables.spte:make_mmio_entry",
                "entry = bits.MMIO |",
                "entry = bits.MMIO | bits.WRITE | bits.EXEC |",
            )
        ],
        races=["B-22"],
    ),
    Plant(
        "mmio-generation-wraps",
        "MMIO entries of the last time round look fresh when the generation wraps.",
        "I11",
        [
            Edit(
                "kvmd.core.slots.slots_change:SlotsChange._replaced",
                "if self._slots.generation & MMIO_GENERATION_MASK == 0:",
                "if False:",
            )
        ],
        simulated=False,  # it takes as many changes of the slots as a generation has numbers
    ),
    Plant(
        "I23-ageing-takes-every-root",
        "Ageing takes rights of the IOMMU's own root too, and a device faults for nothing.",
        "I23",
        [Edit(f"{_MMU}.aged_roots", " if root.role.policy.ages", "")],
        races=["R20"],
    ),
    Plant(
        "I23-logging-protects-every-root",
        "Logging takes W from the IOMMU's own root too.",
        "I23",
        [Edit(f"{_MMU}.logged_roots", " if root.role.policy.logs", "")],
        races=["R20"],
    ),
    Plant(
        "R22-pin-passed-over",
        "A zap takes pinned gfns' entries with the others.",
        "I22",
        [
            Edit(
                "kvmd.core.tables.ranges:edit_leaves",
                "new = mmu.skip_pinned(root, run, new)",
                "new = mmu.skip_pinned(root, run, new) if edit is not ZAP else new",
            )
        ],
        races=["R22"],
    ),
    Plant(
        "collapse-thaws-unflushed",
        "A table that one huge leaf could replace is cut off, and what it mapped is not flushed.",
        "I7",
        [
            Edit(
                "kvmd.core.slots.dirty_log:DirtyLog._recover_huge_pages",
                "await self._flusher.flush(region)\n            tdp_log.thaw(self._mmu, root, met)",
                "tdp_log.thaw(self._mmu, root, met)",
            )
        ],
        races=["R6", "B-21"],
    ),
    Plant(
        "B-23-roots-left-at-the-end",
        "A VM that ends does not take its roots apart.",
        "I7",
        [
            Edit(
                "kvmd.core.vm:Kvm.destroy",
                "await self.tdp.zapper.dismantle(self.mmu.roots)",
                "pass",
            )
        ],
        races=["B-23"],
    ),
)
