"""What is told in a record, what in the software error register, and what in both [DSA 5.8.1, table 5-6]."""

from __future__ import annotations

import struct

import pytest

from tests.kit.accelerator import (
    ABORT_ALL,
    BATCH,
    BOF,
    COMPVAL,
    CR,
    CRAV,
    DST,
    FILL,
    MEMMOVE,
    NOOP,
    RCR,
    RECORD,
    SRC,
    Accelerator,
    Record,
    work,
)
from tests.kit.silicon import FRAMES, R


@pytest.fixture
def machine() -> Accelerator:
    return Accelerator()


@pytest.mark.parametrize("asked", [False, True])
def test_what_did_not_fail_is_recorded_if_that_was_asked_for(machine: Accelerator, asked: bool) -> None:
    """A batch one of whose descriptors failed, status 5, did not; and nothing of it is a software error."""
    machine.map(SRC, 10)
    machine.map(DST, 20)
    failing = work(0x7F, CRAV, record=RECORD + 32)
    machine.silicon.fill_frame(10, failing * 2)
    flags = CRAV | (RCR if asked else 0)
    machine.submit(work(BATCH, flags, src=SRC, size=2))
    machine.submit(work(BATCH, 0, src=SRC, size=2))
    machine.submit(work(FILL, 0, src=1, dst=DST, size=8))
    assert machine.record() == (Record(5, False, 2, 0) if asked else Record(0, False, 0, 0))
    assert machine.statuses == {5: 2, 1: 1, 0x10: 4}
    assert machine.counters.software_errors == 0
    machine.submit(work(FILL, flags, src=1, dst=DST, size=8, record=RECORD + 64))
    assert machine.record(2).status == (1 if asked else 0)


def test_an_unexpected_result_is_no_failure(machine: Accelerator) -> None:
    """It is recorded, which a comparison must ask for, and is no software error."""
    machine.map(SRC, 10)
    machine.submit(work(COMPVAL, CRAV | RCR | CR, src=SRC, dst=1, size=8))
    assert machine.record().status == 2
    assert machine.counters.software_errors == 0


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (work(FILL, 0, dst=DST, size=8), 3),
        (work(0x7F, 0), 0x10),
        (work(NOOP, BOF), 0x11),
        (work(NOOP, 0, record=RECORD), 0x12),
        (work(FILL, 0, dst=DST, size=0), 0x13),
        (work(BATCH, 0, src=SRC, size=1), 0x14),
        (work(BATCH, 0, src=SRC + 8, size=2), 0x18),
    ],
)
def test_what_failed_without_a_record_address_is_a_software_error_with_that_status(
    machine: Accelerator, raw: bytes, status: int
) -> None:
    machine.submit(raw)
    assert (machine.software_error[0] & 1, machine.software_error[1]) == (1, status)
    assert (machine.counters.software_errors, machine.raw_record()) == (1, bytes(32))


# -- translations that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_response_failure_is_a_failed_translation_and_a_software_error_too(
    machine: Accelerator, write: bool, recorded: bool
) -> None:
    machine.map(SRC if write else DST, 10)
    flags = CRAV | RCR if recorded else 0
    machine.submit(work(MEMMOVE, flags | BOF, src=SRC + 8, dst=DST + 8, size=8))
    machine.silicon.serve(0xF)
    absent = DST if write else SRC
    assert machine.record() == (Record(0x22, write, 0, absent) if recorded else Record(0, False, 0, 0))
    expected = struct.pack("<BBBBB11xQ8x", 0b0010_1101 if write else 0b1101, 0x22, 0, 0, MEMMOVE, absent)
    assert machine.software_error[0] & 2 == 0, "told once"
    assert machine.software_error == expected
    assert machine.counters.software_errors == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_a_translation_request_that_is_refused_is_a_failed_translation(
    machine: Accelerator, recorded: bool
) -> None:
    """A reserved bit in the leaf: the unit answers Unsupported Request, and no page is asked for."""
    machine.silicon.tables.store(machine.silicon.tables.entry_at(DST >> 12), FRAMES | R | 1 << 62)
    machine.submit(work(FILL, (CRAV | RCR if recorded else 0) | BOF, src=1, dst=DST, size=8))
    assert machine.silicon.requests() == []
    assert machine.record() == (Record(0x22, True, 0, DST) if recorded else Record(0, False, 0, 0))
    assert (machine.software_error[1], machine.counters.software_errors) == (0x22, 1)


def test_an_invalid_request_and_one_in_vain_are_no_software_errors(machine: Accelerator) -> None:
    for code in (1, 0):
        machine.submit(work(FILL, CRAV | RCR | BOF, src=1, dst=DST, size=8))
        while machine.silicon.serve(code):
            pass
        assert machine.record() == Record(4, True, 0, DST)
    assert machine.counters.software_errors == 0


def test_an_aborted_descriptor_tells_of_no_failed_translation(machine: Accelerator) -> None:
    machine.submit(work(FILL, BOF, src=1, dst=DST, size=8))
    assert machine.command(ABORT_ALL) == -1
    machine.silicon.serve(0xF)
    assert (machine.statuses, machine.counters.software_errors) == ({}, 0)
