"""Whatever the host does under DMA, every table that a unit walks is legal at any moment, in all designs.

Writers are stopped in the middle of what they do, and all tables are judged twice from the bytes: by
`protocol/pt/check.py` and by a walker that shares no line with the product.  They must agree on every leaf.
"""

from __future__ import annotations

import errno
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import pytest
import trio

from protocol.errors import UapiError
from protocol.hw.dsa import Status
from protocol.pt.check import check_second_stage, check_table, frozen_or_mmio
from protocol.pt.cursor import walk_range
from protocol.pt.ept import EPT_AD
from protocol.pt.geometry import gfn_limit
from protocol.pt.mem import TableReader
from protocol.pt.second_stage import SECOND_STAGE
from protocol.pt.walk import Outcome, WalkRules, ept_rules, second_stage_rules, walk
from protocol.uapi.names import KVM_MEM_LOG_DIRTY_PAGES
from protocol.units import GIB, LEVEL_1G, MIB, PAGE_SIZE, Gfn, GfnSpan, Gpa, Hpa, Level
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.vmm.daemons import DaemonSpec
from qemu_shim.vmm.designs import DESIGNS, SHARED, RamSlot
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.machine import Machine, MachineConfig, connect_host, machine
from tests.integration.snapshot import Root, Snapshot, snapshot, stopped
from tests.kit.daemons import System, short_directory
from tests.oracle import table as oracle
from tests.oracle.dump import Dump
from tests.oracle.table import RawTables
from tests.patience import PATIENCE_S

HUGE = 2 * MIB
SLOTS = {PAGE_SIZE: 4 * GIB, HUGE: 6 * GIB, GIB: 8 * GIB}  # a page's size -> where such memory is
USED = HUGE  # of each
WIDTH = {4: 46, 5: 52}
FIVE_LEVELS = Path(__file__).with_name("device_sim_of_five_levels.py")
REFUSED = (errno.EAGAIN, errno.EBUSY, errno.EOPNOTSUPP)
WALKED = 100  # leaves of a table that are walked to, at most
UNPLUG = "unplug"


class Wide(System):
    """CPUs and units of five levels."""

    def __init__(self, directory: Path) -> None:
        cpu = ["--ept-levels", "5", "--maxphyaddr", "52"]
        super().__init__(directory, {"kvmd": cpu, "device_sim": ["--levels", "5", "--haw", "52"]})

    def argv(self, spec: DaemonSpec) -> list[str]:
        usual = super().argv(spec)
        return [sys.executable, str(FIVE_LEVELS), *usual[1:]] if spec.name == "device_sim" else usual


@pytest.fixture(scope="module", params=[4, 5], ids=["4 levels", "5 levels"])
def levels(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(scope="module")
def running(levels: int) -> Iterator[System]:
    with short_directory() as directory:
        made = Wide(directory) if levels == 5 else System(directory)
        try:
            made.start()
            yield made
            made.check_stop()
        finally:
            made.stop()


# -- a table, judged twice -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """`by_check` and `by_oracle`: what each says is wrong; `leaves`: first gfn -> (level, entry)."""

    by_check: list[str]
    by_oracle: list[str]
    differences: list[str]
    leaves: dict[int, tuple[int, int]]


def judged(seen: Snapshot, root: Root, width: int) -> Judged:
    """KVM's tables by both walkers' rules, those of iommufdd's by the unit's."""
    raw = seen.memory_of(root.hpa)
    tables = TableReader(Hpa(raw.base), memoryview(raw.memory))
    hpa, levels = Hpa(root.hpa), Level(root.levels)
    unit = second_stage_rules(width, LEVEL_1G, snoop_control=False)
    pairs: list[tuple[WalkRules, oracle.Rows]] = [(unit, oracle.SECOND_STAGE)]
    if raw is seen.io:
        fmt, by_check = SECOND_STAGE, check_second_stage(tables, hpa, levels, LEVEL_1G)
    else:
        cpu = ept_rules(width, LEVEL_1G)
        pairs.append((cpu, oracle.EPT))
        fmt, by_check = EPT_AD, check_table(tables, EPT_AD, hpa, levels, (unit, cpu), frozen_or_mmio)
    by_oracle, differences, leaves = list[str](), list[str](), dict[int, tuple[int, int]]()
    for rules, rows in pairs:
        audit = oracle.audit(raw, rows, oracle.Machine(width), *root)
        by_oracle += audit.wrong
        leaves = audit.leaves
        if not by_check and not audit.wrong:
            span = GfnSpan(Gfn(0), gfn_limit(levels))
            ours = {
                met.gfn: (met.level, met.entry)
                for met in walk_range(tables, fmt, hpa, levels, span)
                if fmt.is_leaf(met.entry, met.level) and met.entry & rules.present
            }
            if ours != leaves:
                differences.append(f"root {hpa:#x}: {ours.items() ^ leaves.items()}")
            differences += walked_apart(tables, rules, raw, rows, root, width, list(leaves))
    return Judged(by_check, by_oracle, differences, leaves)


def walked_apart(
    tables: TableReader,
    rules: WalkRules,
    raw: RawTables,
    rows: oracle.Rows,
    root: Root,
    width: int,
    leaves: list[int],
) -> list[str]:
    """Where our walk and the oracle's, to leaves and beside them, end differently."""
    theirs = oracle.ept_walk if rows is oracle.EPT else oracle.second_stage_walk
    found = []
    for gfn in leaves[:: len(leaves) // WALKED + 1]:
        for address in (gfn << 12 | 0x123, (gfn + 1 << 12) + 7):
            one = walk(tables, rules, Hpa(root.hpa), Level(root.levels), address)
            other = theirs(raw, oracle.Machine(width), *root, address)
            ours = one.outcome.name.lower(), one.level, one.entry
            hpa = one.hpa(address) if one.outcome is Outcome.MAPPED else 0
            if (*ours, hpa, one.rights) != other:
                found.append(f"{address:#x} by {rules.name}: {one}, {other}")
    return found


# -- a machine under DMA whose host does not leave it alone --------------------------------------------


Change = Callable[[], Awaitable[None]]


@dataclass
class Tally:
    """What the dumps of a run showed, so that nothing is claimed that was not there."""

    dumps: int = 0
    differ: int = 0  # from the one before
    inside: list[str] = field(default_factory=list)  # the changes that one was in the middle of
    walked: Counter[int] = field(default_factory=Counter)  # leaves of the units' tables, by level
    others: Counter[int] = field(default_factory=Counter)  # of KVM's other roots


class Worked:
    """DMA and stores go on, the host makes one change after the other, and each is dumped."""

    def __init__(self, guest: Machine, queue: IdxdWorkQueue, slots: list[RamSlot]) -> None:
        self.guest = guest
        self.queue = queue
        self.slots = slots
        self.random = Random(1)
        self.filled = trio.Event()
        self.tally = Tally()

    @classmethod
    async def of(cls, guest: Machine) -> Worked:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        slots = [
            await guest.add_slot(number, gpa, max(page_size, USED), page_size)
            for number, (page_size, gpa) in enumerate(SLOTS.items(), 7)
        ]
        return cls(guest, queue, slots)

    async def fill(self) -> None:
        """The device stores to every page, a slot with each descriptor, over and over."""
        while True:
            for slot in self.slots:
                assert (await self.queue.fill(slot.gpa, 7, USED)).status is Status.SUCCESS
                self.filled.set()

    async def touch(self) -> None:
        """A vCPU stores to every page once, and then here and there beside the device."""
        pages = [slot.gpa + at for slot in self.slots for at in range(0, USED, PAGE_SIZE)]
        await self.guest.memory.touch(pages)
        while True:
            await self.guest.memory.touch(self.random.sample(pages, 64))

    def changes(self) -> Iterator[tuple[str, Change]]:
        small, huge, giant = self.slots
        yield "plug", self._plug
        for action in ("swap_out", "migrate", "collapse", "age", "split", "numa_hint", "collapse"):
            yield f"4K: {action}", partial(self._act, action, small)
        yield "4K: discard", partial(self.guest.discard, small.gpa + 5 * PAGE_SIZE, PAGE_SIZE)
        yield "4K: collapse", partial(self._act, "collapse", small)
        for action in ("migrate", "age"):
            yield f"2M: {action}", partial(self._act, action, huge)
        for size, slot in (("4K", small), ("2M", huge)):
            yield f"{size}: log", partial(self._log, slot, on=True)
        for size, slot in (("4K", small), ("2M", huge)):
            yield f"{size}: log no more", partial(self._log, slot, on=False)
        if self.guest.config.design is SHARED:  # 262144 pages, split for whoever else walks KVM's table
            yield "1G: log", partial(self._log, giant, on=True)
            yield "1G: log no more", partial(self._log, giant, on=False)
        yield "4K: split", partial(self._act, "split", small)
        yield UNPLUG, self._unplug

    async def _plug(self) -> None:
        """What changes a table in which the host may change nothing."""
        slot = await self.guest.add_slot(11, 16 * GIB, USED)
        for at in range(0, USED, 16 * PAGE_SIZE):
            assert (await self.queue.fill(slot.gpa + at, 7, PAGE_SIZE)).status is Status.SUCCESS

    async def _unplug(self) -> None:
        await self.guest.remove_slot(self.guest.slots[-1])

    async def _act(self, action: str, slot: RamSlot) -> None:
        await self.guest.process.host_action(action, slot.hva, USED)

    async def _log(self, slot: RamSlot, *, on: bool) -> None:
        """Stores to 4 KiB pages are to be seen: huge leaves are split, or split leaves put together."""
        flags = KVM_MEM_LOG_DIRTY_PAGES if on else 0
        await self.guest.vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, flags)

    async def make(self, change: Change, over: trio.Event) -> None:
        """What is pinned the host may refuse to move; it tries all the same."""
        try:
            await change()
        except UapiError as error:
            if not (self.guest.config.design.pins and error.errno in REFUSED):
                raise
        over.set()

    async def dump(self, running: System, over: trio.Event, name: str) -> Snapshot:
        with stopped(running, "kvmd", "iommufdd"):
            seen = snapshot(running)
            await trio.sleep(0.002)  # what was answered before has arrived by then
            if not over.is_set():
                self.tally.inside.append(name)
        self.tally.dumps += 1
        return seen

    def judge(self, seen: Snapshot, kvm_roots: list[Root], width: int, name: str) -> None:
        assert seen.walked, "the device is attached"
        for root in {*kvm_roots, *seen.walked}:
            found = judged(seen, root, width)
            assert (found.by_check, found.by_oracle, found.differences) == ([], [], []), name
            sizes = Counter(level for level, _ in found.leaves.values())
            (self.tally.walked if root in seen.walked else self.tally.others).update(sizes)

    async def play(self, running: System, width: int, directory: Path) -> None:
        """Every other change meets a unit that does not answer: its flush is under way at the dump."""
        before = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.fill)
            nursery.start_soon(self.touch)
            for number, (name, change) in enumerate(self.changes()):
                with trio.fail_after(PATIENCE_S):
                    await self.filled.wait()  # DMA between any two dumps
                    self.filled = trio.Event()
                roots, over = await kvm_roots(self.guest), trio.Event()
                held = ["device_sim"] if number % 2 or name == UNPLUG else []
                with stopped(running, *held):
                    nursery.start_soon(self.make, change, over)
                    await trio.sleep(self.random.random() * 0.004)
                    seen = await self.dump(running, over, name)
                # With a slot go the roots that nobody but CPUs has.
                self.judge(seen, [] if name == UNPLUG else roots, width, name)
                self.tally.differ += seen != before
                before = seen
                if number % 4 == 0:  # and one of kvmd's making, which knows what was mapped
                    await self.guest.dump(directory)
                    assert Dump(directory).mismatches() == []
                with trio.fail_after(PATIENCE_S):
                    await over.wait()
            nursery.cancel_scope.cancel()


async def kvm_roots(guest: Machine) -> list[Root]:
    described = await Inspector(guest.host.kvmd.channel).vm(guest.vm)
    return [Root(root["hpa"], root["levels"]) for root in described["roots"]]


def config_of(design: str, levels: int) -> MachineConfig:
    return MachineConfig(HUGE, maxphyaddr=WIDTH[levels], design=DESIGNS[design], free_from=Gpa(MIB))


@pytest.mark.parametrize("design", DESIGNS)
async def test_tables_are_legal_at_any_moment_of_dma_and_host_changes(
    running: System, levels: int, design: str, tmp_path: Path
) -> None:
    async with (
        connect_host(running.directory) as host,
        machine(host, config_of(design, levels)) as guest,
    ):
        worked = await Worked.of(guest)
        await worked.play(running, WIDTH[levels], tmp_path)
        (walked,) = set(snapshot(running).walked)
        assert await host.kvmd.violations() + await host.iommufdd.violations() == []
        assert (await host.device_sim.stats())["devices"]["dsa0"]["stale_accesses"] == 0
    tally = worked.tally
    print(f"{design}, {levels} levels: {tally}")
    assert walked.levels == levels
    assert set(tally.walked) == {1, 2, 3}, "a size of leaf was never there"
    assert set(tally.others) == (set() if design == "shared" else {1, 2, 3})
    assert tally.inside, "no dump was in the middle of a change"
    assert tally.differ > tally.dumps // 2


# -- tables that are not -------------------------------------------------------------------------------

NOWHERE = 1 << 45  # no table memory
Plant = Callable[
    [RawTables, list[tuple[int, int]]], None
]  # of the path to a leaf: (offset, entry), top first


def put(raw: RawTables, offset: int, entry: int) -> None:
    assert isinstance(raw.memory, bytearray)
    raw.memory[offset : offset + 8] = entry.to_bytes(8, "little")


PLANTS: dict[str, Plant] = {
    "bit 11 in a leaf": lambda raw, path: put(raw, path[3][0], path[3][1] | 1 << 11),
    "bit 11 in a table entry": lambda raw, path: put(raw, path[1][0], path[1][1] | 1 << 11),
    "bit 62": lambda raw, path: put(raw, path[3][0], path[3][1] | 1 << 62),
    "a leaf at the top": lambda raw, path: put(raw, path[0][0], path[0][1] | 1 << 7),
    "a misaligned 2 MiB leaf": lambda raw, path: put(raw, path[2][0], path[2][1] | 1 << 7 | 1 << 12),
    "a misaligned 1 GiB leaf": lambda raw, path: put(raw, path[1][0], path[1][1] | 1 << 7 | 1 << 12),
    "a table linked twice": lambda raw, path: put(raw, path[2][0] ^ 8, path[2][1]),
    "a table that is nowhere": lambda raw, path: put(raw, path[2][0], path[2][1] & ~0xF_FFFF_F000 | NOWHERE),
}


def path_to(raw: RawTables, root: Root, gpa: int) -> list[tuple[int, int]]:
    """(offset in memory, entry) of each level from the top on."""
    table, path = root.hpa, []
    for level in range(root.levels, 0, -1):
        at = table - raw.base + 8 * (gpa >> 12 + 9 * (level - 1) & 511)
        entry = int.from_bytes(raw.memory[at : at + 8], "little")
        path.append((at, entry))
        table = entry & 0x000F_FFFF_FFFF_F000
    return path


@pytest.mark.parametrize("design", ["shared", "mirror"])
async def test_an_illegal_entry_planted_in_a_dump_is_found_by_both(
    shared_system: System, design: str
) -> None:
    async with (
        connect_host(shared_system.directory) as host,
        machine(host, config_of(design, 4)) as guest,
    ):
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        gpa = guest.memory.allocate(1)
        assert (await queue.fill(gpa, 7, PAGE_SIZE)).status is Status.SUCCESS
        seen = snapshot(shared_system)
        (root,) = seen.walked
    raw = seen.memory_of(root.hpa)
    sound = judged(seen, root, WIDTH[4])
    assert (sound.by_check, sound.by_oracle, sound.differences) == ([], [], [])
    assert sound.leaves[gpa >> 12][0] == 1
    whole = bytes(raw.memory)
    for what, plant in PLANTS.items():
        plant(raw, path_to(raw, root, gpa))
        found = judged(seen, root, WIDTH[4])
        assert found.by_check, what
        assert found.by_oracle, what
        raw.memory[:] = whole  # type: ignore[index]


async def test_a_leaf_that_one_of_them_does_not_see_is_a_difference(
    shared_system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connect_host(shared_system.directory) as host, machine(host, config_of("shared", 4)) as guest:
        await guest.memory.touch([guest.memory.allocate(1)])
        seen = snapshot(shared_system)
    (root,) = seen.walked
    here, met, walked = sys.modules[__name__], walk_range, walk
    with monkeypatch.context() as planted:
        planted.setattr(here, "walk_range", lambda *args: list(met(*args))[:-1])
        assert len(judged(seen, root, WIDTH[4]).differences) == 2  # by each walker's rules
    with monkeypatch.context() as planted:
        planted.setattr(here, "walk", lambda *args: walked(*args)._replace(outcome=Outcome.ABSENT))
        assert judged(seen, root, WIDTH[4]).differences
