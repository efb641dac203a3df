"""The judges of the ghost history: of each, histories that are legal, and some whose last step breaks it."""

from __future__ import annotations

import pytest

from protocol.pt.bits import DIRTY, EXEC, MMIO, READ, SNOOP, WRITE
from simulator.ghost.backing import Shown
from simulator.ghost.ghost import Ghost
from simulator.ghost.spans import Translation
from simulator.ghost.violation import Verdicts, Violation

ROOT, TABLE, SPARE, OTHER = 0x1000, 0x2000, 0x3000, 0x9000
RW = READ | WRITE
RWX = RW | EXEC
A, B, HUGE = 0x100, 0x200, 0x2_0000  # frames
PAGE, HVA_PAGE = 0x10, 0x80
LARGE = 1 << 7
DEVTLB, IOTLB, PSC, VCPU = ("devtlb", "6a08"), ("iotlb", "0"), ("psc", "0"), ("vcpu", "0")


class Story:
    """A VM whose page 16 is page 128 of its process, in frame A; a root of two levels that maps it.

    Each step of a history is a method: what the host, kvmd, a cache or a device does.
    """

    def __init__(self) -> None:
        self.verdicts = Verdicts()
        self.ghost = ghost = Ghost(self.verdicts)
        for table in (ROOT, TABLE, SPARE):
            ghost.table_taken(table, "kvmd")
        ghost.root_made(ROOT, 2, "vm", "kvm")
        ghost.entry_stored(ROOT, TABLE | RWX)
        for frame in (A, B):
            ghost.frames_taken(frame, 1, "mm")
        ghost.shows("vm", PAGE, PAGE + 2, Shown("mm", HVA_PAGE, RW))
        self._host_has(Translation(A, RW))
        self.map()

    def play(self, steps: str) -> set[str]:
        for step in steps.split():
            getattr(self, step)()
        return {violation.invariant for violation in self.verdicts.found}

    # -- the host --------------------------------------------------------------------------------------

    def _host_has(self, there: Translation | None) -> None:
        self.ghost.backs("mm", HVA_PAGE, HVA_PAGE + 1, there)

    def take(self) -> None:
        self._host_has(None)

    def give_b(self) -> None:
        self._host_has(Translation(B, RW))

    def give_back(self) -> None:
        self._host_has(Translation(A, RW))

    def protect(self) -> None:
        self._host_has(Translation(A, READ))

    def free(self) -> None:
        self.ghost.frames_given_up(A, 1)

    def take_from_another(self) -> None:
        self.ghost.frames_taken(A, 1, "another")

    def load(self) -> None:
        self.ghost.accesses.touched("kvmd", "mm", HVA_PAGE, A, write=False)

    def store(self) -> None:
        self.ghost.accesses.touched("kvmd", "mm", HVA_PAGE, A, write=True)

    # -- KVM -------------------------------------------------------------------------------------------

    def _put(self, entry: int) -> None:
        self.ghost.entry_stored(TABLE + 8 * PAGE, entry)

    def remember_mmio(self) -> None:
        self.ghost.entry_stored(TABLE, MMIO)

    def mmio_with_rights(self) -> None:
        self.ghost.entry_stored(TABLE, MMIO | WRITE)

    def map(self) -> None:
        self._put(A << 12 | RWX)

    def map_b(self) -> None:
        self._put(B << 12 | RWX)

    def map_read_only(self) -> None:
        self._put(A << 12 | READ | EXEC)

    def set_dirty(self) -> None:
        self._put(A << 12 | RWX | DIRTY)

    def clear_dirty(self) -> None:
        self.map()

    def zap(self) -> None:
        self._put(0)

    def flushed(self) -> None:
        self.ghost.flushed(ROOT, 0, 512, self.ghost.issues())

    def other_flushed(self) -> None:
        self.ghost.flushed(ROOT, PAGE + 1, 512, self.ghost.issues())

    def acked(self) -> None:
        self.ghost.acked(ROOT, 0, 512, self.ghost.issues())

    def older_acked(self) -> None:
        self.ghost.acked(ROOT, 0, 512, 0)

    def let_go(self) -> None:
        self.ghost.lets_go("kvm", "mm", HVA_PAGE, HVA_PAGE + 1)

    def told(self) -> None:
        self.ghost.told_changed("kvm", "mm", HVA_PAGE, HVA_PAGE + 1)

    def delete_slot(self) -> None:
        self.ghost.hides("vm", PAGE, PAGE + 2)

    def show_file(self) -> None:
        """Of which nothing is known."""
        self.ghost.shows("vm", PAGE, PAGE + 2, Shown(None, 0, RW))

    def pin(self) -> None:
        self.ghost.pinned("vm", PAGE, A)

    def nobody_asks(self) -> None:
        self.ghost.pin_leaves("vm", PAGE, A)

    def unpin(self) -> None:
        self.ghost.unpinned("vm", PAGE, A)

    # -- tables ----------------------------------------------------------------------------------------

    def point(self) -> None:
        self.ghost.pointer_cached(PSC, ROOT, 0, 512, TABLE)

    def forget_pointer(self) -> None:
        self.ghost.keeps_pointers(PSC, [])

    def collapse(self) -> None:
        """A huge leaf in place of the table; what it maps is not looked at here."""
        self.ghost.shows("vm", 0, 512, Shown(None, 0, RW))
        self.ghost.entry_stored(ROOT, HUGE << 12 | RWX | LARGE)

    def reuse(self) -> None:
        self.ghost.table_given_up(TABLE)

    def walk(self) -> None:
        self.ghost.table_read("unit", TABLE)

    def reuse_of_iommufdd(self) -> None:
        self.ghost.table_taken(OTHER, "iommufdd")
        self.ghost.pointer_cached(PSC, ROOT, 0, 512, OTHER)
        self.ghost.table_given_up(OTHER)

    def link(self) -> None:
        self.ghost.entry_stored(ROOT + 8, SPARE | RWX)

    def fill(self) -> None:
        self.ghost.table_filled(SPARE, [0] * 512)

    def fill_snooped(self) -> None:
        self.ghost.table_filled(SPARE, [0] * 511 + [B << 12 | RWX | SNOOP])

    def fill_mmio_with_rights(self) -> None:
        self.ghost.table_filled(SPARE, [0] * 511 + [MMIO | WRITE])

    def link_again(self) -> None:
        self.ghost.entry_stored(ROOT + 8, TABLE | RWX)

    def lend(self) -> None:
        self.ghost.root_lent(ROOT)

    def take_back(self) -> None:
        self.ghost.root_taken_back(ROOT)

    def obsolete(self) -> None:
        self.ghost.root_obsolete(ROOT)

    def drop_root(self) -> None:
        self.ghost.root_gone(ROOT)

    # -- caches ----------------------------------------------------------------------------------------

    def _cache(self, holder: tuple[str, ...], frame: int = A, rights: int = RW) -> None:
        self.ghost.cached(holder, ROOT, PAGE, PAGE + 1, Translation(frame, rights))

    def cache(self) -> None:
        self._cache(DEVTLB)

    def cache_reader(self) -> None:
        self._cache(DEVTLB, rights=READ)

    def cache_iotlb(self) -> None:
        self._cache(IOTLB)

    def cache_cpu(self) -> None:
        self._cache(VCPU, rights=RW | DIRTY)

    def cache_torn(self) -> None:
        self._cache(DEVTLB, frame=0x777)

    def drop(self) -> None:
        self.ghost.keeps(DEVTLB, [])

    def drop_iotlb(self) -> None:
        self.ghost.keeps(IOTLB, [])

    def drop_cpu(self) -> None:
        self.ghost.keeps(VCPU, [])

    def use(self) -> None:
        self.ghost.accesses.used("dsa0", "vm", PAGE, A, write=True)


LEGAL = (
    "remember_mmio",
    "cache zap use drop flushed take free",
    "cache zap use drop take free",  # used to the end
    "cache zap use older_acked drop acked take",  # kept until an invalidation that was issued after its end
    "cache zap other_flushed use",
    "set_dirty cache_cpu map_read_only drop_cpu flushed protect",
    "set_dirty cache_cpu clear_dirty drop_cpu flushed use",
    "point collapse forget_pointer acked reuse",
    "pin take use zap drop unpin free",
    "pin unpin use",
    "lend pin set_dirty nobody_asks zap unpin",
    "lend pin unpin pin unpin zap",
    "lend zap take_back map pin zap",
    "lend take_back obsolete",
    "zap let_go take free give_b told map_b",
    "zap let_go take give_back told map",
    "cache zap drop flushed delete_slot",
    "show_file cache zap drop flushed delete_slot",
    "cache_reader map_read_only flushed acked protect",  # what it has is as it was
    "link",
    "fill link",
    "cache cache_iotlb zap drop_iotlb drop acked",
    "cache obsolete drop flushed drop_root zap",
    "zap protect map_read_only load",
    "load store",
)

BROKEN = (
    ("I5", "zap take map"),  # judged at its store, and then the host may give the same frame again
    ("I5", "zap let_go map"),
    ("I5", "zap give_b map"),
    ("I11", "take"),
    ("I6", "cache zap take"),
    ("I6", "cache zap free"),
    ("I6", "free"),
    ("I6", "zap take free free"),
    ("I6", "take_from_another"),
    ("I6", "zap take free use"),
    ("I6", "zap give_b use"),
    ("R21", "zap delete_slot use"),
    ("R21", "cache zap delete_slot"),
    ("R21", "cache pin zap delete_slot"),
    ("R21", "pin delete_slot"),
    ("R21", "show_file cache zap delete_slot"),
    ("R21", "show_file delete_slot"),
    ("I21", "zap protect use"),
    ("I21", "zap protect map"),
    ("I21", "protect"),
    ("R17", "cache zap flushed"),
    ("R17", "set_dirty cache_cpu zap flushed"),
    ("R17", "set_dirty cache_cpu clear_dirty flushed"),
    ("R17", "cache obsolete flushed"),
    ("I9", "cache zap acked"),
    ("I9", "cache_iotlb cache zap drop cache drop_iotlb acked"),  # refetched from the IOTLB
    ("I9", "zap cache acked"),  # walked before, filled after
    ("R6", "point collapse acked"),
    ("R6", "point collapse point acked"),  # filled again from itself, by a walk through it
    ("I7", "point collapse reuse"),
    ("I7", "reuse"),
    ("I7", "collapse reuse walk"),
    ("I7", "collapse reuse reuse"),
    ("R23", "reuse_of_iommufdd"),
    ("I4", "link fill"),
    ("I3", "mmio_with_rights"),
    ("I2", "fill_snooped link"),
    ("I3", "fill_mmio_with_rights link"),
    ("I18", "link_again"),
    ("R14", "cache_torn"),
    ("I6", "pin take cache zap unpin"),
    ("I11", "pin take unpin"),
    ("I22", "pin zap take free"),
    ("I22", "pin unpin unpin"),
    ("I22", "lend pin zap"),
    ("I22", "lend pin set_dirty clear_dirty"),
    ("I22", "lend pin map_read_only"),
    ("I22", "lend pin nobody_asks unpin pin zap"),
    ("I10", "lend obsolete"),
    ("I6", "zap take load"),
    ("I6", "zap take free load"),
    ("I21", "zap protect store"),
)


@pytest.mark.parametrize("steps", LEGAL)
def test_a_legal_history_is_let_pass(steps: str) -> None:
    assert Story().play(steps) == set()


@pytest.mark.parametrize(("invariant", "steps"), BROKEN)
def test_a_history_is_wrong_at_the_step_that_breaks_it_and_not_before(invariant: str, steps: str) -> None:
    *before, last = steps.split()
    story = Story()
    assert story.play(" ".join(before)) == set()
    assert invariant in story.play(last)


def test_what_comes_after_hides_nothing() -> None:
    """The same frame comes back, and the entry is true again."""
    assert "I5" in Story().play("zap take map give_back use")


def test_a_violation_is_told_when_it_is_found_and_once() -> None:
    heard: list[Violation] = []
    verdicts = Verdicts(heard.append)
    verdicts.say("I1", "a sentence")
    verdicts.say("I1", "a sentence")
    assert [str(violation) for violation in heard] == ["I1: a sentence"]
