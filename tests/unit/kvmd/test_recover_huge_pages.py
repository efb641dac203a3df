"""Tables that only logging asked for: frozen, flushed, thawed; meanwhile others may have replaced them."""

from __future__ import annotations

from kvmd.core.tables import tdp_log
from protocol.flow import Wait
from protocol.pt import bits
from protocol.pt.cursor import RangeEntry
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Level
from tests.kit.lent import Lent

HUGE, LARGER = Level(2), Level(3)
BASE = 0x200
SPAN = GfnSpan.of_pages(Gfn(BASE), 512)


class Frozen(Lent):
    """A table of small leaves where a leaf of 2 MiB fits: cut off, its entry frozen."""

    def __init__(self) -> None:
        super().__init__(BASE, 512, level=2)
        self.io_fault(self.exported, BASE)
        self.mmu, self.root = self.vm.mmu, self.exported.root
        leaf = self.mmu.seek(self.root, Gfn(BASE))
        self.mmu.split_leaf(self.root, Gfn(BASE), leaf.level, leaf.at, leaf.entry)
        met = tdp_log.freeze_collapsible(self.mmu, self.root, SPAN, lambda gfn: HUGE)
        assert met is not None
        self.met: RangeEntry = met
        self.flush()

    def flush(self) -> None:
        over: Wait[None] = self.start(self.vm.tdp.flusher.flush(None))
        self.ack(self.importer)
        assert over.done
        self.vm.tdp.flusher.reclaim()

    def entry(self) -> int:
        return self.mmu.writer.load64(self.met.at)


def test_a_frozen_entry_is_empty_behind_its_flush() -> None:
    rig = Frozen()
    assert rig.entry() == bits.FROZEN
    tdp_log.thaw(rig.mmu, rig.root, rig.met)
    assert rig.entry() == bits.EMPTY
    assert rig.sound()


def test_what_somebody_else_froze_in_the_same_page_is_not_thawed() -> None:
    rig = Frozen()
    above = rig.mmu.seek(rig.root, Gfn(BASE), LARGER)
    rig.mmu.change(rig.root, Gfn(0), LARGER, above.at, above.entry, bits.EMPTY)
    rig.flush()
    pages = [rig.mmu.pool.allocate() for _ in range(4)]
    assert rig.met.at & ~0xFFF in pages, "the page is another's now"
    rig.mmu.writer.store64(rig.met.at, bits.FROZEN)
    tdp_log.thaw(rig.mmu, rig.root, rig.met)
    assert rig.entry() == bits.FROZEN
    assert rig.mmu.seek(rig.root, Gfn(BASE), LEVEL_4K).level == LARGER
