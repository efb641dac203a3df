"""The full fences between driver and unit: each is needed, and enough, on processors that buffer stores.

A model of x86-TSO [SDM 9.2]: each side's stores wait in its buffer, in order, seen by itself only, until a
fence or a system call; loads look into the own buffer, then into memory.  One side does what it does at an
event; behind each of its accesses in turn the other does its part, all at once.  Buffers drain at the end, so
whatever was stored is there: is anything left that nobody was told of?
Planted: a side without its fence.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from device_sim.core.dmar import RemappingUnit
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from iommufdd.core import qi
from protocol.flow import Flows, Wait
from protocol.hw.prq import PageRequest
from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import WIDE, Reg, Register
from protocol.units import Hpa, Iova
from tests.kit import linked_unit
from tests.kit.linked_unit import LinkedUnit

RID = 0x6A08
SIDES = ("driver", "unit")
REQUEST_OF_PAGE_7 = struct.pack("<4Q", RID << 16 | 1, 7 << 12 | 1 << 3 | 1 << 2 | 1, 0, 0)  # [VT-d 7.4.1]


class Processors:
    """Two of them; `running` is the one whose code this is."""

    def __init__(self, without: str | None) -> None:
        self.running = "driver"
        self.without = without  # the side that has no fence
        self.accesses = 0
        self.interrupt: tuple[int, Callable[[], None]] | None = None  # behind that access, do that
        self._buffers: dict[str, list[tuple[object, int, Callable[[], object]]]] = {
            side: [] for side in SIDES
        }

    def store(self, word: object, value: int, commit: Callable[[], object]) -> None:
        self._buffers[self.running].append((word, value, commit))
        self._accessed()

    def load(self, word: object, memory: Callable[[], int]) -> int:
        own = [value for stored, value, _ in self._buffers[self.running] if stored == word]
        value = own[-1] if own else memory()
        self._accessed()
        return value

    def _accessed(self) -> None:
        self.accesses += 1
        if self.interrupt is not None and self.interrupt[0] == self.accesses:
            (_, other), self.interrupt = self.interrupt, None
            other()

    def fence(self) -> None:
        if self.running != self.without:
            self.drain(self.running)

    def drain(self, *sides: str) -> None:
        for side in sides:
            buffer, self._buffers[side] = self._buffers[side], []
            for _, _, commit in buffer:
                commit()

    def drain_one(self, side: str) -> bool:
        """The oldest store.  False: there is none."""
        if not self._buffers[side]:
            return False
        self._buffers[side].pop(0)[2]()
        return True

    @contextmanager
    def on(self, side: str) -> Iterator[None]:
        before, self.running = self.running, side
        yield
        self.running = before


def buffered(processors: Processors) -> type[RegisterPage]:
    """Registers as these processors store and load them."""

    class BufferedPage(RegisterPage):
        __slots__ = ()

        def load(self, register: Register) -> int:
            if register in WIDE:
                return self.load64(register)
            return processors.load((id(self), int(register)), lambda: RegisterPage.load(self, register))

        def store(self, register: Register, value: int) -> None:
            if register in WIDE:
                self.store64(register, value)
            else:
                at = id(self), int(register)
                processors.store(at, value, lambda: RegisterPage.store(self, register, value))

        def load64(self, offset: int) -> int:
            return processors.load((id(self), offset), lambda: RegisterPage.load64(self, offset))

        def store64(self, offset: int, value: int) -> None:
            at = id(self), offset
            processors.store(at, value, lambda: RegisterPage.store64(self, offset, value))

    return BufferedPage


class BufferedMemory(PhysicalMemory):
    """What the unit stores in queue windows."""

    def __init__(self, processors: Processors) -> None:
        super().__init__()
        self._processors = processors

    def store32(self, hpa: Hpa, value: int) -> bool:
        commit = super().store32
        self._processors.store(hpa, value, lambda: commit(hpa, value))
        return True

    def store64s(self, hpa: Hpa, words: Sequence[int]) -> bool:
        commit = super().store64s
        self._processors.store(hpa, 0, lambda: commit(hpa, words))
        return True


class Buffered(LinkedUnit):
    """Who signals has drained its buffer when the other hears of it: that is a system call."""

    def __init__(self, processors: Processors) -> None:
        self.processors = processors
        memory = BufferedMemory(processors)
        unit = RemappingUnit(*capabilities(), 46, memory, fence=processors.fence)
        super().__init__(Flows(), unit, memory, fence=processors.fence)
        with processors.on("driver"):
            self.driver.tables.add_function(RID, ats=True, pasid=True, pri=True)

    def arrive(self) -> None:
        to = "unit" if "kick" in list(self.due)[:1] else "driver"
        self.processors.drain("driver" if to == "unit" else "unit")
        with self.processors.on(to):
            super().arrive()

    def finish(self) -> None:
        self.processors.drain(*SIDES)
        self.settle()
        self.flows.run_ready()


Case = tuple[Callable[[], None], Callable[[], None], Callable[[], bool]]


def page_requests(linked: Buffered) -> Case:
    """The driver takes one when another comes."""

    def ask(page: int) -> None:
        with linked.processors.on("unit"):
            linked.unit.prq.submit(
                PageRequest(rid=RID, prgi=page, addr=Iova(page << 12), last=True, read=True)
            )

    def take() -> None:
        with linked.processors.on("driver"):
            linked.driver.on_page_request()

    ask(1)
    linked.processors.drain("unit")
    del linked.due["page_request"]  # it is what `take` is called for
    return take, lambda: ask(2), lambda: sum(len(entries) for entries, _ in linked.page_requests) == 64


def completions(linked: Buffered) -> Case:
    """The driver hears that one wait is done when another is."""
    waits: list[Wait[None]] = []

    def submit() -> None:
        with linked.processors.on("driver"):
            waits.append(linked.flows.start(linked.driver.submit([qi.wait()])))
            linked.flows.run_ready()
        linked.processors.drain("driver")
        del linked.due["kick"]

    def execute() -> None:
        with linked.processors.on("unit"):
            linked.unit.kick()

    def hear() -> None:
        with linked.processors.on("driver"):
            linked.driver.on_completion()

    submit()
    execute()
    linked.processors.drain("unit")
    del linked.due["completion"]
    submit()
    return hear, execute, lambda: [wait.done for wait in waits] == [True, True]


def lost(
    case: Callable[[Buffered], Case], first: str, without: str | None, patch: pytest.MonkeyPatch
) -> list[int]:
    """Behind which accesses of the side that is `first` the other's part makes something be missed."""
    missed: list[int] = []
    at = 0
    while True:
        at += 1
        processors = Processors(without)
        patch.setattr(linked_unit, "RegisterPage", buffered(processors))
        linked = Buffered(processors)
        of_driver, of_unit, told = case(linked)
        outer, inner = (of_driver, of_unit) if first == "driver" else (of_unit, of_driver)
        processors.interrupt = processors.accesses + at, inner
        outer()
        behind_the_last = processors.interrupt is not None
        if behind_the_last:
            processors.interrupt = None
            inner()
        linked.finish()
        if not told():
            missed.append(at)
        if behind_the_last:
            assert at > 5, "it makes a few accesses"
            return missed


CASES = [page_requests, completions]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", SIDES)
def test_with_both_fences_nothing_is_missed(
    case: Callable[[Buffered], Case], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lost(case, first, None, monkeypatch) == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("without", SIDES)
def test_a_side_without_its_fence_misses_something(
    case: Callable[[Buffered], Case], without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted."""
    assert lost(case, without, without, monkeypatch) != []


@pytest.mark.parametrize("planted", [False, True])
def test_stores_in_order_need_no_fence_between_entry_and_tail(
    planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver looks behind each store of the unit as it drains.  Planted: the tail before its entry."""
    processors = Processors(without="unit")
    monkeypatch.setattr(linked_unit, "RegisterPage", buffered(processors))
    linked = Buffered(processors)
    with processors.on("unit"):
        if planted:
            linked.unit.registers.show(Reg.PQT, 32)
        linked.unit.prq.submit(PageRequest(rid=RID, prgi=1, addr=Iova(7 << 12), last=True, read=True))
    while processors.drain_one("unit"):
        with processors.on("driver"):
            linked.driver.on_page_request()
    taken = b"".join(entries for entries, _ in linked.page_requests)
    assert (taken == REQUEST_OF_PAGE_7) == (not planted)


@pytest.mark.parametrize("port", ["device_sim.service", "iommufdd.unit_port"])
def test_both_daemons_have_the_fence(port: str) -> None:
    """What the cores are given is the one that locks."""
    module = __import__(port, fromlist=["full_fence"])
    assert module.full_fence.__module__ == "protocol.rpc.fence"
