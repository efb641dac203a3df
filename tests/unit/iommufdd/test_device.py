"""Attach and detach: the order of every step, and what is left when one of them fails."""

from __future__ import annotations

import errno
import struct

import pytest

from iommufdd.core.device import Device
from protocol.errors import UapiError
from protocol.hw.caps import Ecap
from tests.unit.iommufdd.world import DID, GONE, RID, ROOT, World

ECAP = Ecap(1 << 7 | 1 << 43 | 1 << 46 | 1 << 48)
ENTRY = struct.pack("<8Q", ROOT | 2 << 6 | 2 << 2 | 1, 3 << 23 | DID, 0, 0, 0, 0, 0, 0)
OFF = (False, 0, False)
ATTACH = [
    ("pasid_entry", RID, 0, True),
    ("function", RID, True, 0, False),
    ("function", RID, True, 2048, True),
]
FLUSH = struct.pack(
    "<16Q",
    *(7 | 1 << 4 | DID << 16, 0, 0, 0),
    *(2 | 2 << 4 | 3 << 6 | DID << 16, 0, 0, 0),
    *(3 | RID << 32, 0x7FFF_FFFF_FFFF_F001, 0, 0),
    *(5 | 1 << 5 | 1 << 6 | 2 << 32, 0, 0, 0),
)
DETACH = [
    ("function", RID, True, 0, False),
    ("pasid_entry", RID, 0, False),
    ("submit", FLUSH),
    ("function", *(RID, False, 0, False)),
]


class Bound:
    """A device, its HWPT, and the world they act on."""

    def __init__(self) -> None:
        self.world = World()
        self.hwpt = self.world.hwpt()
        self.hwpt.id = 5
        self.device = Device(RID, "dsa0", self.world, ECAP)

    def attach(self) -> None:
        self.world.run(self.device.attach(self.hwpt))

    def detach(self) -> None:
        self.world.run(self.device.detach())

    @property
    def free(self) -> bool:
        """Nothing on our side remembers the attachment."""
        return self.device.hwpt is None and (self.hwpt.users, self.hwpt.rids) == (0, [])


@pytest.fixture
def bound() -> Bound:
    return Bound()


def test_an_attach_writes_the_entry_then_ats_then_page_requests_and_dma(bound: Bound) -> None:
    bound.attach()
    assert bound.world.log == ATTACH
    assert bound.world.entries == {RID: ENTRY}
    assert bound.device.hwpt is bound.hwpt
    assert (bound.hwpt.users, bound.hwpt.rids) == (1, [RID])


def test_an_invalidation_reaches_the_function_from_before_its_entry_is_written(bound: Bound) -> None:
    bound.world.hold()
    bound.world.start(bound.device.attach(bound.hwpt))
    assert bound.hwpt.rids == [RID]
    bound.world.start(bound.hwpt.invalidate(0x5000, 0x1000, 1))
    _, raw = bound.world.log[-1]
    assert struct.unpack("<12Q", raw)[4] == 3 | RID << 32


def test_a_detach_stops_requests_clears_the_entry_flushes_and_turns_ats_off(bound: Bound) -> None:
    bound.attach()
    bound.world.log.clear()
    bound.detach()
    assert bound.world.log == DETACH
    assert bound.world.entries == {RID: bytes(64)}
    assert bound.world.functions == {RID: OFF}
    assert bound.free


def test_an_invalidation_reaches_the_function_until_it_was_flushed(bound: Bound) -> None:
    bound.attach()
    bound.world.hold()
    bound.world.start(bound.device.detach())
    for _ in range(3):
        assert bound.hwpt.rids == [RID]
        held, bound.world.held = bound.world.held, []
        assert held is not None
        for wait in held:
            wait.set(None)
        bound.world.flows.run_ready()
    assert bound.world.log[-2:] == DETACH[-2:]


def test_a_detach_waits_for_every_group_in_flight_with_the_entry_still_there(bound: Bound) -> None:
    bound.attach()
    for _ in range(2):
        bound.device.begin_group()
    bound.world.log.clear()
    detached = bound.world.start(bound.device.detach())
    assert bound.world.log == DETACH[:1], "page requests are off, the entry stays"
    bound.device.end_group()
    bound.world.flows.run_ready()
    assert len(bound.world.log) == 1
    bound.device.end_group()
    bound.world.flows.run_ready()
    assert bound.world.log == DETACH
    assert detached.done
    assert bound.free


def test_groups_that_ended_before_hold_up_nothing(bound: Bound) -> None:
    bound.attach()
    for _ in range(3):
        bound.device.begin_group()
        bound.device.end_group()
    bound.detach()
    assert bound.free


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("number", [errno.EINVAL, GONE])
def test_a_failed_attach_leaves_nothing(bound: Bound, calls: int, number: int) -> None:
    bound.world.fails.after(calls, number, lasting=number == GONE)
    failed = bound.world.start(bound.device.attach(bound.hwpt))
    with pytest.raises(UapiError, check=lambda error: error.errno == number):
        failed.result()
    assert bound.free
    if number != GONE:
        assert bound.world.entries.get(RID, bytes(64)) == bytes(64), "the unit could walk the root still"
        assert bound.world.functions.get(RID, OFF) == OFF
        if calls:
            assert ("submit", FLUSH) in bound.world.log
        bound.world.log.clear()
        bound.attach()
        assert bound.world.log == ATTACH


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_detach_from_a_unit_that_is_gone_succeeds(bound: Bound, calls: int) -> None:
    bound.attach()
    bound.world.fails.after(calls, GONE)
    bound.detach()
    assert bound.free


def test_an_attached_device_is_not_attached_again(bound: Bound) -> None:
    bound.attach()
    with pytest.raises(UapiError, match="HWPT 5", check=lambda error: error.errno == errno.EINVAL):
        bound.world.run(bound.device.attach(bound.world.hwpt()))
    assert bound.hwpt.users == 1
    assert bound.world.log == ATTACH


def test_a_device_being_attached_or_detached_is_busy(bound: Bound) -> None:
    bound.world.hold()
    bound.world.start(bound.device.attach(bound.hwpt))
    other = bound.world.hwpt()
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.EBUSY):
        bound.world.run(bound.device.attach(other))
    bound.world.let_go()
    assert (bound.device.hwpt, other.users, other.rids) == (bound.hwpt, 0, [])


def test_a_detach_during_an_attach_waits_and_then_detaches(bound: Bound) -> None:
    bound.world.hold()
    attached = bound.world.start(bound.device.attach(bound.hwpt))
    detached = bound.world.start(bound.device.detach())
    assert len(bound.world.log) == 1
    bound.world.let_go()
    assert attached.done
    assert detached.done
    assert bound.world.log == ATTACH + DETACH
    assert bound.free


def test_two_detaches_at_once_detach_once_and_both_return(bound: Bound) -> None:
    bound.attach()
    bound.world.log.clear()
    bound.world.hold()
    both = [bound.world.start(bound.device.detach()) for _ in range(2)]
    assert not any(wait.done for wait in both)
    bound.world.let_go()
    assert [wait.result() for wait in both] == [None, None]
    assert bound.world.log == DETACH


def test_detaching_what_is_not_attached_does_nothing(bound: Bound) -> None:
    bound.detach()
    assert bound.world.log == []


def test_a_device_can_be_attached_again_elsewhere(bound: Bound) -> None:
    bound.attach()
    bound.detach()
    other = bound.world.hwpt(did=3)
    bound.world.run(bound.device.attach(other))
    assert (bound.hwpt.users, other.users) == (0, 1)
    assert struct.unpack_from("<Q", bound.world.entries[RID], 8)[0] & 0xFFFF == 3
