"""How large a leaf may be, at a gfn, for a page, in a root, and which frame such a leaf begins with.

Models kvm_mmu_max_mapping_level and kvm_mmu_hugepage_adjust [KVM mmu.c]: the host page, the slot, the memory
attributes and the root's policy each have a limit, and what is logged, tracked or pinned there is mapped page
by page.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvmd.core.mm.page import MappedPage
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.memslot import Memslot
from kvmd.core.tables.root_policy import RootPolicy
from protocol.pt.geometry import entry_span
from protocol.units import LEVEL_4K, PAGE_SHIFT, Gfn, GfnSpan, Level, Pfn, pages_of_level


class LeafLevels:
    """Of one VM; `max_huge_page_level` is the CPUs'."""

    def __init__(self, frames: GuestFrames, max_huge_page_level: Level) -> None:
        self._frames = frames
        self._max_huge_page_level = max_huge_page_level

    def level_now(self, slot: Memslot, policy: RootPolicy, gfn: Gfn) -> Level:
        """The largest leaf a fault at `gfn` would make now."""
        if self._frames.private.serves(slot, gfn):
            return LEVEL_4K
        page = self._frames.mm.present_page(slot.hva_of(gfn))
        return LEVEL_4K if page is None else self.level_of(slot, gfn, page, policy)

    def level_of(self, slot: Memslot, gfn: Gfn, page: MappedPage, policy: RootPolicy) -> Level:
        """The size of leaf that a fault at `gfn` gets for `page` in a root of `policy`."""
        if page.level == LEVEL_4K:
            return LEVEL_4K
        most = min(policy.max_huge_page_level, self._max_huge_page_level)
        limit = self._frames.private.attributes.max_level(gfn, most)
        return mapping_level(slot, gfn, page, limit, partial(self._needs_small, policy))

    def _needs_small(self, policy: RootPolicy, slot: Memslot, span: GfnSpan) -> bool:
        """A slot that logs does so page by page."""
        return (
            (policy.logs and slot.logs)
            or (policy.tracks and self._frames.page_track.any_in(slot, span))
            or self._frames.pinned.any_in(slot.as_id, span)
        )


def mapping_level(
    slot: Memslot, gfn: Gfn, page: MappedPage, limit: Level, small: Callable[[Memslot, GfnSpan], bool]
) -> Level:
    """The largest level whose entry lies in the slot and in the host page, with nothing of it that has to be
    `small` [KVM kvm_mmu_hugepage_adjust].
    """
    for level in range(min(page.level, limit), LEVEL_4K, -1):
        pages = pages_of_level(Level(level))
        span = entry_span(gfn, Level(level))
        inside = slot.base_gfn <= span.start and span.end <= slot.span.end
        aligned = (slot.base_gfn ^ (slot.hva >> PAGE_SHIFT)) % pages == 0
        if inside and aligned and not small(slot, span):
            return Level(level)
    return LEVEL_4K


def first_pfn(slot: Memslot, gfn: Gfn, page: MappedPage, level: Level) -> Pfn:
    """The frame that backs the first gfn of the entry of `level` that covers `gfn`."""
    if page.level == LEVEL_4K:
        return page.pfn
    hva = slot.hva_of(entry_span(gfn, level).start) if level > LEVEL_4K else slot.hva_of(gfn)
    return Pfn(page.pfn + ((hva - page.hva) >> PAGE_SHIFT))
