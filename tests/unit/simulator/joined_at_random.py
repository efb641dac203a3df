"""Joined worlds driven by a seed: a device and two vCPUs beside everything that takes pages from them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from iommufdd.core.hmm import CallerMm, UserFd
from kvmd.core.mm.frames import Reuse
from protocol.units import Gfn, GfnSpan, Hva, Iova
from tests.kit.joined import Joined, JoinedMirror, JoinedSilicon
from tests.kit.kvmd import BITMAP, MM_CHANGES
from tests.kit.refusals import may_refuse
from tests.properties.machine import AnyOrder
from tests.properties.sleepy import SleepyMm

PAGES = 4
SMALL, HUGE = 0x100, 0x200  # gfns of the two slots
GFNS = (*range(SMALL, SMALL + PAGES), HUGE, HUGE + 1, HUGE + 511)


class ByChance(JoinedSilicon):
    """A slot of small pages, one that huge pages back, or the same unaligned; each step is a draw."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        flows = AnyOrder(self.random)
        super().__init__(self.random.choice, flows, reuse=Reuse.LATE, seq_start=2**64 - 3)
        self.lookups = SleepyMm(self.mm, self.random, lambda page: None)
        self.vm.frames.mm = self.lookups  # type: ignore[assignment]
        self.map(1, hva=BITMAP)
        self.small = self.map(PAGES)
        self.huge = self.map(2, level=2)
        while len(self.vm.vcpus) < 2:
            self.create_vcpu(len(self.vm.vcpus))
        self.busy = [False, False]
        self.pins: list[int] = []
        self.set_slot(0, SMALL, PAGES, self.small)
        self.set_slot(1, HUGE, 512, self.huge)

    def toss(self) -> bool:
        return self.random.random() < 0.5

    @property
    def doings(self) -> list[tuple[Callable[[], Any], float]]:
        """What may happen, and how often."""
        return [
            *((self.step, 30), (self.device, 9), (self.guest, 7), (self.change, 5), (self.wake, 5)),
            *((self.copy, 2), (self.doze, 1), (self.ask_no_more, 0.3)),
        ]

    def begin(self, flow: Coroutine[Any, None, Any]) -> None:
        self.flows.spawn(flow)
        self.flows.run_ready()

    # -- what may happen -----------------------------------------------------------------------------------

    def change(self) -> None:
        what = self.random.choice(("madvise_dontneed", "migrate"))
        large = self.random.random() < 0.2
        hva = self.huge if large else Hva(self.small + 4096 * self.random.randrange(PAGES))

        async def run() -> None:
            with may_refuse(errno.ENOMEM):
                await MM_CHANGES[what](self.mm, hva, 512 * 4096 if large else 4096)

        self.begin(run())

    def guest(self) -> None:
        index, gfn = self.random.randrange(2), self.random.choice(GFNS)
        if self.busy[index]:
            return
        access = (
            ("r", gfn << 12, 8) if self.random.random() < 0.4 else ("w", gfn << 12, self.random.randbytes(8))
        )

        async def run() -> None:
            self.busy[index] = True
            await self.vm.vcpus[index].run([access])
            self.busy[index] = False

        self.begin(run())

    def device(self) -> None:
        data = None if self.random.random() < 0.4 else self.random.randbytes(8)
        self.begin(self.dma(self.random.choice(GFNS), data))

    def copy(self) -> None:
        self.begin(self.dma_copy(self.random.choice(GFNS), self.random.choice(GFNS)))

    def ask_no_more(self) -> None:
        """Page requests go off and on again, while none is out."""
        if not self.function.pri.outstanding:
            self.function.configure(pri_allocation=0)
            self.function.configure(pri_allocation=64)

    def doze(self) -> None:
        self.lookups.drowsy = self.random.choice((0.0, 0.3))

    def wake(self) -> None:
        self.lookups.wake(self.random.randrange(8))
        self.flows.run_ready()

    def play(self, steps: int) -> None:
        doings = self.doings
        for _ in range(steps):
            self.random.choices([do for do, _ in doings], [weight for _, weight in doings])[0]()
        self.finish()

    def finish(self) -> None:
        """Everybody wakes, everything arrives."""
        self.lookups.drowsy = 0
        self.settle_all()
        while self.lookups.sleepers:
            self.wake()
            self.settle_all()


class JoinedAtRandom(ByChance, Joined):
    """The shared table; slots come and go, and are logged."""

    @property
    def doings(self) -> list[tuple[Callable[[], Any], float]]:
        own = ((self.log, 1), (self.get_log, 2), (self.realign, 0.5), (self.pin, 1), (self.unpin, 1))
        return [*super().doings, *own]

    def realign(self) -> None:
        """The large slot comes back with its frames aligned to its gfns, or not: huge leaf or small ones."""
        offset = self.random.randrange(2) * 4096

        async def run() -> None:
            with may_refuse(errno.EINVAL, errno.EAGAIN, errno.EEXIST):
                await self.vm.slots_change.set_memory_region(self.region(1, HUGE, 0, 0))
            with may_refuse(errno.EEXIST, errno.EINVAL):
                await self.vm.slots_change.set_memory_region(self.region(1, HUGE, 512, self.huge + offset))

        self.begin(run())

    def log(self) -> None:
        """Logging of a slot goes on or off: huge leaves are split, and made again."""
        slot, flags = self.random.randrange(2), self.random.randrange(2)

        async def run() -> None:
            now = self.vm.slots.numbered(slot)
            if now is not None:
                region = self.region(slot, now.base_gfn, now.npages, now.hva, flags)
                with may_refuse(errno.EINVAL):  # it went, and came back elsewhere
                    await self.vm.slots_change.set_memory_region(region)

        self.begin(run())

    def get_log(self) -> None:
        slot = self.random.randrange(2)

        async def run() -> None:
            with may_refuse(errno.ENOENT):
                await self.vm.dirty_log.get(slot, BITMAP)

        self.begin(run())

    def pin(self) -> None:
        gfn = Gfn(self.random.choice(GFNS[:PAGES]))

        async def run() -> None:
            with may_refuse(errno.EINVAL, errno.EAGAIN, errno.EFAULT, errno.ENODEV):
                self.pins.append(await self.vm.pinning.pin(self.account, GfnSpan.of_pages(gfn, 1)))

        self.begin(run())

    def unpin(self) -> None:
        if self.pins:
            self.begin(self.vm.pinning.unpin(self.account, self.pins.pop()))


class MirrorAtRandom(ByChance, JoinedMirror):
    """The mirror shows both slots where the guest has them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.begin_shown()

    def begin_shown(self) -> None:
        for gfn, pages, hva in ((SMALL, PAGES, self.small), (HUGE, 512, self.huge)):
            shown = self.show(gfn, pages, hva)
            self.settle_all()
            shown.result()

    @property
    def doings(self) -> list[tuple[Callable[[], Any], float]]:
        return [*super().doings, (self.pin, 1), (self.unpin, 1), (self.show_again, 0.3)]

    def pin(self) -> None:
        iova = Iova(self.random.choice(GFNS) << 12)

        async def run() -> None:
            with may_refuse(errno.EINVAL, errno.EAGAIN, errno.EFAULT):
                self.pins.append(await self.hwpt.pin(iova, 4096))

        self.begin(run())

    def unpin(self) -> None:
        if self.pins:
            self.begin(self.hwpt.unpin(self.pins.pop()))

    def show_again(self) -> None:
        """The small pages' area goes and comes back."""

        async def run() -> None:
            with may_refuse(errno.ENOENT):
                await self.ioas.unmap(Iova(SMALL << 12), PAGES * 4096)
            with may_refuse(errno.EEXIST):
                caller = CallerMm(self.mm.cookie or 0, UserFd(0))
                await self.ioas.map(caller, self.small, PAGES * 4096, Iova(SMALL << 12), writable=True)

        self.begin(run())
