"""A unit brought up, and its faults: registers as words, in the order they are stored."""

from __future__ import annotations

import errno

import pytest

from protocol.errors import UapiError
from protocol.hw.caps import Cap
from tests.unit.iommufdd.hardware import (
    CAP,
    FAULTS,
    FAULTS_AT,
    FSTS,
    GCMD,
    GSTS,
    IQA,
    PQA,
    QUEUES_AT,
    RING_AT,
    RTADDR,
    MiniatureUnit,
)

TE, SRTP, QIE = 1 << 31, 1 << 30, 1 << 26
PFO, PPF = 1, 2
F = 1 << 63


def obey(unit: MiniatureUnit) -> int:
    """What is commanded takes effect, and the event comes."""
    command = unit.load(GCMD)
    unit.show(GSTS, unit.shows(GSTS) | command)
    unit.completion()
    return command


def test_a_unit_is_brought_up_queue_first_then_root_then_translation() -> None:
    unit = MiniatureUnit()
    up = unit.start(unit.driver.bring_up())
    assert unit.load(IQA, 8) == RING_AT | 1 << 11
    assert unit.load(PQA, 8) == QUEUES_AT | 4
    assert unit.load(RTADDR, 8) == unit.driver.tables.rtaddr
    assert [obey(unit), obey(unit), obey(unit)] == [QIE, QIE | SRTP, QIE | TE]
    assert up.result() is None
    assert unit.kicks == 3
    assert unit.tail == 0


def test_a_unit_that_keeps_its_caches_over_srtp_is_told_to_forget_before_it_translates() -> None:
    unit = MiniatureUnit(Cap(CAP.value & ~(1 << 63)))
    up = unit.start(unit.driver.bring_up())
    assert [obey(unit), obey(unit)] == [QIE, QIE | SRTP]
    # context cache, PASID cache and IOTLB, all of each, then a wait
    assert [unit.descriptor(n)[0] & 0x3F for n in range(4)] == [
        1 | 1 << 4,
        7 | 3 << 4,
        2 | 1 << 4,
        5 | 3 << 4,
    ]
    unit.execute()
    unit.completion()
    assert obey(unit) == QIE | TE
    assert up.result() is None


def test_an_event_before_its_command_took_effect_is_not_taken_for_it() -> None:
    unit = MiniatureUnit()
    up = unit.start(unit.driver.bring_up())
    unit.completion()
    assert unit.load(GCMD) == QIE
    assert not up.done


def test_a_unit_that_dies_while_it_is_brought_up_leaves_nobody_waiting() -> None:
    unit = MiniatureUnit()
    up = unit.start(unit.driver.bring_up())
    unit.driver.gone()
    unit.flows.run_ready()
    with pytest.raises(UapiError) as error:
        up.result()
    assert error.value.errno == errno.ENODEV


# -- faults --------------------------------------------------------------------------------------------


def fault(low: int, high: int) -> bytes:
    return low.to_bytes(8, "little") + high.to_bytes(8, "little")


def test_fault_records_are_read_from_the_first_on_and_their_f_cleared() -> None:
    unit = MiniatureUnit()
    for n in (3, 0):  # the ring of records wraps
        unit.record(n, 0x1000 * n, n)
    unit.show(FSTS, PPF | 3 << 8)
    unit.fault_event()
    assert unit.faults == [fault(0x3000, 3 | F), fault(0, F)]
    assert [unit.take_clears(FAULTS_AT + 16 * n + 8, 8) for n in range(FAULTS)] == [F, 0, 0, F]
    assert unit.kicks == 1


def test_a_record_that_was_cleared_and_not_taken_yet_is_not_read_twice() -> None:
    unit = MiniatureUnit()
    unit.record(0, 0x1000, 1)
    unit.show(FSTS, PPF)
    unit.fault_event()
    unit.fault_event()
    assert len(unit.faults) == 1
    unit.take_clears(FAULTS_AT + 8, 8)
    unit.record(0, 0x2000, 2)
    unit.fault_event()
    assert unit.faults == [fault(0x1000, 1 | F), fault(0x2000, 2 | F)]


def test_an_overflow_is_cleared_when_there_is_room() -> None:
    unit = MiniatureUnit()
    for n in range(FAULTS):
        unit.record(n, 0, n)
    unit.show(FSTS, PPF | PFO)
    unit.fault_event()
    assert len(unit.faults) == FAULTS
    assert unit.take_clears(FSTS) == PFO


def test_a_unit_whose_records_all_show_for_ever_is_read_once_an_event() -> None:
    unit = MiniatureUnit()
    unit.show(FSTS, PPF | 0xFF << 8)
    for n in range(FAULTS):
        unit.record(n, 0, n)
    unit.fault_event()
    unit.fault_event()
    assert len(unit.faults) == FAULTS
