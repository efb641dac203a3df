"""The processes of one iommufd: connected to once, let go of with the last user, taken over all or none."""

from __future__ import annotations

import errno

import pytest

from iommufdd.core.hmm import CallerMm, Invalidate, UserFd
from iommufdd.core.source import Source, Sources
from protocol.errors import UapiError
from protocol.units import Hva
from tests.kit.host_memory import FakeHost
from tests.kit.iommufdd import Surroundings
from tests.unit.iommufdd.spaces import MEMORY, mm_of, outcome

FD = UserFd(9)


class Processes:
    """`hosts` by the name of the process."""

    def __init__(self) -> None:
        self.world = Surroundings()
        self.sources = Sources(self.connect)
        self.hosts: dict[int, FakeHost] = {}
        self.refuses = 0

    async def connect(self, mm: CallerMm, on_invalidate: Invalidate) -> Source:
        if self.refuses:
            raise UapiError(self.refuses, "no KVM")
        host = self.hosts[mm.cookie] = FakeHost()
        return Source(host, self.world, MEMORY)

    def get(self, mm: int, space: object) -> Source:
        return self.world.run(self.sources.get(mm_of(mm), unwatched, space))

    def map(self, mm: int, space: object, pages: object = "pages") -> Source:
        """Of a file."""
        source = self.get(mm, space)
        source.pages[pages] = False
        return source

    def unmap(self, source: Source, pages: object = "pages") -> None:
        self.world.run(self.sources.put(source, pages))

    def leave(self, space: object) -> None:
        self.world.run(self.sources.leave(space))

    def take_over(self, mm: int) -> int:
        return outcome(lambda: self.world.run(self.sources.change_process(CallerMm(mm, FD))))


async def unwatched(start: Hva, size: int) -> None: ...


def test_one_process_is_one_source_until_its_last_user_or_its_units_go() -> None:
    rig = Processes()
    first = rig.map(1, "a")
    assert rig.get(1, "b") is first
    assert rig.get(2, "a") is not first
    assert [rig.sources.of(space) for space in "ab"] == [list(rig.sources._mms), [first]]
    rig.leave("a")
    assert (rig.hosts[1].released, rig.hosts[2].released) == (False, True)
    rig.leave("b")
    assert not rig.hosts[1].released, "a copy of its pages is mapped"
    rig.world.log.clear()
    rig.unmap(first)
    assert (rig.hosts[1].released, rig.world.log) == (True, [("remove_memory", MEMORY)])
    second = rig.get(1, "a")
    assert second is not first
    rig.world.alive = False
    assert rig.get(1, "c") is not second


def test_who_maps_and_unmaps_is_connected_to_once() -> None:
    rig = Processes()
    first = rig.map(1, "a")
    rig.unmap(first)
    assert (rig.map(1, "a"), rig.hosts[1].released) == (first, False)


def test_a_process_without_pages_is_let_go_of_when_another_is_asked_for() -> None:
    """Or one more would be kept for each that maps and unmaps."""
    rig = Processes()
    kept = rig.map(1, "a")
    for mm in range(2, 6):
        rig.unmap(rig.map(mm, "a"))
    assert [rig.hosts[mm].released for mm in range(1, 6)] == [False, True, True, True, False]
    assert rig.sources.of("a")[0] is kept


def test_processes_without_pages_are_let_go_of_and_not_taken_over() -> None:
    """Or each that takes over in turn, and maps a page, would leave one more that is his."""
    rig = Processes()
    for mm in range(1, 5):
        rig.unmap(rig.map(mm, "a", mm), mm)
        assert rig.take_over(mm + 1) == 0
        assert (rig.hosts[mm].log, rig.hosts[mm].released, rig.sources.of("a")) == ([], True, [])


def test_who_takes_over_is_whose_the_source_is() -> None:
    rig = Processes()
    source = rig.map(1, "a")
    first = rig.hosts[1]
    assert rig.take_over(2) == 0
    assert first.log == [("change_process", FD)]
    assert rig.get(2, "b") is source
    assert rig.map(1, "b") is not source
    assert rig.take_over(2) == 0
    assert first.log == [("change_process", FD)], "it is his already"
    assert rig.hosts[1].log == [("change_process", FD)]


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_what_one_process_refuses_is_undone_with_the_others(fails: int) -> None:
    rig = Processes()
    sources = [rig.map(mm, "a") for mm in range(3)]
    rig.hosts[fails].errno = errno.ENOMEM
    assert rig.take_over(7) == errno.ENOMEM
    for mm, host in rig.hosts.items():
        asked, undone = [("change_process", FD)], [("undo_change_process",)]
        assert host.log == (asked + undone if mm < fails else asked if mm == fails else [])
    assert [rig.get(mm, "a") for mm in range(3)] == sources


def test_memory_of_a_process_itself_stays_its_own() -> None:
    rig = Processes()
    source = rig.get(1, "a")
    source.pages["pages"] = True
    assert rig.take_over(2) == errno.EINVAL
    source.pages["pages"] = False
    assert rig.take_over(2) == 0


def test_nobody_lets_go_of_a_source_that_is_being_taken_over() -> None:
    rig = Processes()
    source = rig.map(1, "a")
    rig.leave("a")
    rig.world.hold()
    rig.hosts[1].hop = lambda: rig.world._take("hop")
    taken = rig.world.start(rig.sources.change_process(CallerMm(2, FD)))
    put = rig.world.start(rig.sources.put(source, "pages"))
    assert (taken.done, put.done, rig.hosts[1].released) == (False, False, False)
    while not put.done:
        rig.world.let_go()
    taken.result()
    assert rig.hosts[1].released


def test_a_process_that_cannot_be_connected_to_leaves_nothing() -> None:
    rig = Processes()
    rig.refuses = errno.EOPNOTSUPP
    assert outcome(lambda: rig.get(1, "a")) == errno.EOPNOTSUPP
    rig.refuses = 0
    rig.get(1, "a")
    assert rig.take_over(2) == 0
