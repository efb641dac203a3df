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

    def get(self, mm: int, user: object) -> Source:
        return self.world.run(self.sources.get(mm_of(mm), unwatched, user))

    def take_over(self, mm: int) -> int:
        return outcome(lambda: self.world.run(self.sources.change_process(CallerMm(mm, FD))))


async def unwatched(start: Hva, size: int) -> None: ...


def test_one_process_is_one_source_until_its_last_user_or_its_units_go() -> None:
    rig = Processes()
    first = rig.get(1, "a")
    assert rig.get(1, "b") is first
    assert rig.get(2, "a") is not first
    rig.world.run(rig.sources.put(first, "a"))
    assert not rig.hosts[1].released
    rig.world.run(rig.sources.put(first, "b"))
    assert (rig.hosts[1].released, rig.world.log) == (True, [("remove_memory", MEMORY)])
    second = rig.get(1, "a")
    assert second is not first
    rig.world.alive = False
    assert rig.get(1, "c") is not second


def test_who_takes_over_is_whose_the_source_is() -> None:
    rig = Processes()
    source = rig.get(1, "a")
    first = rig.hosts[1]
    assert rig.take_over(2) == 0
    assert first.log == [("change_process", FD)]
    assert rig.get(2, "b") is source
    assert rig.get(1, "b") is not source
    assert rig.take_over(2) == 0
    assert first.log == [("change_process", FD)], "it is his already"
    assert rig.hosts[1].log == [("change_process", FD)]


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_what_one_process_refuses_is_undone_with_the_others(fails: int) -> None:
    rig = Processes()
    sources = [rig.get(mm, "a") for mm in range(3)]
    rig.hosts[fails].errno = errno.ENOMEM
    assert rig.take_over(7) == errno.ENOMEM
    for mm, host in rig.hosts.items():
        asked, undone = [("change_process", FD)], [("undo_change_process",)]
        assert host.log == (asked + undone if mm < fails else asked if mm == fails else [])
    assert [rig.get(mm, "a") for mm in range(3)] == sources


def test_memory_of_a_process_itself_stays_its_own() -> None:
    rig = Processes()
    source = rig.get(1, "a")
    source.users["pages"] = True
    assert rig.take_over(2) == errno.EINVAL
    source.users["pages"] = False
    assert rig.take_over(2) == 0


def test_nobody_lets_go_of_a_source_that_is_being_taken_over() -> None:
    rig = Processes()
    source = rig.get(1, "a")
    rig.world.hold()
    rig.hosts[1].hop = lambda: rig.world._take("hop")
    taken = rig.world.start(rig.sources.change_process(CallerMm(2, FD)))
    put = rig.world.start(rig.sources.put(source, "a"))
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
