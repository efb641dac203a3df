"""How large a leaf may be, at a gfn, for a page, in a root.

Models kvm_mmu_max_mapping_level and kvm_mmu_hugepage_adjust [KVM mmu.c]: the host page, the slot, the memory
attributes and the root's policy each have a limit, and what is logged, tracked or pinned there is mapped page
by page.
"""

from __future__ import annotations

from functools import partial

from kvmd.core.faults.page_fault import mapping_level
from kvmd.core.mm.page import MappedPage
from kvmd.core.slots.guest_frames import GuestFrames
from kvmd.core.slots.memslot import Memslot
from kvmd.core.tables.root_policy import RootPolicy
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Level


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
