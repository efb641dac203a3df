"""Registers that two processes share: toggles, events, masks, and pages full of whatever a driver likes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest

from device_sim.core.dmar import RequestRefused
from device_sim.core.pri import PageAccess
from device_sim.core.traits import capabilities
from device_sim.core.unit_registers import Events, RegisterPages, RegisterSet
from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import Reg, Register
from protocol.units import IovaPfn
from tests.kit.raw_driver import (
    FAULTS,
    FAULTS_AT,
    FECTL,
    FSTS,
    GCMD,
    GSTS,
    IECTL,
    IM,
    IP,
    PECTL,
    PFO,
    PPF,
    PPR,
    PRO,
    PRS,
    QIE,
    SRTP,
    TE,
    RawDriver,
)
from tests.kit.silicon import FRAMES, RID, Silicon, fault_record

SPT_2 = 0x59


class Shared:
    """The three pages, and what happened in which order."""

    def __init__(self) -> None:
        self.shown, self.taken, self.stored = (bytearray(4096) for _ in range(3))
        self.log: list[str] = []
        self.on_fence: Callable[[], None] = lambda: None
        self.registers = RegisterSet(*capabilities(), self._fence)
        pages = RegisterPages(
            *(RegisterPage(memoryview(page)) for page in (self.shown, self.taken, self.stored))
        )
        self.registers.connect(pages, Events(*(self._says(what) for what in ("fault", "request", "done"))))
        self.store(PECTL, 0)
        self.registers.latch_controls()

    def _fence(self) -> None:
        self.log.append("fence")
        self.on_fence()

    def _says(self, what: str) -> Callable[[], None]:
        return lambda: self.log.append(what)

    def store(self, offset: int, value: int) -> None:
        self.stored[offset : offset + 4] = value.to_bytes(4, "little")

    def flip(self, offset: int, bits: int) -> None:
        self.store(offset, int.from_bytes(self.stored[offset : offset + 4], "little") ^ bits)

    def shows(self, offset: int) -> int:
        return int.from_bytes(self.shown[offset : offset + 4], "little")


def test_a_register_page_shows_what_the_unit_is_and_masks_every_event() -> None:
    silicon = Silicon()
    driver = RawDriver(silicon.unit, silicon.memory, up=False, number=1)
    cap, ecap = silicon.unit.cap, silicon.unit.ecap
    assert (driver.load(0x0), driver.load(0x8, 8), driver.load(0x10, 8)) == (0x10, cap.value, ecap.value)
    assert [driver.load(control) for control in (FECTL, PECTL, IECTL)] == [IM] * 3
    assert cap.value >> 24 & 0x3FF == FAULTS_AT // 16
    assert cap.value >> 40 & 0xFF == FAULTS - 1
    assert capabilities()[0].value >> 63 == 1, "ESRTPS: a root table that is set drops every cache"


def test_every_toggle_clears_once_whatever_the_driver_does_between_two_looks() -> None:
    shared = Shared()
    for turn in range(6):
        shared.registers.raise_status(Reg.PRS, PPR)
        assert shared.shows(PRS) == PPR
        shared.flip(PRS, PPR)
        assert shared.registers.take_clears(Reg.PRS) == PPR
        assert shared.registers.take_clears(Reg.PRS) == 0
        assert (shared.shows(PRS), shared.taken[PRS], shared.log.count("request")) == (
            0,
            (turn + 1) % 2,
            turn + 1,
        )


def test_of_two_bits_only_the_one_that_was_flipped_goes() -> None:
    shared = Shared()
    shared.registers.raise_status(Reg.PRS, PPR | PRO)
    shared.flip(PRS, PRO)
    assert shared.registers.take_clears(Reg.PRS) == PRO
    assert shared.shows(PRS) == PPR


def test_a_flip_of_what_software_does_not_clear_is_nothing() -> None:
    shared = Shared()
    shared.registers.raise_status(Reg.FSTS, PPF)
    shared.flip(FSTS, PPF | 0xFF00)
    assert shared.registers.take_clears(Reg.FSTS) == 0
    assert shared.shows(FSTS) == PPF


def test_a_clear_that_is_made_while_the_unit_raises_is_seen_behind_the_fence() -> None:
    """The driver clears and looks; the unit stores, fences, and takes clears: one of them sees the other."""
    shared = Shared()
    shared.registers.raise_status(Reg.PRS, PPR)
    shared.on_fence = lambda: shared.flip(PRS, PPR)
    shared.log.clear()
    shared.registers.raise_status(Reg.PRS, PPR)
    assert shared.log == ["fence", "request"]
    assert shared.shows(PRS) == PPR


def test_what_was_taken_is_shown_as_taken_after_the_bit_is_gone() -> None:
    """A driver that reads in between must not believe that a bit of a new event shows."""
    shared = Shared()
    order: list[str] = []
    registers = shared.registers
    registers.raise_status(Reg.PRS, PPR)
    shared.flip(PRS, PPR)

    class Watched(RegisterPage):
        def __init__(self, name: str, page: bytearray) -> None:
            super().__init__(memoryview(page))
            self.name = name

        def store(self, register: Register, value: int) -> None:
            order.append(self.name)
            super().store(register, value)

    registers._shown, registers._taken = Watched("shown", shared.shown), Watched("taken", shared.taken)
    registers.take_clears(Reg.PRS)
    assert order[:2] == ["shown", "taken"]


# -- commands ------------------------------------------------------------------------------------------


def test_a_command_that_took_effect_shows_in_gsts_and_raises_the_completion_event() -> None:
    silicon = Silicon()
    driver = RawDriver(silicon.unit, silicon.memory, up=False, number=1)
    driver.store(IECTL, 0)
    silicon.unit.reset()
    driver.connect()
    for n, (command, status) in enumerate(
        ((QIE, QIE), (QIE | SRTP, QIE | SRTP), (QIE | TE, QIE | SRTP | TE), (QIE, QIE | SRTP), (0, SRTP)), 1
    ):
        driver.store(GCMD, command)
        silicon.unit.kick()
        assert (driver.load(GSTS), driver.completions) == (status, n)
        silicon.unit.kick()
        assert driver.completions == n, "nothing changed"


# -- fault recording -----------------------------------------------------------------------------------


@pytest.fixture
def silicon() -> Silicon:
    return Silicon()


def fault(silicon: Silicon, page: int) -> None:
    with pytest.raises(RequestRefused):
        silicon.unit.translation_request(RID, IovaPfn(page), 1)


def recorded(silicon: Silicon) -> list[int]:
    """The pages in the registers with F, by index."""
    shown = silicon.driver.shown[FAULTS_AT : FAULTS_AT + 16 * FAULTS]
    records = [fault_record(bytes(shown[at : at + 16])) for at in range(0, len(shown), 16)]
    return [record.page for record in records if record.f]


def test_faults_are_recorded_in_turn_and_one_event_tells_of_them(silicon: Silicon) -> None:
    for page in (5, 6, 7):
        fault(silicon, page)
    assert recorded(silicon) == [5, 6, 7]
    assert (silicon.driver.load(FSTS), silicon.driver.fault_events) == (PPF, 1)


def test_fri_names_the_oldest_and_moves_on_with_what_was_cleared(silicon: Silicon) -> None:
    for page in (5, 6, 7):
        fault(silicon, page)
    silicon.driver.stored[FAULTS_AT + 15] ^= 0x80
    silicon.unit.kick()
    assert silicon.driver.load(FSTS) == PPF | 1 << 8
    assert silicon.driver.fault_events == 2, "what is left is told again"
    assert [fault_record(raw).page for raw in silicon.driver.take_faults()] == [6, 7]
    assert silicon.driver.load(FSTS) & PPF == 0


def test_records_wrap_at_their_end(silicon: Silicon) -> None:
    for start in range(0, 3 * FAULTS, 24):
        for page in range(start, start + 24):
            fault(silicon, page)
        taken = [fault_record(raw).page for raw in silicon.driver.take_faults()]
        assert taken == list(range(start, start + 24))
    assert silicon.unit.faults.lost == 0


def test_after_an_overflow_nothing_is_recorded_until_software_has_cleared_it(silicon: Silicon) -> None:
    for page in range(FAULTS + 1):
        fault(silicon, page)
    assert silicon.driver.load(FSTS) & (PFO | PPF) == PFO | PPF
    for n in range(FAULTS):
        silicon.driver.stored[FAULTS_AT + 16 * n + 15] ^= 0x80
    silicon.unit.kick()
    fault(silicon, 1000)
    assert (recorded(silicon), silicon.unit.faults.lost) == ([], 2)
    silicon.driver.clear(FSTS, PFO)
    silicon.unit.kick()
    fault(silicon, 1001)
    assert recorded(silicon) == [1001]


def test_a_record_is_whole_when_its_f_shows(silicon: Silicon) -> None:
    """Its other half is stored first."""
    stores: list[int] = []

    class Watched(RegisterPage):
        __slots__ = ()

        def store64(self, offset: int, value: int) -> None:
            stores.append(offset)
            super().store64(offset, value)

    silicon.unit.registers._shown = Watched(memoryview(silicon.driver.shown))
    fault(silicon, 5)
    assert stores == [FAULTS_AT, FAULTS_AT + 8]


def test_im_of_fectl_holds_the_fault_event_back(silicon: Silicon) -> None:
    silicon.driver.store(FECTL, IM)
    silicon.unit.kick()
    fault(silicon, 5)
    assert (silicon.driver.fault_events, silicon.driver.load(FECTL)) == (0, IM | IP)
    silicon.driver.store(FECTL, 0)
    silicon.unit.kick()
    assert (silicon.driver.fault_events, silicon.driver.load(FECTL)) == (1, 0)


def test_a_fault_event_that_is_held_back_goes_with_what_it_tells_of(silicon: Silicon) -> None:
    silicon.driver.store(FECTL, IM)
    silicon.unit.kick()
    for page in (5, 6):
        fault(silicon, page)
    silicon.driver.stored[FAULTS_AT + 15] ^= 0x80
    silicon.unit.kick()
    assert silicon.driver.load(FECTL) == IM | IP, "one is left"
    silicon.driver.take_faults()
    assert (silicon.driver.load(FSTS) & PPF, silicon.driver.load(FECTL)) == (0, IM)
    silicon.driver.store(FECTL, 0)
    silicon.unit.kick()
    assert silicon.driver.fault_events == 0


# -- pages full of anything ----------------------------------------------------------------------------

WORDS = (0, 1, 32, 4095, 4096, 1 << 11, 1 << 26, 1 << 31, FRAMES, 0x4100_0000, 0x5000_0000, (1 << 64) - 1)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_driver_stores_the_unit_stores_in_its_own_pages_and_the_queues_only(seed: int) -> None:
    """And never fails: every word is bounded where it is used."""
    random = Random(seed)
    silicon = Silicon()
    silicon.attach()
    silicon.map(7, 1)
    driver = silicon.driver
    theirs = [silicon.frames, silicon.tables.memory]
    before = [bytes(memory) for memory in theirs]
    registers = (0x18, 0x20, 0x34, 0x38, 0x80, 0x88, 0x90, 0x9C, 0xA0, 0xC0, 0xC8, 0xD0, 0xDC, 0xE0)
    for _, offset in itertools.product(range(30), (0, 0x2000, 0x3000, 0x4000, 0x5000)):
        for _ in range(3):
            at = random.choice(registers)
            value = random.choice(WORDS) | random.choice((0, random.choice(WORDS), random.getrandbits(64)))
            driver.stored[at : at + 8] = (value & (1 << 64) - 1).to_bytes(8, "little")
        place = offset + 8 * random.randrange(512)
        driver.structures[place : place + 8] = random.getrandbits(64).to_bytes(8, "little")
        stored, structures = bytes(driver.stored), bytes(driver.structures)
        silicon.unit.kick()
        with suppress(RequestRefused):
            silicon.unit.translation_request(RID, IovaPfn(random.choice((7, 8, 1 << 36))), 1)
        silicon.start(silicon.function.pri.request([PageAccess(IovaPfn(random.randrange(9)), True)]))
        assert (bytes(driver.stored), bytes(driver.structures)) == (stored, structures)
    assert [bytes(memory) for memory in theirs] == before
    silicon.unit.reset()
    driver.come_back()
    silicon.attach()
    assert silicon.translate(7)[0] == FRAMES + 0x1000, "the next driver finds a unit as it was made"
