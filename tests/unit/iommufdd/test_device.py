"""Onto an HWPT and off it: the order of every step, and what is left when one of them fails."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from iommufdd.core.counts import UnitCounts
from iommufdd.core.device import DeviceState, IommufdDevice
from iommufdd.core.fault_policy import FaultPolicy, Policy
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.partial import PartialGroups
from protocol.errors import UapiError
from protocol.hw.caps import Cap, Ecap
from protocol.hw.qi import Descriptor
from protocol.units import PAGE_SIZE, Gpa, Iova
from tests.kit.iommufdd import CAP, DID, ECAP, GONE, RID, ROOT, Surroundings, function
from tests.unit.iommufdd.spaces import outcome

DT, PRS, SC = 1 << 2, 1 << 29, 1 << 7
ENTRY = struct.pack("<8Q", ROOT | 2 << 6 | 2 << 2 | 1, 3 << 23 | DID, 0, 0, 0, 0, 0, 0)
DSI = (2 | 2 << 4 | 3 << 6 | DID << 16, 0, 0, 0)
DEVTLB = (3 | RID << 32, 0x7FFF_FFFF_FFFF_F001, 0, 0)
WAIT = 5 | 1 << 5 | 1 << 6 | 2 << 32
DRAIN = struct.pack("<16Q", *(5 | 1 << 6, 0, 0, 0), *DSI, *DEVTLB, *(WAIT | 1 << 7, 0, 0, 0))
FLUSH = struct.pack("<16Q", *(7 | 1 << 4 | DID << 16, 0, 0, 0), *DSI, *DEVTLB, *(WAIT, 0, 0, 0))
ENTER = [
    ("pasid_entry", RID, 0, True),
    ("pasid", RID, True),
    ("ats", RID, True),
    ("pri", RID, 2048),
    ("master", RID, True),
]
LEAVE = [
    ("master", RID, False),
    ("pri", RID, 0),
    ("submit", DRAIN),
    ("pasid_entry", RID, 0, False),
    ("submit", FLUSH),
    ("pasid_entry", RID, 0, None),
    ("ats", RID, False),
    ("pasid", RID, False),
]


def can_fail(step: tuple[Any, ...]) -> bool:
    """Who stores into memory asks nobody."""
    return bool(step[0] != "pasid_entry")


FALLIBLE = [step for step in LEAVE if can_fail(step)]
OFF = {"pasid": False, "ats": False, "master": False}


class Bound:
    """A device, a KVM HWPT, and the world they act on."""

    def __init__(
        self, *, world: Surroundings | None = None, policy: FaultPolicy | None = None, **info: Any
    ) -> None:
        self.world = world or Surroundings()
        self.hwpt = self.world.hwpt()
        self.hwpt.id = 5
        self.device = IommufdDevice(
            function(**info), self.world, self.world, policy or FaultPolicy(), PartialGroups(UnitCounts())
        )

    def enter(self, hwpt: Hwpt | None = None, *, pinned: bool = False) -> None:
        hwpt = hwpt or self.hwpt
        self.device.check(hwpt, pinned=pinned)
        self.world.run(self.device.enter(hwpt, pinned=pinned))

    def leave(self) -> None:
        self.world.run(self.device.leave())

    def refused(self, hwpt: Hwpt | None = None, *, pinned: bool = False) -> UapiError:
        with pytest.raises(UapiError) as caught:
            self.enter(hwpt, pinned=pinned)
        assert self.free
        return caught.value

    @property
    def free(self) -> bool:
        """Nothing on our side remembers the attachment."""
        return self.device.hwpt is None and (self.hwpt.users, self.hwpt.rids) == (0, [])


@pytest.fixture
def bound() -> Bound:
    return Bound()


@pytest.mark.rfc("RFC-58", "RFC-60")
def test_in_go_the_entry_then_pasid_then_ats_then_page_requests_then_dma(bound: Bound) -> None:
    bound.enter()
    assert bound.world.log == ENTER
    assert bound.world.entries == {RID: ENTRY}
    assert bound.device.hwpt is bound.hwpt
    assert (bound.hwpt.users, bound.hwpt.rids) == (1, [RID])


@pytest.mark.rfc("RFC-65")
def test_an_attach_changes_nothing_of_the_domain(bound: Bound) -> None:
    before = bound.hwpt.domain, repr(bound.hwpt.domain)
    bound.enter()
    assert (bound.hwpt.domain, repr(bound.hwpt.domain)) == before


def test_an_invalidation_reaches_the_function_from_before_its_entry_is_written(bound: Bound) -> None:
    bound.world.hold()
    bound.world.start(bound.device.enter(bound.hwpt, pinned=False))
    assert bound.hwpt.rids == [RID]
    bound.world.start(bound.hwpt.invalidate(Gpa(0x5000), 0x1000, 1))
    _, raw = bound.world.log[-1]
    assert struct.unpack("<12Q", raw)[4] == 3 | RID << 32


@pytest.mark.parametrize("step", range(1, len(ENTER)))
def test_a_function_that_is_taken_off_the_bus_on_its_way_in_is_eio_and_without_dma(
    bound: Bound, step: int
) -> None:
    """The invalidation that timed out came from the HWPT, which knows the function before it is all in."""
    bound.world.hold()
    entered = bound.world.start(bound.device.enter(bound.hwpt, pinned=False))
    for _ in range(step - 1):
        bound.world.let_one_go()
    bound.world.off_bus.add(RID)
    asked = list(bound.world.log)
    bound.world.let_go()
    with pytest.raises(UapiError) as refused:
        entered.result()
    assert refused.value.errno == errno.EIO
    assert (bound.free, bound.world.switched[RID]["master"]) == (True, False)
    assert ("master", RID, True) not in bound.world.log[len(asked) :]


@pytest.mark.rfc("RFC-100")
@pytest.mark.defect("B-20")
def test_out_go_dma_and_page_requests_then_the_queue_is_drained_then_the_entry_and_every_cache(
    bound: Bound,
) -> None:
    """B-20: the entry went first, and nothing was drained.  It goes out with P first and the rest when it is
    forgotten: None."""
    bound.enter()
    bound.world.log.clear()
    bound.leave()
    assert bound.world.log == LEAVE
    assert bound.world.entries == {RID: bytes(64)}
    assert bound.world.switched == {RID: {**OFF, "pri": 0}}
    assert bound.free


def test_an_invalidation_reaches_the_function_until_it_was_flushed(bound: Bound) -> None:
    bound.enter()
    bound.world.hold()
    bound.world.start(bound.device.leave())
    for _ in FALLIBLE:
        assert bound.hwpt.rids == [RID]
        held, bound.world.held = bound.world.held, []
        assert held is not None
        for wait in held:
            wait.set(None)
        bound.world.flows.run_ready()
    assert bound.free


@pytest.mark.rfc("RFC-100")
@pytest.mark.defect("B-20")
def test_leaving_waits_for_every_group_in_flight_with_the_entry_still_there(bound: Bound) -> None:
    """B-20: work in the queue used a domain that was gone."""
    bound.enter()
    for _ in range(2):
        bound.device.begin_group()
    bound.world.log.clear()
    left = bound.world.start(bound.device.leave())
    assert bound.world.log == LEAVE[:3], "page requests are off, the entry stays"
    assert bound.device.state is DeviceState.DRAINED, "what comes now came too late"
    bound.device.end_group()
    bound.world.flows.run_ready()
    assert len(bound.world.log) == 3
    bound.device.end_group()
    bound.world.flows.run_ready()
    assert bound.world.log == LEAVE
    assert left.done
    assert bound.free


def test_groups_that_ended_before_hold_up_nothing(bound: Bound) -> None:
    bound.enter()
    for _ in range(3):
        bound.device.begin_group()
        bound.device.end_group()
    bound.leave()
    assert bound.free


@pytest.mark.parametrize("calls", range(sum(map(can_fail, ENTER))))
@pytest.mark.parametrize("number", [errno.EINVAL, GONE])
def test_a_failed_attach_leaves_nothing(bound: Bound, calls: int, number: int) -> None:
    bound.world.fails.after(calls, number, lasting=number == GONE)
    assert bound.refused().errno == number
    if number != GONE:
        assert bound.world.entries[RID] == bytes(64), "the unit could walk the root still"
        assert bound.world.switched[RID].items() >= OFF.items()
        assert not bound.world.switched[RID].get("pri")
        assert ("submit", FLUSH) in bound.world.log
        bound.world.log.clear()
        bound.enter()
        assert bound.world.log == ENTER


@pytest.mark.parametrize("calls", range(len(FALLIBLE)))
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, GONE])
def test_a_step_that_fails_keeps_no_other_from_being_taken(bound: Bound, calls: int, number: int) -> None:
    bound.enter()
    bound.world.log.clear()
    bound.world.fails.after(calls, number, lasting=number == GONE)
    bound.leave()
    failed = FALLIBLE[calls:] if number == GONE else FALLIBLE[calls : calls + 1]
    assert bound.world.log == [step for step in LEAVE if step not in failed]
    assert bound.free


def test_leaving_nothing_does_nothing(bound: Bound) -> None:
    bound.leave()
    assert bound.world.log == []


def test_a_device_goes_from_one_hwpt_to_another(bound: Bound) -> None:
    bound.enter()
    bound.leave()
    other = bound.world.hwpt(did=3)
    bound.enter(other)
    assert (bound.hwpt.users, other.users) == (0, 1)
    assert struct.unpack_from("<Q", bound.world.entries[RID], 8)[0] & 0xFFFF == 3


# -- what a device lacks -------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-61")
@pytest.mark.parametrize(
    ("info", "ecap"),
    [
        ({"ats": False}, ECAP.value),
        ({"pri": False}, ECAP.value),
        ({}, ECAP.value & ~DT),
        ({}, ECAP.value & ~PRS),
    ],
    ids=str,
)
def test_without_ats_or_page_requests_on_either_side_it_is_enodev_and_detached_again(
    info: dict[str, Any], ecap: int
) -> None:
    bound = Bound(world=Surroundings(ecap=Ecap(ecap)), **info)
    assert bound.refused().errno == errno.ENODEV
    assert bound.world.entries[RID] == bytes(64)
    assert not bound.world.switched[RID]["master"]


@pytest.mark.rfc("RFC-62", "RFC-107")
@pytest.mark.defect("B-12")
def test_page_requests_that_were_on_already_are_no_error_and_stay_on() -> None:
    """B-12: detach switched off what somebody else had switched on."""
    bound = Bound()
    bound.world.pri_on = True
    bound.enter()
    bound.leave()
    assert ("pri", RID, 0) not in bound.world.log
    assert bound.free
    bound.world.pri_on = False
    bound.enter()
    bound.leave()
    assert ("pri", RID, 0) in bound.world.log


@pytest.mark.rfc("RFC-63")
def test_a_device_with_pasid_on_that_needs_none_in_its_responses_is_einval() -> None:
    bound = Bound(pasid_required=False)
    assert bound.refused().errno == errno.EINVAL
    without = Bound(pasid=False, pasid_required=False)
    without.enter()
    assert ("pasid", RID, True) not in without.world.log


@pytest.mark.rfc("RFC-52")
@pytest.mark.parametrize(
    ("cap", "ecap", "why"),
    [
        (CAP.value, ECAP.value & ~SC, "snoop control"),
        (CAP.value & ~(2 << 34), ECAP.value, "leaves"),
        (CAP.value | 1 << 7, ECAP.value, "caching mode"),
    ],
)
def test_behind_a_unit_that_cannot_walk_the_table_it_is_einval_and_nothing_was_touched(
    cap: int, ecap: int, why: str
) -> None:
    bound = Bound(world=Surroundings(Cap(cap), Ecap(ecap)))
    refused = bound.refused()
    assert refused.errno == errno.EINVAL
    assert why in refused.why
    assert bound.world.log == []


# -- page requests go with the HWPT --------------------------------------------------------------------


@pytest.mark.rfc("RFC-107")
@pytest.mark.defect("B-12")
def test_page_requests_are_on_exactly_while_the_hwpt_needs_them(bound: Bound) -> None:
    """B-12: replacing an HWPT neither enabled nor disabled them."""
    paging = bound.world.paging()
    for hwpt, on in ((paging, 0), (bound.hwpt, 2048), (paging, 0), (bound.hwpt, 2048)):
        bound.enter(hwpt)
        assert bound.world.switched[RID].get("pri", 0) == on
        bound.leave()
        assert bound.world.switched[RID].get("pri", 0) == 0


# -- devices that fault only in part -------------------------------------------------------------------

ADDRESS = "6a:01.0"


@pytest.mark.parametrize(
    ("policy", "capability", "attached"),
    [
        (FaultPolicy(), "full", True),
        (FaultPolicy(), "partial", False),
        (FaultPolicy(), "none", False),
        (FaultPolicy(Policy.TRUST), "partial", True),
        (FaultPolicy(Policy.TRUST), "none", True),
        (FaultPolicy(Policy.ALLOW_LIST), "full", False),
        (FaultPolicy(Policy.ALLOW_LIST, frozenset({ADDRESS})), "partial", True),
        (FaultPolicy(Policy.ALLOW_LIST, frozenset({"6a:02.0"})), "full", False),
        (FaultPolicy(Policy.DECLARED, frozenset({ADDRESS})), "partial", False),
    ],
    ids=str,
)
def test_who_may_meet_an_absent_page(policy: FaultPolicy, capability: str, attached: bool) -> None:
    bound = Bound(policy=policy, fault_capability=capability)
    if attached:
        bound.enter()
        return
    refused = bound.refused()
    assert refused.errno == errno.EINVAL
    assert "dsa0" in refused.why
    assert bound.world.log == []
    bound.enter(bound.world.paging())
    bound.leave()
    bound.enter(pinned=True)


def test_everything_is_pinned_before_the_entry_is_written_and_until_nothing_uses_it() -> None:
    bound = Bound(fault_capability="none", ats=True, pri=False)
    bound.enter(pinned=True)
    assert bound.world.log[:2] == [("pin_all",), ("pasid_entry", RID, 0, True)]
    bound.world.run(bound.device.pin(Iova(0x5000), 0x2000))
    bound.world.log.clear()
    bound.leave()
    assert bound.world.log[-2:] == [("unpin", 2), ("unpin", 1)]
    assert ("submit", FLUSH) in bound.world.log[:-2]
    assert bound.free


def test_an_attach_whose_memory_cannot_be_pinned_fails_with_kvm_s_errno_and_pins_nothing() -> None:
    bound = Bound(fault_capability="none")
    bound.world.fails.after(0, errno.ENOMEM, lasting=False)
    assert bound.refused(pinned=True).errno == errno.ENOMEM
    assert "unpin" not in [what for what, *_ in bound.world.log]
    assert ("pasid_entry", RID, 0, True) not in bound.world.log


def test_a_device_that_needs_no_page_requests_where_it_goes_pins_nothing() -> None:
    bound = Bound(fault_capability="none")
    bound.enter(bound.world.paging(), pinned=True)
    assert ("pin_all",) not in bound.world.log
    with pytest.raises(UapiError) as caught:
        bound.world.run(bound.device.pin(Iova(0), 0x1000))
    assert caught.value.errno == errno.EINVAL


def test_a_pin_that_outlasts_the_attachment_is_taken_back() -> None:
    bound = Bound()
    bound.enter()
    bound.world.hold()
    pin = bound.world.start(bound.device.pin(Iova(0x5000), 0x1000))
    held, bound.world.held = bound.world.held, None
    bound.leave()
    assert held is not None
    held[0].set(None)
    bound.world.flows.run_ready()
    with pytest.raises(UapiError) as caught:
        pin.result()
    assert caught.value.errno == errno.EINVAL
    assert bound.world.log[-1] == ("unpin", 1)


def test_a_pinned_device_without_page_requests_is_attached_without_them() -> None:
    bound = Bound(ats=False, pri=False, fault_capability="none")
    bound.enter(pinned=True)
    assert "pri" not in bound.world.switched[RID]
    bound.leave()
    assert bound.free


def test_a_function_without_ats_is_sent_no_invalidation_of_a_device_tlb() -> None:
    """It would complete none, and be taken off the bus for that."""
    bound = Bound(ats=False, pri=False, fault_capability="none")
    paging = bound.world.paging()
    bound.world.run(bound.device.enter(paging, pinned=False))
    bound.world.run(paging.forget(Iova(0), 4096))
    bound.world.run(bound.device.leave())
    descriptors = b"".join(words for what, *rest in bound.world.log if what == "submit" for words in rest)
    assert [descriptors[at] & 0xF for at in range(0, len(descriptors), 32)] == [2, 5, 5, 2, 5, 7, 2, 5]
    assert paging.without_ats == set()


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EINVAL])
def test_what_a_unit_refused_to_forget_of_a_device_that_left_is_not_given_up(number: int) -> None:
    """Silicon that is there may still translate by it, though the device is on no HWPT any more."""
    bound = Bound()
    bound.enter()
    submit, refuses = bound.world.submit, [True]

    async def submits(descriptors: Sequence[Descriptor]) -> None:
        if refuses:
            raise UapiError(number, "told to refuse")
        await submit(descriptors)

    bound.world.submit = submits  # type: ignore[method-assign]
    bound.leave()
    assert bound.free
    for step in (bound.hwpt.invalidate(Gpa(0), PAGE_SIZE, 1), bound.hwpt.destroy()):
        assert outcome(partial(bound.world.run, step)) == number
    assert bound.hwpt.acked_epoch == 0
    assert bound.refused().errno == number
    refuses.clear()
    bound.world.log.clear()
    bound.world.run(bound.hwpt.invalidate(Gpa(0), PAGE_SIZE, 2))
    assert (bound.world.log, bound.hwpt.acked_epoch) == ([("submit", FLUSH)], 2)
    bound.enter()
    bound.leave()
    bound.world.run(bound.hwpt.destroy())


def test_with_silicon_that_is_gone_goes_what_it_refused_to_forget() -> None:
    bound = Bound()
    bound.enter()
    bound.world.fails.after(0, errno.EIO)
    bound.leave()
    bound.world.fails.after(0, GONE)
    bound.world.run(bound.hwpt.destroy())
    assert bound.hwpt.unforgotten == {}
