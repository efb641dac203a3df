"""From an entry of the page request queue to the one answer its group gets, whatever the entry says."""

from __future__ import annotations

import errno
import random
import struct
from typing import Any

import pytest

from iommufdd.core import qi
from iommufdd.core.counts import UnitCounts
from iommufdd.core.device import IommufdDevice
from iommufdd.core.fault_policy import FaultPolicy
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.iopf import MAX_ACTIVE, Iopf
from protocol.errors import EHWPOISON
from protocol.flow import Flows
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.units import Iova, Pasid
from tests.kit.iommufdd import RID, NoLog, Surroundings, function

SUCCESS, INVALID, FAILURE = ResponseCode.SUCCESS, ResponseCode.INVALID, ResponseCode.FAILURE
STRANGER = 0x6B00


def entry(page: int = 0, prgi: int = 0, *, rid: int = RID, last: bool = True, **rights: Any) -> bytes:
    return PageRequest(
        rid=rid, prgi=prgi, addr=Iova(page << 12), last=last, **(rights or {"read": True})
    ).to_bytes()


class Queue:
    """One device on a KVM HWPT, and everything it was answered."""

    def __init__(self, *, attached: bool = True) -> None:
        self.world = Surroundings()
        self.crashes: list[BaseException] = []
        self.world.flows = Flows(self.crashes.append)
        self.hwpt = self.world.hwpt()
        self.iopf = Iopf(self._find, self._respond, self.world.flows.spawn, UnitCounts(), NoLog())
        self.device = IommufdDevice(function(), self.world, self.world, FaultPolicy(), self.iopf.partial)
        if attached:
            self.world.run(self.device.enter(self.hwpt, pinned=False))
        self.world.log.clear()
        self.answers: list[tuple[int, int, ResponseCode]] = []
        self.pasids: list[Pasid | None] = []  # of the answers
        self.there = True

    def _find(self, rid: int) -> IommufdDevice | None:
        return self.device if rid == RID else None

    def _respond(self, rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None) -> bool:
        self.pasids.append(pasid)
        self.answers.append((rid, prgi, code))
        return self.there

    def take(self, *entries: bytes) -> list[tuple[int, int, ResponseCode]]:
        """The answers to these entries."""
        before = len(self.answers)
        for raw in entries:
            self.iopf.take(raw)
            self.world.flows.run_ready()
        return self.answers[before:]

    @property
    def asked(self) -> list[int]:
        """The gfns KVM was asked for."""
        return [gfn for what, gfn, *_ in self.world.log if what == "fault"]


@pytest.mark.rfc("RFC-81")
def test_a_group_is_handled_in_order_and_answered_once_for_its_last_request() -> None:
    queue = Queue()
    parts = [entry(page, 7, last=False) for page in (9, 4, 6)]
    assert queue.take(*parts) == []
    assert queue.take(entry(5, 7)) == [(RID, 7, SUCCESS)]
    assert queue.asked == [9, 4, 6, 5]


@pytest.mark.rfc("RFC-81")
@pytest.mark.parametrize(
    ("number", "code"), [(errno.EFAULT, INVALID), (EHWPOISON, INVALID), (errno.EPERM, FAILURE)]
)
def test_the_first_fault_that_fails_decides_and_those_behind_it_are_not_handled(
    number: int, code: ResponseCode
) -> None:
    queue = Queue()
    queue.world.fault_errno = number
    assert queue.take(entry(1, last=False), entry(2)) == [(RID, 0, code)]
    assert queue.asked == [1]


@pytest.mark.rfc("RFC-83")
def test_a_request_without_pasid_is_served_by_its_own_functions_domain_and_answered_without() -> None:
    """Two functions with a domain each: what one of them asks for the KVM of the other does not hear."""
    first, second = Queue(), Queue()
    devices = {RID: first.device, RID + 8: second.device}
    answers: list[bytes] = []

    def respond(rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None) -> bool:
        answers.extend(qi.raw([qi.page_group_response(rid, prgi, code, pasid)]))
        return True

    iopf = Iopf(devices.get, respond, first.world.flows.spawn, UnitCounts(), NoLog())
    iopf.take(entry(5, write=True))
    iopf.take(entry(6, 1, rid=RID + 8))
    first.world.flows.run_ready()
    assert (first.world.log, second.world.log) == ([("fault", 5, "w")], [("fault", 6, "r")])
    # Type 9, no PASID Present (bit 4), no PASID (51:32), the requester in 31:16; LPIG and the index above.
    words = [struct.unpack("<4Q", raw) for raw in answers]
    assert [word[0] & ((1 << 52) - 1) for word in words] == [9 | RID << 16, 9 | (RID + 8) << 16]
    assert [word[1] >> 3 & 0x1FF for word in words] == [0, 1]


@pytest.mark.rfc("RFC-84", "RFC-85")
@pytest.mark.parametrize(
    "raw",
    [
        entry(5, read=True, pasid_present=True, pasid=Pasid(0)),
        entry(5, read=True, pasid_present=True, pasid=Pasid(77)),
        entry(5, read=True, priv=True),
        entry(5, write=True, priv=True),
        entry(5, exec=True, read=True),
        entry(1 << 51),
        entry(5, rid=STRANGER),
    ],
)
def test_what_a_device_may_not_ask_is_invalid_if_it_is_the_last(raw: bytes) -> None:
    queue = Queue()
    ((rid, _, code),) = queue.take(raw)
    assert (rid, code) == (PageRequest.from_bytes(raw).rid, INVALID)
    assert queue.asked == []


def test_a_refused_request_that_is_not_the_last_is_dropped_and_its_group_goes_on() -> None:
    queue = Queue()
    assert queue.take(entry(1, last=False), entry(2, last=False, read=True, priv=True)) == []
    assert queue.take(entry(3)) == [(RID, 0, SUCCESS)]
    assert queue.asked == [1, 3]


def test_a_group_whose_last_request_is_refused_is_answered_once_and_forgotten() -> None:
    queue = Queue()
    queue.take(entry(1, last=False), entry(2, last=False))
    assert queue.take(entry(3, read=True, priv=True)) == [(RID, 0, INVALID)]
    assert (queue.asked, queue.iopf.partial.held) == ([], 0)
    assert queue.take(entry(4)) == [(RID, 0, SUCCESS)]
    assert queue.asked == [4], "an index used again starts empty"


@pytest.mark.rfc("RFC-85")
def test_private_data_and_reserved_bits_are_invalid_if_it_is_the_last() -> None:
    for bit in (9, 15, 54, 63, 128, 255):
        queue = Queue()
        for last, answers in ((False, []), (True, [(RID, 7, INVALID)])):
            raw = int.from_bytes(entry(5, 7, last=last), "little") | 1 << bit
            assert queue.take(raw.to_bytes(32, "little")) == answers
        assert (queue.iopf.counts.malformed, queue.asked) == (2, [])


def test_an_entry_of_another_type_is_counted_and_not_answered() -> None:
    queue = Queue()
    assert queue.take(b"\x02" + entry(5)[1:]) == []
    assert queue.iopf.counts.malformed == 1


@pytest.mark.rfc("RFC-84")
@pytest.mark.parametrize("pasid", [None, 3])
@pytest.mark.parametrize("rid", [RID, STRANGER])
def test_a_stop_marker_is_never_answered_and_ends_no_group(pasid: int | None, rid: int) -> None:
    queue = Queue()
    queue.take(entry(1, last=False))
    named: dict[str, Any] = {} if pasid is None else {"pasid_present": True, "pasid": Pasid(pasid)}
    assert queue.take(entry(rid=rid, read=False, **named)) == []
    assert (queue.iopf.partial.held, queue.iopf.counts.responses, queue.asked) == (1, 0, [])
    assert queue.take(entry(2)) == [(RID, 0, SUCCESS)]
    assert queue.asked == [1, 2]


def test_a_device_on_nothing_or_on_an_ioas_is_answered_invalid() -> None:
    queue = Queue(attached=False)
    assert queue.take(entry(5)) == [(RID, 0, INVALID)]
    queue.world.run(queue.device.enter(queue.world.paging(), pinned=False))
    assert queue.take(entry(5)) == [(RID, 0, INVALID)]
    assert queue.asked == []


@pytest.mark.rfc("RFC-100")
@pytest.mark.defect("B-20")
def test_a_request_that_comes_after_the_drain_is_answered_and_touches_no_domain() -> None:
    """B-20: it found the domain, and used it while it went."""
    queue = Queue()
    queue.device.begin_group()
    left = queue.world.start(queue.device.leave())
    assert not left.done
    assert queue.take(entry(5)) == [(RID, 0, INVALID)]
    assert queue.asked == []
    queue.device.end_group()
    queue.world.flows.run_ready()
    assert left.done


@pytest.mark.rfc("RFC-100")
def test_a_group_being_handled_is_answered_before_its_device_is_off() -> None:
    """Every step of leaving is done at once, and KVM takes its time."""
    queue = Queue()
    queue.world.hold()
    assert queue.take(entry(5)) == []
    faults, queue.world.held = queue.world.held or [], None
    left = queue.world.start(queue.device.leave())
    assert (queue.answers, left.done, any(queue.world.entries[RID])) == ([], False, True)
    for fault in faults:
        fault.set(None)
    queue.world.flows.run_ready()
    assert queue.answers == [(RID, 0, SUCCESS)]
    assert left.done


def test_so_many_groups_of_a_unit_are_handled_at_a_time_as_its_workqueue_runs() -> None:
    queue, groups = Queue(), MAX_ACTIVE + 3
    queue.world.hold()
    assert queue.take(*(entry(page, page) for page in range(groups))) == []
    assert queue.asked == [*range(MAX_ACTIVE)]
    held = queue.world.held or []
    for done in range(groups):
        held.pop(0).set(None)
        queue.world.flows.run_ready()
        assert queue.answers == [(RID, prgi, SUCCESS) for prgi in range(done + 1)]
        assert queue.asked == [*range(min(MAX_ACTIVE + done + 1, groups))]


def test_who_leaves_waits_for_a_group_that_waits_for_its_turn() -> None:
    """Another function's groups are all that is handled."""
    busy, leaving = Queue(), Queue()
    devices, answers = {RID: busy.device, RID + 8: leaving.device}, list[tuple[int, ResponseCode]]()

    def respond(rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None) -> bool:
        answers.append((rid, code))
        return True

    iopf = Iopf(devices.get, respond, busy.world.flows.spawn, UnitCounts(), NoLog())
    busy.world.hold()
    for prgi in range(MAX_ACTIVE):
        iopf.take(entry(prgi, prgi))
    iopf.take(entry(5, rid=RID + 8))
    busy.world.flows.run_ready()
    left = leaving.world.start(leaving.device.leave())
    assert (left.done, leaving.asked) == (False, [])
    busy.world.let_go()
    assert leaving.asked == [5]
    assert answers.count((RID + 8, SUCCESS)) == 1
    leaving.world.flows.run_ready()
    assert left.done


class Bug(Exception):
    """Ours."""


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_bug_in_the_middle_of_a_group_still_answers_it_and_surfaces(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue()
    served = type(queue.hwpt).fault

    async def fault(hwpt: Any, request: PageRequest) -> ResponseCode:
        if request.addr >> 12 == failing:
            raise Bug("I99")
        return await served(hwpt, request)

    monkeypatch.setattr(type(queue.hwpt), "fault", fault)
    answers = queue.take(entry(0, 3, last=False), entry(1, 3, last=False), entry(2, 3))
    assert answers == [(RID, 3, FAILURE)]
    assert [type(crash) for crash in queue.crashes] == [Bug]
    queue.world.run(queue.device.leave())


def test_a_bug_in_answering_keeps_neither_who_leaves_nor_who_waits_for_a_turn() -> None:
    queue = Queue()

    def respond(rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None) -> bool:
        raise Bug("I99")

    iopf = Iopf(queue._find, respond, queue.world.flows.spawn, UnitCounts(), NoLog())
    queue.world.hold()
    for prgi in range(MAX_ACTIVE + 1):
        iopf.take(entry(prgi, prgi))
    left = queue.world.start(queue.device.leave())
    assert not left.done
    queue.world.let_go()
    queue.world.flows.run_ready()
    assert queue.asked == [*range(MAX_ACTIVE + 1)]
    assert left.done
    assert len(queue.crashes) == MAX_ACTIVE + 1


@pytest.mark.defect("B-40")
def test_an_answer_nobody_got_is_counted() -> None:
    """B-40: what came of sending it was not looked at."""
    queue = Queue()
    queue.there = False
    queue.take(entry(5))
    assert (queue.iopf.counts.responses, queue.iopf.counts.responses_lost) == (1, 1)


def test_of_any_bytes_every_last_request_is_answered_once() -> None:
    chance = random.Random(20231202)
    queue = Queue()
    for _ in range(3000):
        raw = bytearray(chance.randbytes(32))
        if chance.random() < 0.9:
            raw[0] = 1
        if chance.random() < 0.5:
            raw[2:4] = RID.to_bytes(2, "little")
        if chance.random() < 0.7:
            raw[1] &= 1
            raw[6] &= 0x3F
            raw[7] = 0
            raw[16:] = bytes(16)
        last, rights = raw[8] >> 2 & 1, raw[8] & 3
        well_formed = not (raw[1] & 0xFE or raw[6] & 0xC0 or raw[7] or any(raw[16:]))
        due = raw[0] == 1 and last and (rights or not well_formed)
        answers = queue.take(bytes(raw))
        assert len(answers) == bool(due), raw.hex()
    assert queue.crashes == []


def test_half_a_group_whose_end_an_overflowed_queue_may_have_dropped_is_forgotten() -> None:
    """R9: its end, when the index is used again, is another group's."""
    queue = Queue()
    queue.iopf.prq_event(entry(1, 5, last=False), overflow=True)
    assert (queue.iopf.partial.held, queue.iopf.counts.partial_discarded) == (0, 1)
    assert queue.take(entry(2, 5)) == [(RID, 5, SUCCESS)]
    assert queue.asked == [2]


# -- half a group and a replacement --------------------------------------------------------------------


def replaced(queue: Queue, *, then_back: bool = False) -> HwptKvm:
    """The device goes onto another HWPT, and perhaps back again."""
    first, other = queue.hwpt, queue.world.hwpt(did=3)
    first.id, other.id = 5, 6
    for hwpt in (other, first) if then_back else (other,):
        queue.world.run(queue.device.leave())
        queue.world.run(queue.device.enter(hwpt, pinned=False))
    queue.world.log.clear()
    return first if then_back else other


@pytest.mark.parametrize("then_back", [False, True])
def test_half_a_group_is_forgotten_with_the_domain_it_was_asked_for_on(*, then_back: bool) -> None:
    """A whole group of the same index met the other half's address, which its domain did not have."""
    queue = Queue()
    assert queue.take(entry(1 << 40, 5, last=False)) == []
    replaced(queue, then_back=then_back)
    assert (queue.iopf.partial.held, queue.iopf.counts.partial_discarded) == (0, 1)
    assert queue.take(entry(7, 5, last=False), entry(8, 5)) == [(RID, 5, SUCCESS)]
    assert queue.asked == [7, 8]


def test_a_request_that_begins_a_group_on_no_domain_is_kept_for_none() -> None:
    """Whoever has page requests on before it is attached may ask then."""
    queue = Queue(attached=False)
    assert queue.take(entry(1, 5, last=False)) == []
    queue.world.run(queue.device.enter(queue.hwpt, pinned=False))
    queue.world.log.clear()
    assert queue.take(entry(2, 5)) == [(RID, 5, SUCCESS)]
    assert queue.asked == [2]


def test_a_request_that_begins_a_group_while_its_device_leaves_is_kept_for_none() -> None:
    queue = Queue()
    queue.take(entry(1, 5, last=False))
    queue.device.begin_group()
    left = queue.world.start(queue.device.leave())
    assert queue.iopf.partial.held == 0
    assert queue.take(entry(2, 5, last=False)) == []
    queue.device.end_group()
    queue.world.flows.run_ready()
    assert (left.done, queue.iopf.partial.held) == (True, 0)


@pytest.mark.parametrize("rid", [RID, STRANGER])
def test_the_check_of_partial_groups_can_fail(rid: int) -> None:
    """I24, on a driver that forgets nothing when a device leaves."""
    queue = Queue()
    queue.take(entry(1, 5, last=False))
    assert queue.iopf.partial.check({RID: queue.hwpt}) == []
    queue.iopf.partial.discard = lambda rids=None: None  # type: ignore[method-assign]
    other = replaced(queue)
    (found,) = queue.iopf.partial.check({rid: other})
    assert found == f"I24: function {RID:#x}, group 5: held for HWPT 5, which it is not on"


def test_a_last_request_that_makes_no_sense_ends_its_group() -> None:
    """It was answered, so the device uses the index again: the next group with it is another."""
    queue = Queue()
    malformed = bytearray(entry(2, 7))
    malformed[31] = 1
    assert queue.take(entry(1, 7, last=False), bytes(malformed)) == [(RID, 7, INVALID)]
    assert queue.take(entry(3, 7)) == [(RID, 7, SUCCESS)]
    assert queue.asked == [3]


@pytest.mark.rfc("RFC-84")
@pytest.mark.parametrize("bit", [None, 128], ids=["refused", "malformed"])
@pytest.mark.parametrize("rid", [RID, STRANGER])
def test_a_request_with_a_pasid_is_refused_with_it(bit: int | None, rid: int) -> None:
    """PRG Response PASID Required: without it the function would wait for its answer for ever."""
    queue = Queue()
    raw = int.from_bytes(entry(5, 7, rid=rid, read=True, pasid_present=True, pasid=Pasid(0x54321)), "little")
    raw |= 0 if bit is None else 1 << bit
    assert queue.take(raw.to_bytes(32, "little")) == [(rid, 7, INVALID)]
    assert queue.pasids == [0x54321]
