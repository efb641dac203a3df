"""The driver's core and the unit's over the same memory, kicks and events in any order: nothing is lost or
torn.
"""

from __future__ import annotations

import errno
from itertools import pairwise
from random import Random

import pytest

from device_sim.core.dmar import RemappingUnit, RequestRefused
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.traits import capabilities
from iommufdd.core import qi
from iommufdd.core.domain import Domain
from protocol.flow import Flows, Wait
from protocol.hostmem import LOW_RAM_START, Window, WindowKind
from protocol.hw.faults import FaultReason
from protocol.hw.pasid_entry import RID_PASID, PasidEntry
from protocol.hw.prq import PageRequest
from protocol.hw.qi import Descriptor, IotlbGranularity, IotlbInv, ResponseCode
from protocol.pt.mem import TableWriter
from protocol.units import LEVEL_1G, PAGE_SIZE, Hpa, Iova, IovaPfn, Level
from tests.kit.linked_unit import LinkedUnit
from tests.kit.refusals import errno_of

RID = 0x6A08
DID = 7
LEAF = 0x8000_0000
PAGE = IovaPfn(5)
TABLES = [Hpa(LOW_RAM_START + n * PAGE_SIZE) for n in range(4)]
CAP, ECAP = capabilities()
DOMAIN = Domain(TABLES[0], Level(4), DID, LEVEL_1G)


class LateEndpoint:
    """A function; the next `late` of its invalidations are not completed in time."""

    def __init__(self) -> None:
        self.late = 0
        self.invalidated = 0
        self.responses: list[int] = []

    def invalidate_translations(self, start: IovaPfn, npages: int) -> bool:
        self.late -= self.late > 0
        if self.late:
            return False
        self.invalidated += 1
        return True

    def page_response(self, prgi: int, code: ResponseCode) -> None:
        self.responses.append(prgi)


class Linked(LinkedUnit):
    """Page 5 is mapped by a table of four levels; function 0x6a08 is on no domain."""

    def __init__(self, seed: int = 0) -> None:
        memory = PhysicalMemory()
        view = memoryview(bytearray(len(TABLES) * PAGE_SIZE))
        memory.add(Window(WindowKind.TABLES, LOW_RAM_START, len(view), view), lambda: None)
        writer = TableWriter(LOW_RAM_START, view)
        for upper, lower in pairwise(TABLES):
            writer.store64(upper, lower | 3)
        writer.store64(Hpa(TABLES[-1] + 8 * PAGE), LEAF | 3)
        self.endpoint = LateEndpoint()
        unit = RemappingUnit(CAP, ECAP, 46, memory)
        unit.add_endpoint(RID, self.endpoint)
        super().__init__(Flows(), unit, memory, Random(seed).choice)
        self.driver.tables.add_function(RID, ats=True, pasid=True, pri=True)

    def attach(self) -> None:
        self.driver.put_pasid_entry(RID, RID_PASID, DOMAIN.pasid_entry(ECAP))

    def reaches(self) -> int | FaultReason:
        """Where page 5 leads, or why the unit refuses to say."""
        try:
            return self.unit.translation_request(RID, PAGE, 1).hpa
        except RequestRefused as refused:
            return refused.reason

    def submit(self, descriptors: list[Descriptor]) -> Wait[None]:
        wait = self.flows.start(self.driver.submit(descriptors))
        self.flows.run_ready()
        return wait


def test_a_function_reaches_what_its_entry_leads_to_and_nothing_once_that_is_forgotten() -> None:
    linked = Linked()
    assert linked.reaches() is FaultReason.SPT_2
    linked.attach()
    assert linked.reaches() == LEAF
    linked.driver.retire_pasid_entry(RID, RID_PASID)
    assert linked.reaches() == LEAF, "cached: nobody told the unit"
    gone = linked.submit(qi.detach(DID, RID, ECAP))
    linked.settle()
    assert gone.done
    linked.driver.clear_pasid_entry(RID, RID_PASID)
    assert linked.reaches() is FaultReason.SPT_2
    linked.attach()
    assert linked.reaches() == LEAF, "an entry that comes needs no invalidation"


@pytest.mark.parametrize("first", ["P last", "P first"])
def test_no_store_of_an_entry_shows_half_of_it(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit looks between any two stores.  Planted: the word with P goes first."""
    linked = Linked()
    seen = []
    store64 = TableWriter.store64

    def store_and_look(writer: TableWriter, hpa: int, entry: int) -> None:
        store64(writer, hpa, entry)
        seen.append(linked.reaches())
        linked.unit.tables.use(linked.driver.tables.rtaddr)  # its caches are empty each time

    monkeypatch.setattr(TableWriter, "store64", store_and_look)
    if first == "P first":
        monkeypatch.setattr("iommufdd.core.translation_tables.reversed", iter, raising=False)
    linked.attach()
    assert len(seen) == 8
    whole = seen[:-1] == [FaultReason.SPT_2] * 7 and seen[-1] == LEAF
    assert whole == (first == "P last")


def test_a_new_entry_over_an_old_one_that_was_cleared_shows_nothing_of_it() -> None:
    linked = Linked()
    linked.driver.put_pasid_entry(RID, RID_PASID, PasidEntry(present=True, pgtt=1, sre=True, did=9))
    linked.driver.retire_pasid_entry(RID, RID_PASID)
    linked.driver.clear_pasid_entry(RID, RID_PASID)
    linked.attach()
    assert linked.reaches() == LEAF


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_of_kicks_and_events_nothing_is_lost_and_nothing_comes_twice(seed: int) -> None:
    chance = Random(seed)
    linked = Linked(seed)
    waits: list[Wait[None]] = []
    asked = answered = 0
    for _ in range(400):
        match chance.randrange(4):
            case 0:
                waits.append(
                    linked.submit(qi.invalidate(CAP, DID, [RID] * chance.randrange(20), Iova(0), 4096))
                )
            case 1:
                for _ in range(chance.randrange(60)):
                    linked.driver.respond(RID, answered % 512, ResponseCode.SUCCESS)
                    answered += 1
            case 2:
                for _ in range(chance.randrange(60)):
                    addr = Iova(asked << 12)
                    linked.unit.prq.submit(PageRequest(rid=RID, prgi=0, addr=addr, last=True, read=True))
                    asked += 1
            case _ if linked.due:
                linked.arrive()
                linked.flows.run_ready()
    linked.settle()
    linked.driver.respond(RID, 0, ResponseCode.SUCCESS)  # whatever waits for room goes with the next kick
    linked.settle()
    assert all(wait.result() is None for wait in waits if wait.done)
    assert [wait.done for wait in waits] == [True] * len(waits)
    assert linked.endpoint.responses[:answered] == [n % 512 for n in range(answered)]
    taken = b"".join(entries for entries, _ in linked.page_requests)
    found = [PageRequest.from_bytes(taken[at : at + 32]).addr >> 12 for at in range(0, len(taken), 32)]
    lost = linked.unit.prq.dropped
    assert found == sorted(set(found))
    assert len(found) == asked - lost


def test_a_device_that_is_late_once_is_asked_again_and_nobody_is_told() -> None:
    linked = Linked()
    linked.endpoint.late = 2  # one that is not completed
    wait = linked.submit(qi.invalidate(CAP, DID, [RID], Iova(0), 4096))
    linked.settle()
    assert wait.result() is None
    assert linked.endpoint.invalidated == 1


def test_a_device_that_is_always_late_reaches_nothing_before_its_submitter_is_told() -> None:
    linked = Linked()
    linked.attach()
    assert linked.reaches() == LEAF
    linked.endpoint.late = 1 << 30
    wait = linked.submit(qi.invalidate(CAP, DID, [RID], Iova(0), 4096))
    second = linked.submit(qi.invalidate(CAP, DID, [RID], Iova(0), 4096))
    other = linked.submit(qi.invalidate(CAP, DID, [], Iova(0), 4096))
    linked.settle()
    assert [each.result() for each in (wait, second, other)] == [None, None, None]
    assert linked.ended == [RID], "its bus mastering is taken from it, once"
    assert linked.reaches() is FaultReason.SCT_2
    for _ in range(2):  # off its HWPT it goes as any other, and not back onto one
        gone = linked.submit(qi.detach(DID, RID, ECAP))
        linked.driver.retire_pasid_entry(RID, RID_PASID)
        linked.settle()
        assert gone.result() is None
        linked.driver.clear_pasid_entry(RID, RID_PASID)
        assert errno_of(linked.attach) == errno.EIO
    assert linked.reaches() is FaultReason.SCT_2


def late_for_good(linked: Linked) -> list[int | FaultReason]:
    """Its function completes nothing; what it reaches at each store into the tables on its way out."""
    linked.attach()
    assert linked.reaches() == LEAF
    seen = []
    store64 = TableWriter.store64

    def store_and_look(writer: TableWriter, hpa: int, entry: int) -> None:
        store64(writer, hpa, entry)
        seen.append(linked.reaches())

    linked.endpoint.late = 1 << 30
    wait = linked.submit(qi.invalidate(CAP, DID, [RID], Iova(0), 4096))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableWriter, "store64", store_and_look)
        linked.settle()
    assert wait.done
    return [*seen, linked.reaches()]


OUT = [LEAF, *([FaultReason.SCT_2] * 5)]  # P; what the unit remembers of it; the rest, when it was told


def test_a_context_entry_goes_out_p_first_then_the_unit_forgets_then_the_rest() -> None:
    assert late_for_good(Linked()) == OUT


@pytest.mark.parametrize("planted", ["the rest first", "no flush", "no context flush"])
def test_a_context_entry_taken_out_in_another_order_is_noticed(
    planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = Linked()
    tables = linked.driver.tables
    if planted == "the rest first":
        retire, clear = tables.retire_context_entry, tables.clear_context_entry

        def all_at_once(rid: int) -> None:
            retire(rid)
            clear(rid)

        monkeypatch.setattr(tables, "retire_context_entry", all_at_once)
        monkeypatch.setattr(tables, "clear_context_entry", lambda rid: None)
    else:
        keep = qi.forget_function(RID)[1:] if planted == "no context flush" else [qi.wait()]
        monkeypatch.setattr(qi, "forget_function", lambda rid: keep)
    assert late_for_good(linked) != OUT


@pytest.mark.parametrize("seed", range(10))
def test_functions_that_answer_now_and_then_lose_nobody_an_invalidation(seed: int) -> None:
    """However time-outs fall, who waits is told when the function dropped it, or can use nothing."""
    chance = Random(seed)
    linked = Linked(seed)
    linked.attach()
    waits = []
    for _ in range(40):
        linked.endpoint.late = chance.choice((0, 0, 2, 3))
        waits.append(linked.submit(qi.invalidate(CAP, DID, [RID], Iova(0), 4096)))
        if chance.randrange(3):
            linked.settle()
    linked.settle()
    assert [wait.result() for wait in waits] == [None] * len(waits)
    assert (linked.reaches() is FaultReason.SCT_2) == (linked.ended == [RID])


def test_a_descriptor_the_unit_cannot_execute_is_told_of_and_the_queue_goes_on() -> None:
    linked = Linked()
    beyond = IotlbInv(granularity=IotlbGranularity.PAGE, did=DID, am=CAP.mamv + 1)
    bad = linked.submit([beyond, qi.wait()])
    good = linked.submit(qi.invalidate(CAP, DID, [RID], Iova(0), 4096))
    linked.settle()
    assert errno_of(bad.result) == errno.EINVAL
    assert good.result() is None


def test_faults_are_read_each_once_however_many_there_are() -> None:
    linked = Linked()
    for _ in range(3 * CAP.nfr):
        assert linked.reaches() is FaultReason.SPT_2
        linked.settle()
    assert len(linked.faults) == 3 * CAP.nfr
    for _ in range(2 * CAP.nfr):
        linked.reaches()
    linked.settle()
    assert len(linked.faults) == 4 * CAP.nfr, "those without a register are lost"
    linked.reaches()
    linked.settle()
    assert len(linked.faults) == 4 * CAP.nfr + 1
