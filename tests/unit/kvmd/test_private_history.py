"""Private memory under any schedule: slots bound and deleted, holes, conversions, stores, late acks.

What an importer may have cached and has not acked must not be given up (I6); what a guest stored into a page
stays until somebody takes the page; and check_vm holds after every step, in the middle of changes too.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from kvmd.core.invariants import check_vm
from kvmd.core.mm.check import check_memory
from kvmd.core.slots import guest_memfd
from kvmd.core.slots.guest_memfd import GuestMemfd
from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.slots.private_memory import PrivateMemory
from kvmd.core.vm import Kvm, VmType
from protocol.flow import RwLock
from protocol.units import Gfn, Gpa
from tests.kit.kvmd import WRITE, World
from tests.kit.refusals import may_refuse

SEEDS = 12
FILE_PAGES = 8
SLOT_PAGES = 2
BASES = (0x400, 0x410, 0x420)  # of slots 0, 1 and 2
GFNS = [base + page for base in BASES for page in range(SLOT_PAGES)]
PRIVATE = 8


class PrivateHistory:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.world = World()
        self.world.mm.notifiers.clear()
        self.vm = self.world.vm = Kvm(self.world.host, self.world.mm, kind=VmType.SW_PROTECTED)
        self.memfd = self.vm.private.create(FILE_PAGES << 12, 0)
        self.hva = self.world.map(SLOT_PAGES)
        self.vcpu = self.world.create_vcpu()
        self.exported, self.importer = self.world.lend(), self.world.importer
        self.cached: dict[int, tuple[int, int]] = {}  # gfn -> (frame, its tag), until acked
        self.running = 0
        self.stores = 0
        self.begin(self.vm.private.set_attributes(Gpa(0), BASES[-1] + SLOT_PAGES << 12, PRIVATE, 0))

    def begin(self, flow: Coroutine[Any, None, Any]) -> None:
        async def run() -> None:
            self.running += 1
            with may_refuse(errno.EINVAL):  # bound already; no such slot
                await flow
            self.running -= 1

        self.world.start(run())

    def step(self) -> None:
        acts = [self.bind, self.bind, self.delete, self.hole, self.convert, self.store, *[self.fault] * 6]
        self.random.choice(acts)()
        self.look()
        if self.random.random() < 0.3:
            self.ack()
            self.look()

    def bind(self) -> None:
        slot = self.random.randrange(len(BASES))
        region = replace(
            self.world.region(slot, BASES[slot], SLOT_PAGES, self.hva, 4),
            version=2,
            guest_memfd=lambda: self.memfd,
            guest_memfd_offset=self.random.randrange(0, FILE_PAGES, SLOT_PAGES) << 12,
        )
        self.begin(self.vm.slots_change.set_memory_region(region))

    def delete(self) -> None:
        slot = self.random.randrange(len(BASES))
        self.begin(self.vm.slots_change.set_memory_region(self.world.region(slot, 0, 0, 0)))

    def hole(self) -> None:
        first = self.random.randrange(FILE_PAGES)
        pages = self.random.randrange(1, FILE_PAGES + 1)
        self.begin(self.vm.private.punch_hole(self.memfd, first << 12, pages << 12))

    def convert(self) -> None:
        start, value = self.random.choice(BASES), self.random.choice((0, PRIVATE, PRIVATE, PRIVATE))
        self.begin(self.vm.private.set_attributes(Gpa(start << 12), SLOT_PAGES << 12, value, 0))

    def store(self) -> None:
        if not self.stores:
            self.begin(self._store())

    async def _store(self) -> None:
        self.stores += 1
        await self.vcpu.run([("w", self.random.choice(GFNS) << 12, b"secret")])
        self.stores -= 1

    def fault(self) -> None:
        gfn = Gfn(self.random.choice(GFNS))
        self.begin(self.exported.fault(self.vm.fault_path, 77, gfn, WRITE))

    def ack(self) -> None:
        pending = self.importer.pending
        if pending:
            told = pending[self.random.randrange(len(pending))]
            gone = range(told.start >> 12, told.start + told.size >> 12)
            self.cached = {gfn: held for gfn, held in self.cached.items() if gfn not in gone}
            self.world.ack(self.importer, pending.index(told))

    def look(self) -> None:
        tags = self.world.bare.tags
        assert check_vm(self.vm) == []
        for gfn, (pfn, tag) in self.cached.items():
            assert tags.read(pfn) == tag, f"I6: gfn {gfn:#x}: pfn {pfn:#x} was given up and not acked"
        if not self.importer.pending:  # what is told and not acked must go: fill only when all is
            for gfn, (pfn, _) in self.world.table(self.exported.root.hpa).items():
                self.cached.setdefault(gfn, (pfn, tags.read(pfn)))

    def end(self) -> None:
        while self.importer.pending:
            self.ack()
            self.look()
        assert self.running == 0
        self.begin(self.vm.private.close(self.memfd))
        while self.importer.pending:
            self.ack()
        assert check_vm(self.vm) + check_memory(self.world.host.memory, self.world.host.processes) == []
        assert [index for index, _ in self.memfd.pages()] == []


def play(seed: int) -> None:
    history = PrivateHistory(seed)
    for _ in range(150):
        history.step()
    history.end()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_schedule_gives_private_memory_to_the_wrong_owner(seed: int) -> None:
    play(seed)


def play_all() -> None:
    for seed in range(SEEDS):
        play(seed)


class NoLock(RwLock):
    async def acquire(self, *, write: bool) -> None:
        pass

    def release(self) -> None:
        pass


async def _drop_at_once(private: PrivateMemory, memfd: GuestMemfd, pages: range) -> None:
    memfd.drop(pages)
    async with memfd.invalidate_lock, private._host_changes.zapped_gfns(memfd.spans_of(pages)):
        pass


@asynccontextmanager
async def _no_wait(changes: HostChanges, spans: Any, told: Any = None) -> Any:
    await changes._tdp.zapper.zap(spans, told=told)
    yield


BUGS: dict[str, tuple[Any, str, Any]] = {
    "bound during a hole": (guest_memfd, "RwLock", NoLock),
    "given up before the acks": (PrivateMemory, "_drop", _drop_at_once),
    "faults do not wait for a conversion": (HostChanges, "zapped_gfns", _no_wait),
}


@pytest.mark.parametrize("bug", list(BUGS))
def test_the_histories_find_a_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises(AssertionError, match=r"I6|I11"):
        play_all()
