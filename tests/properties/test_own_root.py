"""The same random life of a VM twice, with a shared root and with one of the IOMMU's own.

A device writes memory where the root it walks lets it, and asks for what is missing.  At every step both
tables hold what they must, and both processes see the same bytes; KVM_GET_DIRTY_LOG names every page that CPU
or device wrote since it was last asked.  With a root of its own a device faults on small pages only where a
dict says so: nothing is taken from it but by the host, or with its slot.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from kvmd.core.faults.page_fault import RESOLVED
from kvmd.core.host import CpuFeatures
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.reclaim import age, merge, migrate, numa_hint, swap_out
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START
from protocol.units import GfnSpan, Gpa, Hva
from tests.kit.kvmd import READ, WRITE
from tests.kit.refusals import may_refuse
from tests.oracle.table import Machine, RawTables, second_stage_walk
from tests.planted.plugin import Plants
from tests.unit.kvmd.own_root import BASE, PAGE, Managed

UNIT = Machine(address_width=46, max_leaf_level=3, snoop_control=True)
FEATURES = (CpuFeatures(), CpuFeatures(pml=False), CpuFeatures(ept_ad_bits=False, pml=False))
HOST: tuple[Callable[..., Any], ...] = (age, merge, migrate, numa_hint, swap_out)
OTHER_GFN = 0x9000
SEEDS = 6


class Life:
    """One VM, and what is known of it without looking at its tables."""

    def __init__(self, *, own: bool, level: int, features: CpuFeatures) -> None:
        self.own, self.level = own, level
        self.pages = 64 if level == 1 else 512
        self.hot = [*range(8), *range(self.pages - 8, self.pages)]
        self.guest = Managed(own=own, level=level, pages=self.pages, features=features)
        self.mm = self.guest.mm
        self.account = self.guest.vm.pinning.open()
        self.pins: list[int] = []  # names of requests
        self.has: dict[int, bool] = {}  # page -> may the device write it
        self.io_faults = 0
        self.written: set[int] = set()  # since the log was read
        self.logging = False
        self.tracked: set[int] = set()
        self.there = True  # is slot 0

    def hva(self, page: int) -> Hva:
        return Hva(self.guest.hva + page * PAGE)

    # -- accesses --------------------------------------------------------------------------------------

    def cpu(self, page: int, data: bytes | None) -> None:
        gpa = BASE + page << 12
        ran = self.guest.do(self.guest.vcpu.run([("w", gpa, data) if data else ("r", gpa, 1)]))
        if ran.done and self.there:
            emulated = data is not None and page in self.tracked
            if not emulated:
                self._granted(page, write=data is not None)
            if data:
                self.written.add(page)

    def dma(self, page: int, data: bytes | None) -> None:
        """The unit walks; what is missing is asked for once.  A tracked page, which only one of them lets a
        device write, is read."""
        data = None if page in self.tracked else data
        need = 2 if data else 1
        hpa = self._walk(page, need)
        if hpa is None:
            asked = self.guest.fault(page, WRITE if data else READ)
            missing = page not in self.has or (data is not None and not self.has[page])
            assert missing or not self.own or self.level > 1, (
                f"page {page:#x} was taken from the device: {asked}"
            )
            self.io_faults += 1
            hpa = self._walk(page, need)
            assert (hpa is not None) == (asked in RESOLVED), f"page {page:#x}: {asked}"
            if hpa is None:
                return
            self._granted(page, write=data is not None)
        if data:
            at = hpa - HIGH_RAM_START
            self.guest.bare.frames[at : at + len(data)] = data
            self.written.add(page)

    def _walk(self, page: int, need: int) -> int | None:
        root = self.guest.exported.root
        tables = RawTables(LOW_RAM_START, self.guest.bare.tables)
        found = second_stage_walk(tables, UNIT, root.hpa, root.role.level, BASE + page << 12)
        return found.hpa if found.kind == "mapped" and found.rights & need else None

    def _granted(self, page: int, *, write: bool) -> None:
        """Both have the page now; after a read with what right the host has."""
        host = self.mm.present_page(self.hva(page))
        may = write or (host is not None and host.writable)
        self.has[page] = self.has.get(page, False) or may

    # -- what happens to it ----------------------------------------------------------------------------

    def host(self, act: Callable[..., Any], first: int, pages: int) -> None:
        first, pages = self._whole(first, pages)
        self.guest.do(act(self.mm, self.hva(first), pages * PAGE))
        if act is not age:
            self._taken(first, pages)

    def drop(self, first: int, pages: int) -> None:
        first, pages = self._whole(first, pages)
        self.guest.do(dontneed(self.mm, self.hva(first), pages * PAGE))
        self._taken(first, pages)

    def _whole(self, first: int, pages: int) -> tuple[int, int]:
        """The host does it to whole pages of its own size."""
        return (first, pages) if self.level == 1 else (0, self.pages)

    def _taken(self, first: int, pages: int) -> None:
        """Perhaps: a look at the table tells."""
        for page in range(first, first + pages):
            if self._walk(page, 1) is None:
                self.has.pop(page, None)

    def process(self, page: int, data: bytes) -> None:
        """A store of the process's own is no business of the log; where it breaks sharing, the host tells."""
        self.guest.do(self.mm.write(self.hva(page), data))
        self._taken(page, 1)

    def log(self, on: bool) -> None:
        if self.there and on != self.logging:
            self.guest.log(int(on))
            self.logging = on
            self.written = set()

    def get(self) -> None:
        if self.there and self.logging:
            told = self.guest.dirty()
            assert self.written <= told, f"pages {self.written - told} were written and are not told"
            self.written = set()

    def other_slot(self) -> None:
        guest = self.guest
        there = guest.vm.slots.find(OTHER_GFN) is not None  # type: ignore[arg-type]
        guest.change_slot(3, OTHER_GFN, 0 if there else 4, guest.hva)

    def own_slot(self) -> None:
        self.guest.change_slot(0, BASE, 0 if self.there else self.pages, self.guest.hva)
        self.there = not self.there
        self.logging, self.tracked = False, set()
        if not self.there:
            self.has.clear()

    def track(self, page: int) -> None:
        with may_refuse(errno.EINVAL, errno.EBUSY):  # no slot; pinned
            if page in self.tracked:
                self.guest.do(self.guest.vm.write_track.remove(Gpa(BASE + page << 12)))
                self.tracked.discard(page)
            else:
                self.guest.do(self.guest.vm.write_track.add(Gpa(BASE + page << 12)))
                self.tracked.add(page)

    def pin(self, page: int, on: bool) -> None:
        pinning, span = self.guest.vm.pinning, GfnSpan.of_pages(BASE + page, 1)  # type: ignore[arg-type]
        with may_refuse(errno.EINVAL, errno.EBUSY):  # no slot; tracked
            if on:
                self.pins.append(self.guest.do(pinning.pin(self.account, span)))
                self.has[page] = True
            else:
                self.guest.do(pinning.unpin(self.account, self.pins.pop(0) if self.pins else 0))
        self._taken(page, 1)

    def nx(self, on: bool) -> None:
        self.guest.do(self.guest.vm.nx_huge.switch(on=on))

    # -- one step --------------------------------------------------------------------------------------

    def step(self, random: Random) -> None:
        page, data = random.choice(self.hot), random.choice((None, random.randbytes(8)))
        first, pages, on = random.choice(self.hot[:8]), random.randint(1, 4), random.random() < 0.6
        act = random.choice(HOST)
        steps: tuple[tuple[float, Callable[[], None]], ...] = (
            (8, lambda: self.dma(page, data)),
            (8, lambda: self.cpu(page, data)),
            (3, lambda: self.host(act, first, pages)),
            (2, lambda: self.drop(first, pages)),
            (2, lambda: self.process(page, b"of the process")),
            (1, lambda: self.log(on)),
            (3, self.get),
            (1, self.other_slot),
            (0.5, self.own_slot),
            (1, lambda: self.track(page)),
            (1, lambda: self.pin(page, on)),
            (0.3, lambda: self.nx(on)),
        )
        random.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()

    def contents(self) -> list[bytes]:
        return [self.guest.do(self.mm.read(self.hva(page), 16)) for page in self.hot]


def live(seed: int, steps: int = 120) -> tuple[Life, Life]:
    """Both lives, step by step; the pages they touch, and what they ask, are the same."""
    features, level = FEATURES[seed % 3], 1 + seed % 2
    lives = [Life(own=own, level=level, features=features) for own in (True, False)]
    dice = [Random(seed), Random(seed)]
    for number in range(steps):
        for life, random in zip(lives, dice, strict=True):
            life.step(random)
            assert life.guest.sound(), (life.own, number)
        if number % 10 == 9:
            own, shared = (life.contents() for life in lives)
            assert own == shared, f"step {number}: the two guests left different memory"
            for life in lives:
                life._taken(0, life.pages)  # reading may have mapped the zero page
    return lives[0], lives[1]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_two_lives_end_with_the_same_memory_and_every_write_was_told(seed: int) -> None:
    own, shared = live(seed)
    assert own.io_faults <= shared.io_faults
    assert own.guest.heard <= shared.guest.heard


# -- planted bugs --------------------------------------------------------------------------------------------


CAUGHT = {
    "other-root-not-filled": "was taken from the device",
    "R19-unnoticed-not-dirty": "I20",
    "I23-logging-protects-every-root": "I23",
    "I23-ageing-takes-every-root": "I23",
    "R21-all-slots-lose-their-leaves": "was taken from the device",
}  # by which complaint


def live_all() -> None:
    for seed in range(SEEDS):
        live(seed)


@pytest.mark.parametrize("bug", CAUGHT)
def test_a_planted_bug_is_caught_by_some_life(bug: str, plant: Plants) -> None:
    plant(bug)
    with pytest.raises(AssertionError, match=CAUGHT[bug]):
        live_all()
