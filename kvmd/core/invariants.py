"""Checks across the objects of kvmd, for tests and for kvmd on request.

Each violation is a sentence that begins with the number of its invariant (docs/invariants.md).  They hold
whenever no flow is in the middle of a change; what a change in progress excuses is left out.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from kvmd.core.slots.pinned import AS_ID
from kvmd.core.tables import tdp_log
from kvmd.core.tables.spte import MAY_WRITE, is_young
from kvmd.core.tables.tdp_table import Root
from kvmd.core.vm import Kvm
from protocol.pt import bits
from protocol.pt.check import check_table, frozen_or_mmio
from protocol.pt.cursor import walk_range
from protocol.pt.entry import is_frozen, is_mmio, is_present, is_present_leaf, is_table, is_writable, pfn_of
from protocol.pt.geometry import entry_span
from protocol.pt.walk import WalkRules, second_stage_rules
from protocol.units import LEVEL_4K, PAGE_SHIFT, Gfn, pages_of_level


def check_vm(vm: Kvm) -> list[str]:
    """Everything that must hold whenever no flow is in the middle of a change."""
    found = _check_pins(vm) + _check_private(vm)
    for root in vm.mmu.roots:
        found += check_table(
            vm.mmu.writer, root.format, root.hpa, root.role.level, walker_rules(vm), frozen_or_mmio
        )
        found += _check_counts(vm, root)
        if not root.invalid:
            found += _check_frames(vm, root)
        if not root.invalid and not vm.host_changes.in_progress:
            found += _check_translations(vm, root)
            found += _check_pinned(vm, root)
            found += _check_dirty_log(vm, root)
        if not root.role.policy.cpus and not root.invalid:
            found += _check_untouched(vm, root)
    for exported in vm.exports.tdps.values():
        if exported.root.hpa != exported.meta.root_hpa or exported.root.invalid or not exported.root.exported:
            found.append(f"I10: exported root {exported.meta.root_hpa:#x} moved or became invalid")
    found += [
        f"I25: gfn {gfn:#x} was stored to, its slot {slot.id} logs, nothing tells user space"
        for slot, gfn in vm.dirty_log.stores.untold()
        if not vm.dirty_log.tells(slot, gfn)
    ]
    if vm.flusher.acked == vm.flusher.epoch and vm.host.pool.held(vm.id):
        found.append(f"I7: {vm.host.pool.held(vm.id)} table pages held though every flush is acked")
    return found


def walker_rules(vm: Kvm) -> tuple[WalkRules, ...]:
    """Of the CPU and of a unit as wide as it."""
    features = vm.host.features
    unit = second_stage_rules(features.maxphyaddr, features.max_page_level, snoop_control=True)
    return vm.host.ept_rules, unit


def _check_counts(vm: Kvm, root: Root) -> list[str]:
    leaves, tables = [0] * len(root.leaves), [0] * len(root.tables_at)
    tables[root.role.level] = 1
    for met in walk_range(vm.mmu.writer, root.format, root.hpa, root.role.level, root.everything):
        if is_table(met.entry, met.level):
            tables[met.level - 1] += 1
        elif is_present(met.entry):
            leaves[met.level] += 1
    return [
        f"I16: root {root.hpa:#x} counts {what} {counted}, the table has {found}"
        for what, counted, found in (("leaves", root.leaves, leaves), ("tables", root.tables_at, tables))
        if counted != found
    ]


def _check_frames(vm: Kvm, root: Root) -> list[str]:
    """I6: whatever changes, no leaf leads to a frame that was given up."""
    return [
        f"I6: gfn {met.gfn:#x} level {met.level} maps pfn {pfn_of(met.entry):#x}, which is free"
        for met in vm.mmu.leaves(root)
        if vm.host.frames.is_free(pfn_of(met.entry))
    ]


def _check_private(vm: Kvm) -> list[str]:
    """I6: what a guest_memfd has is its own, and a slot's part of it is no other slot's.  I27: no other MMU
    maps what it stands for."""
    found = []
    bound = [slot.private for slot in vm.slots if slot.private is not None]
    for memfd in {binding.memfd for binding in bound}:
        found += [
            f"I6: guest_memfd page {index:#x} is pfn {page.pfn:#x}, which is free"
            for index, page in memfd.pages()
            if vm.host.frames.is_free(page.pfn)
        ]
        parts = sorted((held.first, held.span.npages) for held in bound if held.memfd is memfd)
        for (first, npages), (other, _) in pairwise(parts):
            if first + npages > other:
                found.append(f"I6: guest_memfd page {other:#x} is bound to two slots")
    for slot in vm.slots:
        for span in vm.private.attributes:
            hvas = slot.hvas_of(span)
            if hvas is not None and any(claim(*hvas) for claim in vm.mm.claims.mapped):
                found.append(
                    f"I27: {span} of slot {slot.id} is private, and another MMU maps what it replaced"
                )
    for binding in bound:
        if binding not in binding.memfd.bindings:
            found.append(f"I6: {binding.span} has pages of a guest_memfd that does not know it")
    return found


def _check_translations(vm: Kvm, root: Root) -> list[str]:
    """I11: each leaf maps the frame the host has at that address now, and no more rights than it has.

    Not of a slot that goes, batch by batch: its pins are forgotten, and what they held is mapped still.
    """
    found = []
    for met in vm.mmu.leaves(root):
        slot = vm.slots.find(met.gfn, root.role.as_id)
        if slot is None:
            found.append(f"I11: gfn {met.gfn:#x} is mapped but in no memslot")
            continue
        if slot is vm.slots.going:
            continue
        if vm.pinning.pinned.page_of(slot, met.gfn) is not None:
            continue  # what the host has there now does not matter: I22
        binding = slot.private
        if binding is not None and (vm.private.serves(slot, met.gfn)):
            private = binding.memfd.present(binding.index_of(met.gfn))
            if private is None or private.pfn != pfn_of(met.entry):
                found.append(f"I11: gfn {met.gfn:#x} is private and maps pfn {pfn_of(met.entry):#x}")
            continue
        page = vm.mm.present_page(slot.hva_of(met.gfn))
        if page is None:
            found.append(f"I11: gfn {met.gfn:#x} maps pfn {pfn_of(met.entry):#x}, the host has no page there")
            continue
        pfn = page.pfn + ((slot.hva_of(met.gfn) - page.hva) >> PAGE_SHIFT)
        if pfn_of(met.entry) != pfn:
            found.append(f"I11: gfn {met.gfn:#x} maps pfn {pfn_of(met.entry):#x}, the host has {pfn:#x}")
        if met.level > page.level or met.gfn + pages_of_level(met.level) > slot.span.end:
            found.append(f"I11: gfn {met.gfn:#x} level {met.level} maps beyond its host page or its slot")
        tracked = root.role.policy.tracks and vm.page_track.any_in(slot, entry_span(met.gfn, met.level))
        if is_writable(met.entry) and tracked:
            found.append(f"I19: gfn {met.gfn:#x} level {met.level} is writable and tracked")
        if is_writable(met.entry) and (slot.readonly or not page.writable):
            found.append(f"I11: gfn {met.gfn:#x} is writable, its slot or its host page is not")
    return found


def _check_pins(vm: Kvm) -> list[str]:
    """I22: what is pinned is nothing that must fault or can go, and each pin is that of a request."""
    found = []
    held = Counter(gfn for request in vm.pinning.requests() for gfn in request.gfns)
    for gfn, pin in vm.pinning.pinned.items():
        slot = vm.slots.find(gfn, AS_ID)
        if slot is None:
            found.append(f"I22: gfn {gfn:#x} is pinned and in no memslot")
            continue
        wrong = {
            "its slot read-only": slot.readonly,
            "private memory": vm.private.serves(slot, gfn),
            "write-tracked": vm.page_track.is_tracked(slot, gfn),
            "not exported": AS_ID not in vm.exports.tdps,
        }
        found += [f"I22: gfn {gfn:#x} is pinned and {what}" for what, is_so in wrong.items() if is_so]
        if pin.count != held[gfn]:
            found.append(f"I22: gfn {gfn:#x} has {pin.count} pins, {held[gfn]} requests have one of it")
    lost = held.keys() - vm.pinning.pinned.keys()
    return found + [f"I22: gfn {gfn:#x} is not pinned, a request believes it is" for gfn in sorted(lost)]


def _check_pinned(vm: Kvm, root: Root) -> list[str]:
    """I22: a pinned gfn maps the pinned frame by a small entry; in an exported root it does, writable."""
    found = []
    if root.role.as_id != AS_ID:
        return []
    for gfn, pin in vm.pinning.pinned.items():
        met = vm.mmu.leaf_at(root, gfn)
        if met is None:
            if root.exported:
                found.append(f"I22: gfn {gfn:#x} is pinned and absent")
        elif met.level > LEVEL_4K or pfn_of(met.entry) != pin.pfn:
            what = f"pfn {pfn_of(met.entry):#x} at level {met.level}"
            found.append(f"I22: gfn {gfn:#x} maps {what}, pinned is {pin.pfn:#x}")
        elif root.exported and not is_writable(met.entry):
            found.append(f"I22: gfn {gfn:#x} is pinned and not writable")
        if not pin.page.pins:
            found.append(f"I22: gfn {gfn:#x} is pinned, its host page is not")
    return found


def _check_dirty_log(vm: Kvm, root: Root) -> list[str]:
    """I20: no store to a page that user space believes clean goes unnoticed.  Rings are user space's own, but
    what devices alone reach is in none."""
    found = []
    in_rings = vm.dirty_log.rings and root.role.policy.cpus
    for met in vm.mmu.leaves(root):
        slot = vm.slots.find(met.gfn, root.role.as_id)
        if slot is None or slot.dirty is None or in_rings or not is_writable(met.entry):
            continue
        span = entry_span(met.gfn, met.level)
        noticed = tdp_log.logs_by_dirty_bit(vm.mmu, root) and not met.entry & bits.DIRTY
        clean = [gfn for gfn in range(span.start, span.end) if not vm.dirty_log.is_dirty(slot, Gfn(gfn))]
        if clean and not noticed:
            found.append(f"I20: gfn {clean[0]:#x} is writable, its slot {slot.id} logs, its bit is clear")
    return found


def _check_untouched(vm: Kvm, root: Root) -> list[str]:
    """I23: nothing in a root of the IOMMU's own is there to make a device fault that its policy has no use
    for: a leaf has each right it was made with and counts as used, and no entry is MMIO or frozen."""
    found = []
    policy = root.role.policy
    keeps_write = not (policy.logs or policy.tracks)
    for met in walk_range(vm.mmu.writer, root.format, root.hpa, root.role.level, root.everything):
        if is_mmio(met.entry) or (is_frozen(met.entry) and keeps_write):
            found.append(f"I23: gfn {met.gfn:#x} level {met.level} of the IOMMU's root is {met.entry:#x}")
        elif is_present_leaf(met.entry, met.level):
            given = met.entry & MAY_WRITE
            if keeps_write and given and (given != MAY_WRITE or not is_writable(met.entry)):
                found.append(f"I23: gfn {met.gfn:#x} level {met.level} lost its right to write")
            if not policy.ages and not is_young(met.entry):
                found.append(f"I23: gfn {met.gfn:#x} level {met.level} was aged")
    return found
