"""Registers bit by bit, commands and their errors, portals that are full, and resets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_sim.core.dsa import registers
from tests.kit.accelerator import (
    ABORT_WQ,
    BOF,
    CMD,
    CMDSTS,
    CRAV,
    DISABLE_DEVICE,
    DISABLE_WQ,
    DRAIN_WQ,
    DST,
    ENABLE_DEVICE,
    ENABLE_WQ,
    FILL,
    GRPCFG,
    INTCAUSE,
    NOOP,
    PAGE,
    RCR,
    RESET_DEVICE,
    RESET_WQ,
    WQCFG,
    Accelerator,
    work,
)
from tests.kit.silicon import Silicon


@pytest.fixture
def machine() -> Accelerator:
    return Accelerator()


def fresh() -> Accelerator:
    machine = Accelerator()
    assert machine.command(RESET_DEVICE) == 0
    return machine


def blocked(page: int) -> bytes:
    return work(FILL, BOF, src=1, dst=DST + page * PAGE, size=8)


# -- capabilities --------------------------------------------------------------------------------------


def test_gencap_bit_by_bit(machine: Accelerator) -> None:
    gencap = machine.load(0x10, 8)
    told = {0, 1, 2, 3, 4, 9, 31}  # BOF, overlap, cache control twice, CMDCAP, drain read-back, configurable
    assert gencap == sum(1 << n for n in told) | 21 << 16 | 10 << 21


def test_wqcap_bit_by_bit(machine: Accelerator) -> None:
    assert machine.load(0x20, 8) == 128 | 8 << 16 | 1 << 48 | 1 << 49 | 1 << 52


def test_the_other_capabilities(machine: Accelerator) -> None:
    assert machine.load(0x00) == 0x100
    assert (machine.load(0x30, 8), machine.load(0x38, 8)) == (4, 4)
    assert machine.load(0x60, 16) == 4 | 5 << 16
    assert machine.load(0xB0) == 0b111_1111_1110, "commands 1 to 10"


def test_a_wqcfg_shows_what_was_written_the_occupancy_and_the_state(machine: Accelerator) -> None:
    machine.submit(blocked(0))
    machine.submit(blocked(1))
    dwords = [machine.load(WQCFG + 4 * n) for n in range(8)]
    assert dwords == [16, 16, 0b11, 21 | 10 << 5, 0, 0, 2 | 1 << 30, 0]
    assert machine.load(0x90) == 1


@settings(max_examples=200)
@given(st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=8))
def test_any_store_anywhere_leaves_a_device_that_can_be_reset(offset: int, data: bytes) -> None:
    machine = Accelerator()
    registers.write(machine.dsa, offset, data)
    machine.silicon.flows.run_ready()
    assert len(registers.read(machine.dsa, offset, 256)) == 256
    assert machine.command(RESET_DEVICE) == 0
    assert machine.load(WQCFG, 8) == machine.load(GRPCFG, 8) == 0


# -- commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queues", "engines", "sizes", "error"),
    [
        ((1, 0), (0b11, 0), (16, 0), 0),
        ((1, 2), (1, 2), (64, 64), 0),
        ((1, 2), (1, 2), (64, 65), 0x14),
        ((1, 0), (0, 0), (16, 0), 0x15),
        ((1, 0), (1, 2), (16, 0), 0x15),
        ((1, 0), (0, 1), (16, 0), 0x15),
        ((3, 2), (1, 2), (16, 16), 0x16),
        ((1, 0), (1, 0), (16, 16), 0x16),
        ((3, 0), (1, 0), (16, 0), 0x16),
        ((1 | 1 << 8, 0), (1, 0), (16, 0), 0x16),
        ((1, 2), (3, 2), (16, 16), 0x17),
        ((1, 0), (1 | 1 << 4, 0), (16, 0), 0x17),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_when_the_device_is_enabled(
    queues: tuple[int, int], engines: tuple[int, int], sizes: tuple[int, int], error: int
) -> None:
    machine = fresh()
    for n in (0, 1):
        machine.configure(n, sizes[n])
        machine.group(n, queues=queues[n], engines=engines[n])
    assert machine.command(ENABLE_DEVICE) == error
    assert machine.load(0x90) == (0 if error else 1)


def test_a_device_without_bus_mastering_cannot_be_enabled() -> None:
    machine = fresh()
    machine.silicon.function.configure(ats=True, bus_master=False)
    assert machine.command(ENABLE_DEVICE) == 0x12


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"size": 8, "dedicated": False, "threshold": 9}, 0x22),
        ({"size": 8, "dedicated": False, "threshold": 8}, 0),
        ({"size": 8, "pasid_enable": True}, 0x26),
        ({"size": 8, "max_batch": 0}, 0x27),
        ({"size": 8, "max_batch": 1}, 0),
        ({"size": 8, "max_batch": 11}, 0x27),
        ({"size": 8, "max_xfer": 22}, 0x28),
    ],
)
def test_a_queue_that_cannot_be_is_refused_when_it_is_enabled(config: dict[str, int], error: int) -> None:
    machine = fresh()
    machine.configure(0, **config)  # type: ignore[arg-type]
    machine.group(0, queues=1, engines=1)
    assert machine.command(ENABLE_DEVICE) == 0
    assert machine.command(ENABLE_WQ, 0) == error


def test_a_queue_without_a_size_is_refused_when_it_is_enabled() -> None:
    machine = fresh()
    machine.configure(1, 8)
    machine.group(0, queues=2, engines=1)
    assert machine.command(ENABLE_DEVICE) == 0
    assert machine.command(ENABLE_WQ, 0) == 0x22


@pytest.mark.parametrize(
    ("command", "operand", "error"),
    [
        (0, 0, 1),
        (11, 0, 1),
        (13, 1, 1),
        (31, 0, 1),
        (ENABLE_DEVICE, 0, 0x10),
        (ENABLE_WQ, 0, 0x21),
        (ENABLE_WQ, 1, 0x22),
        (ENABLE_WQ, 8, 2),
        (DISABLE_WQ, 0, 2),
        (DRAIN_WQ, 1 << 8, 2),
        (ABORT_WQ, 1 << 16 | 1, 2),
        (RESET_WQ, 0b10, 0x32),
        (RESET_WQ, 0b1, 0),
    ],
)
def test_a_command_says_what_is_wrong(machine: Accelerator, command: int, operand: int, error: int) -> None:
    assert machine.command(command, operand) == error


def test_a_disabled_device_knows_no_queues() -> None:
    machine = fresh()
    assert machine.command(ENABLE_WQ, 0) == 0x20
    assert machine.command(DISABLE_WQ, 1) == 0x32
    assert machine.command(DISABLE_DEVICE) == 0x31


def test_a_command_while_another_is_active_is_a_software_error_and_no_more(machine: Accelerator) -> None:
    machine.submit(blocked(0))
    assert machine.command(DRAIN_WQ, 1, interrupt=True) == -1
    assert machine.command(RESET_DEVICE) == -1
    assert machine.load(0x90) == 1, "no reset"
    assert machine.software_error == bytes([0b0001, 0x52]) + bytes(30), "no descriptor, and no queue"
    machine.map(DST, 20)
    machine.silicon.serve()
    assert (machine.load(CMDSTS), machine.interrupts, machine.load(INTCAUSE)) == (0, [0], 2)
    assert machine.command(DRAIN_WQ, 1) == 0
    assert machine.counters.software_errors == 1


def test_disabling_the_device_waits_and_closes_every_queue(machine: Accelerator) -> None:
    machine.submit(blocked(0))
    assert machine.command(DISABLE_DEVICE) == -1
    assert (machine.load(0x90), machine.load(WQCFG + 24) >> 30) == (2, 2)
    machine.submit(work(NOOP, CRAV | RCR))
    machine.map(DST, 20)
    machine.silicon.serve()
    assert (machine.load(0x90), machine.load(WQCFG + 24) >> 30, machine.load(CMDSTS)) == (0, 0, 0)
    assert machine.load(WQCFG) == 16, "the configuration stays"


def test_configuration_is_locked_while_it_is_in_use(machine: Accelerator) -> None:
    machine.store(WQCFG, 99)
    machine.store(WQCFG + 8, 0)
    machine.group(0, queues=3, engines=1)
    assert (machine.load(WQCFG), machine.load(WQCFG + 8), machine.load(GRPCFG)) == (16, 3, 1)
    assert machine.command(DISABLE_WQ, 1) == 0
    machine.store(WQCFG, 99)
    machine.store(WQCFG + 8, 1)
    assert (machine.load(WQCFG), machine.load(WQCFG + 8)) == (16, 1), "only the size waits for the device"


def test_a_reset_queue_has_its_size_and_nothing_else(machine: Accelerator) -> None:
    assert machine.command(RESET_WQ, 1) == 0
    assert [machine.load(WQCFG + 4 * n) for n in range(4)] == [16, 0, 0, 0]


# -- portals -------------------------------------------------------------------------------------------


def test_a_full_dedicated_queue_drops_and_says_that_it_is_full() -> None:
    machine = Accelerator(size=6)
    for n in range(7):
        machine.submit(blocked(n))
    assert machine.load(WQCFG + 24) & 0xFFFF == 6
    assert machine.software_error == bytes([0b1001, 0x53, 0]) + bytes(29)
    (first, *_) = machine.silicon.requests()
    machine.map(first.page << 12, 20)
    machine.silicon.respond(first.prgi)
    machine.submit(blocked(8))
    assert machine.counters.software_errors == 1


@pytest.mark.parametrize(("limited", "room"), [(True, 3), (False, 6)])
def test_a_full_shared_queue_says_retry_by_the_threshold_or_by_its_size(limited: bool, room: int) -> None:
    machine = Accelerator(size=6, dedicated=False, threshold=3)
    retries = [machine.enqcmd(blocked(n), limited=limited) for n in range(8)]
    assert retries == [n >= room for n in range(8)]
    assert machine.counters.software_errors == 0


def test_a_retry_succeeds_when_a_descriptor_is_done() -> None:
    machine = Accelerator(size=1, dedicated=False)
    assert not machine.enqcmd(blocked(0))
    assert machine.enqcmd(work(NOOP, CRAV | RCR))
    machine.map(DST, 20)
    machine.silicon.serve()
    assert not machine.enqcmd(work(NOOP, CRAV | RCR))
    assert machine.record().status == 1


@pytest.mark.parametrize(("wq", "dedicated"), [(0, False), (1, True), (200, True)])
def test_a_posted_write_no_queue_takes_is_discarded_and_not_told_of(wq: int, dedicated: bool) -> None:
    """The one to a shared queue, the others to one that is not enabled and to none at all."""
    machine = Accelerator(dedicated=dedicated)
    machine.submit(work(NOOP, CRAV | RCR), wq=wq)
    assert (machine.software_error, machine.counters.software_errors) == (bytes(32), 0)
    assert (machine.raw_record(), machine.counters.descriptors) == (bytes(32), 0)


@pytest.mark.parametrize("wq", [0, 1, 200])
def test_an_enqcmd_nobody_takes_is_a_retry(machine: Accelerator, wq: int) -> None:
    """Queue 0 is dedicated."""
    assert machine.enqcmd(work(NOOP, CRAV | RCR), wq)
    assert machine.counters.software_errors == 0


def test_a_reset_makes_the_device_as_it_was(machine: Accelerator) -> None:
    machine.store(0x88, 1)
    machine.submit(work(0x7F, 0))
    machine.store(CMD, RESET_DEVICE << 20)
    untouched = Accelerator.__new__(Accelerator)
    untouched.silicon = Silicon()
    expected = registers.read(type(machine.dsa)(untouched.silicon.function, print, print), 0, 0x700)
    assert registers.read(machine.dsa, 0, 0x700) == expected


def test_a_read_of_any_place_and_size_is_part_of_one_of_all(machine: Accelerator) -> None:
    machine.submit(work(0x7F, 0))
    whole = registers.read(machine.dsa, 0, registers.BAR_BYTES)
    assert any(whole[0x400:0x500]), "a group is set up"
    assert any(whole[0x500:0x600]), "and its queue"
    for size in (1, 4, 8, 0x101):
        for offset in range(0, registers.BAR_BYTES - size, 4 if size < 9 else 1):
            assert registers.read(machine.dsa, offset, size) == whole[offset : offset + size], hex(offset)
