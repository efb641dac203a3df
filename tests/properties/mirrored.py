"""A process's memory under any schedule, and two MMUs that mirror it as lazily as they may.

Each goes on using what it was answered until it acks the invalidation that covers it, and acks come late and
in any order; lookups sleep, and ready flows run in any order.  At every step, of each page in use: its frame
was not given up (I6), and unless an invalidation of it is told and not acked, the process has that very
frame there, with no fewer rights (I5).  What is pinned keeps its frame whatever happens to the mapping.

The simulator's stories do not replace it: nobody in them hangs up while its pin sleeps
(pin-outlives-its-mirror), or faults behind a change that is not settled (R1-mirror-unsettled-behind-a-fault).
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

from kvmd.core.mm.check import check_memory
from kvmd.core.mm.fork import fork
from kvmd.core.mm.hmm import FoundPages, Mirror
from kvmd.core.mm.madvise import ADVICE, collapse, dontneed
from kvmd.core.mm.page import MappedPage, Pte
from kvmd.core.mm.reclaim import merge, migrate, numa_hint, swap_out
from kvmd.core.mm.thp import split
from kvmd.core.mm.vma import Prot
from protocol.errors import UapiError
from protocol.flow import Wait, done
from protocol.units import Hva, pages_of_level
from tests.kit.importer import HandLease, SlowImporter, Told
from tests.kit.kvmd import RW, World
from tests.kit.refusals import may_refuse
from tests.properties.machine import AnyOrder

PAGE = 4096
START, PAGES = Hva(1 << 40), 1024  # two regions of 2 MiB
SMALL = [*range(6), 510, 511, 512, 513]
WATCHES = [(0, 4), (4, 8), (12, 500), (512, 512)]  # as ranges are watched: they touch
SPANS = [(0, 1), (1, 2), (3, 3), (0, 12), (508, 8), (0, 512), (512, 512), (0, PAGES)]
READ = Prot.READ
HOST = {
    "migrate": migrate,
    "swap_out": swap_out,
    "merge": merge,
    "numa_hint": numa_hint,
    "collapse": collapse,
    "split": split,
}


@dataclass(frozen=True, slots=True)
class InUse:
    pfn: int
    tag: int
    writable: bool


class MirrorUser:
    """One user of the memory: what it was answered and may still use."""

    def __init__(self, rig: MirroredMemory) -> None:
        self.rig = rig
        self.ops = SlowImporter()
        self.mirror = Mirror(rig.mm)
        self.watched: set[tuple[int, int]] = set()
        self.used: dict[int, InUse] = {}  # by page
        self.pinned: Counter[tuple[int, int, InUse]] = Counter()  # (area, page, frame)

    async def come(self) -> None:
        """While anything is changing; from then on it is told."""
        await self.mirror.register(self.ops, HandLease())
        self.rig.mmus.append(self)

    def go(self) -> None:
        """Nobody walks for it any more: what it was told and has not acked, it has forgotten."""
        self.rig.mmus.remove(self)
        self.ops.invalidate = lambda *_: done(None)  # type: ignore[method-assign]
        while self.ops.pending:
            self.ops.ack()
        self.rig.begin(self.mirror.close(), "close")

    def watch(self) -> None:
        first, pages = at = self.rig.random.choice(WATCHES)
        if at in self.watched:
            for page in range(first, first + pages):
                self.used.pop(page, None)
            self.mirror.unwatch(hva(first), pages * PAGE)
            self.watched.remove(at)
        else:
            self.mirror.watch(hva(first), pages * PAGE)
            self.watched.add(at)

    def ask(self) -> None:
        if not self.watched:
            return
        random = self.rig.random
        first, pages = random.choice(sorted(self.watched))
        page = first + random.choice([0, 1, 2, pages - 1])
        count = random.choice([1, 1, 2, 3, first + pages - page])
        count = min(count, first + pages - page)
        fault, write = random.random() < 0.7, random.random() < 0.6

        async def run() -> None:
            found = await self.mirror.range_fault(hva(page), count * PAGE, write=write, fault=fault)
            self._answered(page, found)

        self.rig.begin(run(), "fault" if fault else "look")

    def _answered(self, asked: int, found: FoundPages) -> None:
        """In the turn of the answer: it was sent after all that is told."""
        end = page_of(found.end)
        for page in found.pages:
            for number in range(max(asked, page_of(page.hva)), min(end, page_of(page.hva) + size_of(page))):
                assert not self._told(number), f"I5: page {number:#x} is answered while it changes"
                self.used[number] = self._in_use(page, number)

    def _in_use(self, page: MappedPage, number: int) -> InUse:
        pfn = page.pfn + number - page_of(page.hva)
        return InUse(pfn, self.rig.world.bare.tags.read(pfn), page.writable)

    def _told(self, page: int) -> bool:
        return any(told.start <= hva(page) < told.start + told.size for told in self.ops.pending)

    def pin(self) -> None:
        random = self.rig.random
        page, count, area = random.choice(SMALL), random.choice([1, 1, 3]), random.randrange(2)

        async def run() -> None:
            write = random.random() < 0.7
            found = await self.mirror.pin(hva(page), count * PAGE, write=write, area=area)
            for got in found.pages:
                at = max(page, page_of(got.hva))
                self.pinned[area, at, self._in_use(got, at)] += 1

        self.rig.begin(run(), "pin")

    def unpin(self) -> None:
        """Of one area; while no pin of it is on its way, so that it is known which go."""
        if self.rig.running["pin"]:
            return
        area = self.rig.random.randrange(2)
        self.pinned = Counter({key: n for key, n in self.pinned.items() if key[0] != area})

        async def run() -> None:
            while await self.mirror.unpin(START, PAGES * PAGE, area=area):
                pass

        self.rig.begin(run(), "unpin")

    def ack(self) -> None:
        if self.ops.pending:
            index = self.rig.random.randrange(len(self.ops.pending))
            told: Told = self.ops.pending[index]
            for page in [page for page in self.used if told.start <= hva(page) < told.start + told.size]:
                del self.used[page]
            self.ops.ack(index)

    def check(self) -> None:
        tags = self.rig.world.bare.tags
        for page, held in self.used.items():
            assert tags.read(held.pfn) == held.tag, f"I6: page {page:#x} is in use and was given up"
            there = self.rig.mm.present_page(hva(page))
            if not self._told(page):
                assert there is not None, f"I5: page {page:#x} is in use and gone"
                now = self._in_use(there, page).pfn
                assert now == held.pfn, f"I5: page {page:#x} is in use and elsewhere"
                assert there.writable or not held.writable, f"I5: page {page:#x} may not be written any more"
        for (_, page, held), _ in self.pinned.items():
            assert tags.read(held.pfn) == held.tag, f"I6: page {page:#x} is pinned and was given up"


class MirroredMemory:
    """`coming`: mirrors register and close while anything changes, and sleep before they pin."""

    def __init__(self, seed: int, *, coming: bool = False) -> None:
        self.random = Random(seed)
        self.coming = coming
        self.world = World()
        self.world.flows = AnyOrder(self.random)
        self.mm = self.world.mm
        self.running: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.broken: list[AssertionError] = []
        self.gates: list[Wait[None]] = []
        self.mmus: list[MirrorUser] = []
        self._sleep_in_lookups()
        self.world.run(self.mm.mmap(START, PAGES * PAGE, RW))
        self.world.run(ADVICE["hugepage"](self.mm, hva(512), 512 * PAGE))
        self.world.run(ADVICE["mergeable"](self.mm, START, 512 * PAGE))
        for _ in range(2):
            self.world.run(MirrorUser(self).come())

    def _sleep_in_lookups(self) -> None:
        looked_up, to_pin = self.mm.get_user_page, self.mm.fault_to_pin

        async def sleepy(hva: Hva, **how: Any) -> MappedPage:
            page = await looked_up(hva, **how)
            await self._doze()
            return page

        async def sleepy_to_pin(hva: Hva, **how: Any) -> Pte:
            """What it returns is there then: it sleeps before."""
            if self.coming:
                await self._doze()
            return await to_pin(hva, **how)

        self.mm.get_user_page = sleepy  # type: ignore[method-assign]
        self.mm.fault_to_pin = sleepy_to_pin  # type: ignore[method-assign]

    async def _doze(self) -> None:
        if self.mmus and self.random.random() < 0.1:
            gate: Wait[None] = Wait()
            self.gates.append(gate)
            await gate

    def begin(self, flow: Coroutine[Any, None, Any], name: str) -> None:
        async def run() -> None:
            self.running[name] += 1
            try:
                await flow
                self.done[name] += 1
            except UapiError:
                pass
            except AssertionError as error:
                self.broken.append(error)
            self.running[name] -= 1

        self.world.start(run())

    def step(self) -> None:
        mmu = self.random.choice(self.mmus)
        acts: list[tuple[float, Callable[[], None]]] = [
            (2, mmu.watch),
            (10, mmu.ask),
            (1, mmu.pin),
            (0.5, mmu.unpin),
            (8, self.host),
            (8, self.process),
            (1, self.child),
            (1, self.remap),
            *([(2.0, self.come_or_go)] if self.coming else []),
        ]
        self.random.choices([act for _, act in acts], [weight for weight, _ in acts])[0]()
        for _ in range(self.random.randrange(4)):
            self.random.choice(self.mmus).ack()
            self.world.flows.run_ready()
        if self.gates and self.random.random() < 0.5:
            self.gates.pop(self.random.randrange(len(self.gates))).set(None)
            self.world.flows.run_ready()
        self.check()

    def come_or_go(self) -> None:
        if len(self.mmus) > 1 and self.random.random() < 0.5:
            self.random.choice(self.mmus).go()
        elif len(self.mmus) < 4:
            self.begin(MirrorUser(self).come(), "register")

    def host(self) -> None:
        name, act = self.random.choice(list(HOST.items()))
        first, pages = (512, 512) if act is collapse else self.random.choice(SPANS)
        self.begin(act(self.mm, hva(first), pages * PAGE), name)

    def process(self) -> None:
        first, pages = self.random.choice(SPANS)
        page, prot = hva(self.random.choice(SMALL)), self.random.choice([RW, RW, READ])
        acts: list[Callable[[], tuple[Coroutine[Any, None, Any], str]]] = [
            lambda: (self.mm.write(page, b"x"), "write"),
            lambda: (self.mm.write(page, b"y"), "write"),
            lambda: (self.mm.read(page, 1), "read"),
            lambda: (dontneed(self.mm, hva(first), pages * PAGE), "dontneed"),
            lambda: (ADVICE["free"](self.mm, hva(first), pages * PAGE), "free"),
            lambda: (self.mm.mprotect(hva(first), pages * PAGE, prot), "mprotect"),
        ]
        self.begin(*self.random.choice(acts)())

    def remap(self) -> None:
        first, pages = self.random.choice(SPANS)

        async def run() -> None:
            await self.mm.mmap(hva(first), pages * PAGE, RW, fixed=True)

        self.begin(run(), "mmap")

    def child(self) -> None:
        async def run() -> None:
            child = self.world.host.create_mm()
            await fork(self.mm, child)
            with may_refuse(errno.EFAULT):
                await child.write(hva(self.random.choice(SMALL)), b"child")
            await child.exit()
            self.world.host.forget_mm(child)

        self.begin(run(), "fork")

    def check(self) -> None:
        for mmu in self.mmus:
            mmu.check()
        for error in self.broken:
            raise error
        if not self.running["fork"]:  # half made, it shows parts of one page that are not alike
            found = check_memory(self.world.host.memory, self.world.host.processes)
            assert found == [], "\n".join(found)

    def settle(self) -> None:
        while any(mmu.ops.pending for mmu in self.mmus) or self.gates or self.world.flows.has_ready:
            for mmu in self.mmus:
                mmu.ack()
            while self.gates:
                self.gates.pop().set(None)
            self.world.flows.run_ready()
            self.check()

    def end(self) -> None:
        self.settle()
        assert not +self.running, f"{self.running} never ended"
        for mmu in self.mmus:
            mmu.used.clear()
            mmu.pinned.clear()
            self.world.run(mmu.mirror.close())
        self.begin(self.mm.exit(), "exit")
        left = self.mm.pinned_pages, self.world.host.frames.in_use
        assert left == (0, 0), f"pinned, frames: {left}"


def hva(page: int) -> Hva:
    return Hva(START + page * PAGE)


def page_of(at: Hva) -> int:
    return (at - START) // PAGE


def size_of(page: MappedPage) -> int:
    return pages_of_level(page.level)


def play(seed: int, steps: int = 250, *, coming: bool = False) -> Counter[str]:
    """What was done."""
    rig = MirroredMemory(seed, coming=coming)
    for _ in range(steps):
        rig.step()
    rig.end()
    return rig.done
