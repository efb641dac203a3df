"""Pins under any schedule: what a device may have cached of a pinned gfn stays right, whatever else runs.

An importer acks late and in any order.  From the moment a pin is answered to the moment its unpin, or the
removal of its slot, is asked for, the gfn's entry must be the same in everything but A, and its frame nobody
else's; what was cached and not yet acked must not be given up either (I6).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest

from kvmd.core.export.pinning import Pinning, Request
from kvmd.core.invariants import check_vm
from kvmd.core.mm.madvise import collapse, dontneed
from kvmd.core.mm.page import Page
from kvmd.core.mm.reclaim import age, merge, migrate, numa_hint, swap_out
from kvmd.core.mm.thp import split
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.slots.memslot import Memslot
from protocol.frame_tags import is_free
from protocol.pt import bits
from protocol.units import Gfn, GfnSpan, Gpa, Hva
from tests.kit.refusals import may_refuse
from tests.unit.kvmd.pinned import BASE, PAGE, PAGES, PinnedRam

HOST: list[Callable[..., Coroutine[Any, None, Any]]] = [
    age,
    merge,
    migrate,
    numa_hint,
    swap_out,
    collapse,
    split,
]
SEEDS = 9
HOT = 12  # gfns all of it is about: at both ends of the slot
GFNS = [*range(BASE, BASE + HOT // 2), *range(BASE + PAGES - HOT // 2, BASE + PAGES)]


class PinHistory:
    def __init__(self, seed: int, *, own: bool) -> None:
        self.random = Random(seed)
        self.level = 1 + seed % 2
        self.sleepy = seed % 4 == 0  # what is absent is waited for, while others do what they like
        self.guest = PinnedRam(level=self.level, own=own)
        self.vm, self.mm = self.guest.vm, self.guest.mm
        self.pinned: dict[int, int] = {}  # gfn -> entry, while it must not change
        self.names: dict[int, int] = {}  # requests that were answered: name -> gfn
        self.cached: dict[int, tuple[int, int]] = {}  # gfn -> (frame, its tag), until acked
        self.running = 0
        self.tracked: list[int] = []
        self.asleep = Userfaultfd(self.mm, user_mode_only=False)  # lookups sleep until `give`
        if self.sleepy:
            self.guest.run(self.asleep.register(self.guest.hva, PAGES * PAGE, missing=True, wp=False))

    def begin(self, flow: Coroutine[Any, None, Any], done: Callable[[Any], None] = lambda _: None) -> None:
        async def run() -> None:
            self.running += 1
            with may_refuse(errno.EINVAL, errno.EAGAIN, errno.EBUSY):  # no slot, not huge; pinned; tracked
                done(await flow)
            self.running -= 1

        self.guest.start(run())

    def step(self) -> None:
        acts = [self.pin, self.pin, self.unpin, *[self.host] * 2, self.drop, self.store, self.log, self.slot]
        if self.sleepy:
            acts += [self.pin, self.track, self.track, *[self.give] * 3]
        self.random.choice(acts)()
        for _ in range(self.random.randrange(3)):
            self.ack()
        self.look()

    def pin(self) -> None:
        gfn = self.random.choice(GFNS)
        span = GfnSpan.of_pages(Gfn(gfn), 1)

        def answered(name: int) -> None:
            self.names[name] = gfn
            if gfn in self.vm.pinning.pinned:  # its slot may have gone before the answer
                self.pinned[gfn] = self.guest.entry_of(gfn) & ~bits.ACCESSED

        self.begin(self.vm.pinning.pin(self.guest.account, span), answered)

    def unpin(self) -> None:
        if self.names:
            name = self.random.choice(list(self.names))
            gfn = self.names.pop(name)
            pin = self.vm.pinning.pinned.get(Gfn(gfn))
            if pin is not None and pin.count == 1:
                self.pinned.pop(gfn, None)
            self.begin(self.vm.pinning.unpin(self.guest.account, name))

    def host(self) -> None:
        self.begin(self.random.choice(HOST)(self.mm, self.guest.hva, PAGES * PAGE))

    def drop(self) -> None:
        pages = PAGES if self.level > 1 else 1
        hva = self.guest.hva if pages > 1 else self.guest.hva_of(self.random.choice(GFNS))
        self.begin(dontneed(self.mm, hva, pages * PAGE))

    def store(self) -> None:
        if not self.running:
            self.begin(self.guest.vcpu.run([("w", self.random.choice(GFNS) << 12, b"x")]))

    def track(self) -> None:
        """Or no longer."""
        if self.tracked and self.random.random() < 0.5:
            gfn = self.tracked.pop()
            self.begin(self.vm.write_track.remove(Gpa(gfn << 12)))
        else:
            gfn = self.random.choice(GFNS)
            self.begin(self.vm.write_track.add(Gpa(gfn << 12)), lambda _: self.tracked.append(gfn))

    def give(self) -> None:
        """Somebody's page comes."""
        asked = self.guest.start(self.asleep.next_event())
        if asked.done:
            self.begin(self.asleep.copy(asked.result().address, b"y" * PAGE, wp=False))

    def log(self) -> None:
        region = self.guest.region(0, BASE, PAGES, self.guest.hva, self.random.randrange(2))
        if self.vm.slots.find(Gfn(BASE)) is not None:
            self.begin(self.vm.slots_change.set_memory_region(region))
        else:
            self.begin(self.vm.dirty_log.get(0, Hva(0x7000)))

    def slot(self) -> None:
        if self.random.random() < 0.3:
            self.pinned.clear()
            self.begin(self.vm.slots_change.set_memory_region(self.guest.region(0, BASE, 0, 0)))
        self.begin(self.vm.slots_change.set_memory_region(self.guest.region(0, BASE, PAGES, self.guest.hva)))

    def ack(self) -> None:
        pending = self.guest.importer.pending
        if pending:
            told = pending[self.random.randrange(len(pending))]
            gone = range(told.start >> 12, told.start + told.size >> 12)
            self.cached = {gfn: held for gfn, held in self.cached.items() if gfn not in gone}
            self.guest.ack(self.guest.importer, pending.index(told))

    def look(self) -> None:
        tags = self.guest.bare.tags
        for gfn, entry in self.pinned.items():
            assert self.guest.entry_of(gfn) & ~bits.ACCESSED == entry, f"pinned gfn {gfn:#x} changed"
        for gfn, (pfn, tag) in self.cached.items():
            assert tags.read(pfn) == tag, f"I6: gfn {gfn:#x}: pfn {pfn:#x} was given up and not acked"
        assert check_vm(self.vm) == []
        if not self.guest.importer.pending:  # what is told and not acked must go: fill only when all is
            for gfn, (pfn, _) in self.guest.table(self.guest.exported.root.hpa).items():
                if gfn in GFNS:
                    assert not is_free(tags.read(pfn))
                    self.cached.setdefault(gfn, (pfn, tags.read(pfn)))

    def end(self) -> None:
        self.guest.do(self.asleep.close())
        while self.guest.importer.pending:
            self.ack()
        self.guest.do(self.vm.pinning.close_all())
        assert (self.running, self.mm.pinned_pages, len(self.vm.pinning.pinned)) == (0, 0, 0)
        assert self.guest.sound()


def play(seed: int, *, own: bool = False) -> None:
    history = PinHistory(seed, own=own)
    for _ in range(80):
        history.step()
    history.end()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_pinned_entry_never_changes_under_any_schedule_of_host_vmm_and_guest(seed: int, own: bool) -> None:
    play(seed, own=own)


def play_all() -> None:
    for seed in range(SEEDS):
        play(seed)


def _put_at_once(pinning: Pinning, slot: Memslot) -> list[Page]:
    pinning.put(_forget(pinning, slot))
    return []


def _only_unpinned(pinning: Pinning, request: Request, slot: Memslot, gfn: Gfn) -> bool:
    return gfn not in pinning.pinned


_forget = Pinning.forget
BUGS = {
    "an unpinned page the host gave up stays mapped": (Pinning, "_is_backed", lambda pinning, gfn, pin: True),
    "a slot's pages are put before the acks": (Pinning, "forget", _put_at_once),
    "what was asked before a sleep is not asked after it": (Pinning, "_stands", _only_unpinned),
}
CAUGHT = {
    "an unpinned page the host gave up stays mapped": "I11",
    "a slot's pages are put before the acks": "I6",
    "what was asked before a sleep is not asked after it": r"I19|I20|I22",
}


@pytest.mark.parametrize("bug", list(BUGS))
def test_the_histories_find_a_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises(AssertionError, match=CAUGHT[bug]):
        play_all()
