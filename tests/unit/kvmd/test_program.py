"""Programmed programs: what each instruction does, where a program stops, and how it goes on."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmd.core.cpu.program import Instruction
from kvmd.core.cpu.vcpu import RunResult
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.reclaim import migrate
from kvmd.core.slots.dirty_log import DirtyLog
from protocol.kvm_run import ExitReason
from protocol.units import Hva
from tests.kit.lent import Backed

RAM, PAGE = 0x10_0000, 4096
PRIVILEGES = pytest.mark.parametrize("cpl", [3, 0])


class Programmed(Backed):
    """A CPU with some RAM; what it runs for ever ends when `tick` says so."""

    def __init__(self, pages: int = 16) -> None:
        super().__init__(RAM >> 12, pages)
        self.clock = self.bare.clock

    def play(self, code: list[Instruction] | None, cpl: int = 3, **more: Any) -> RunResult:
        return self.run(self.vcpu.run(code, cpl, **more))

    def byte(self, at: int, value: int) -> None:
        self.run(self.mm.write(Hva(self.hva + at), bytes([value])))

    def tick(self) -> None:
        waiting, self.clock.waiting = self.clock.waiting, []
        for wait in waiting:
            wait.set(None)
        self.flows.run_ready()


@pytest.fixture
def guest() -> Programmed:
    return Programmed()


@PRIVILEGES
@pytest.mark.parametrize(
    ("code", "before", "after"),
    [
        (("cmpxchg", RAM, 4, 5, 9), 5, 9),
        (("cmpxchg", RAM, 4, 6, 9), 5, 5),
        (("xchg", RAM, b"\7\0"), 5, 7),
        (("add", RAM, 1, 255), 5, 4),
        (("add", RAM, 2, 255), 5, 260),
        (("or", RAM, 8, 0x8A), 5, 0x8F),
    ],
)
def test_a_read_modify_write_stores_the_result(
    guest: Programmed, cpl: int, code: Instruction, before: int, after: int
) -> None:
    guest.run(guest.mm.write(guest.hva, before.to_bytes(8, "little")))
    assert guest.play([code, ("r", RAM, 8)], cpl).reads == [after.to_bytes(8, "little")]


def test_a_failed_compare_is_a_write_cycle(guest: Programmed) -> None:
    """Its page is mapped as for a store, so it is logged as one."""
    logged = []
    guest.vm.dirty_log.mark = lambda slot, gfn, *who: logged.append(gfn)  # type: ignore[method-assign]
    guest.play([("cmpxchg", RAM, 4, 6, 9)], 0)
    assert logged == [RAM >> 12]
    violations = guest.vcpu.arch.ept_violations
    guest.play([("cmpxchg", RAM, 4, 6, 9), ("w", RAM, b"x")])
    assert guest.vcpu.arch.ept_violations == violations + 1


@PRIVILEGES
@pytest.mark.parametrize("distance", [-3, 1, 3, 4096, 5000])
def test_a_string_move_meets_its_own_result_as_byte_by_byte_would(
    guest: Programmed, cpl: int, distance: int
) -> None:
    pattern = bytes(i * 7 % 251 for i in range(9000))
    guest.run(guest.mm.write(Hva(guest.hva + 8192), pattern))
    expected = bytearray(guest.ram(0, 16 * PAGE))
    for i in range(9000):
        expected[8192 + distance + i] = expected[8192 + i]
    guest.play([("movs", RAM + 8192 + distance, RAM + 8192, 9000)], cpl)
    assert guest.ram(0, 16 * PAGE) == expected


def test_an_overlap_is_seen_through_two_slots_of_one_page(guest: Programmed) -> None:
    guest.set_slot(1, 0x900, 16, guest.hva)
    guest.run(guest.mm.write(guest.hva, b"ab"))
    guest.play([("movs", 0x90_0001, RAM, 64)])
    assert guest.ram(0, 65) == b"a" * 65


@PRIVILEGES
def test_loops_touch_each_word_and_leave_no_reads(guest: Programmed, cpl: int) -> None:
    ran = guest.play([("wloop", RAM, 16, PAGE, 0x0102), ("rloop", RAM, 16, PAGE)], cpl)
    assert (ran.done, ran.finished, ran.reads) == (True, 2, [])
    assert all(guest.ram(i * PAGE, 8) == b"\2\1" + bytes(6) for i in range(16))


def test_a_prefetch_never_faults(guest: Programmed) -> None:
    assert guest.play([("prefetch", RAM), ("prefetch", 0x666_0000), ("prefetch", (1 << 64) - 1)]).done
    assert guest.vcpu.arch.ept_violations == 0
    assert guest.table() == {}


def test_a_fetch_is_a_read_fault_like_any_other(guest: Programmed) -> None:
    guest.byte(0, 0xC3)
    assert guest.play([("exec", RAM)]).done
    assert guest.vcpu.arch.ept_violations == 1
    assert guest.table()[RAM >> 12][1], "writable, because the host's page is"


def test_string_stores_fill_and_bulk_accesses_cross_pages(guest: Programmed) -> None:
    ran = guest.play([("stos", RAM + 100, 0x5A, 5 * PAGE), ("r", RAM, 6 * PAGE)])
    assert ran.reads == [bytes(100) + b"\x5a" * 5 * PAGE + bytes(PAGE - 100)]


# -- stops ---------------------------------------------------------------------------------------------


def test_a_store_across_into_nothing_happens_not_at_all_and_restarts_as_a_whole(guest: Programmed) -> None:
    """EFAULT, and the page before the edge keeps its bytes, though an entry was made for it."""
    guest.run(guest.mm.munmap(Hva(guest.hva + PAGE), PAGE))
    ran = guest.play([("w", RAM + PAGE - 4, b"12345678"), ("r", RAM + PAGE - 4, 8)])
    assert (ran.exit.reason, ran.exit.errno, ran.finished) == (ExitReason.UNKNOWN, errno.EFAULT, 0)
    assert guest.ram(PAGE - 4, 4) == bytes(4)
    assert guest.table()[RAM >> 12][1]
    for _ in range(100):  # however often it is run again
        assert guest.play(None).exit.errno == errno.EFAULT
    guest.map(1, hva=guest.hva + PAGE)
    ran = guest.play(None)
    assert (ran.done, ran.finished, ran.reads) == (True, 2, [b"12345678"])


def test_the_end_of_a_program_is_an_out_and_stays_the_end(guest: Programmed) -> None:
    assert guest.play([("r", RAM, 1)]).exit.reason is ExitReason.IO
    ran = guest.play(None)
    assert (ran.exit.reason, ran.done, ran.reads) == (ExitReason.IO, True, [bytes(1)])
    assert Programmed().play(None).done, "a vCPU that never ran has nothing to do"


def test_a_new_program_takes_the_place_of_a_stopped_one(guest: Programmed) -> None:
    assert not guest.play([("w", 0x666_0000, b"x"), ("w", RAM, b"never")]).done
    assert guest.play([("r", RAM, 5)]).reads == [bytes(5)]
    assert guest.play(None).done


def test_a_full_dirty_ring_is_seen_before_the_store_that_filled_it(
    guest: Programmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As recorded: the page is logged, the store is not made, and is tried again after the harvest."""
    monkeypatch.setattr(DirtyLog, "ring_full", lambda *_: bool(guest.vm.mmu.roots) and 0x105 in guest.table())
    ran = guest.play([("wloop", RAM, 16, PAGE, 1)])
    assert (ran.exit.reason, ran.done) == (ExitReason.DIRTY_RING_FULL, False)
    assert guest.ram(4 * PAGE, 1) == b"\1"
    assert guest.ram(5 * PAGE, 1) == b"\0"
    assert guest.play(None).exit.reason is ExitReason.DIRTY_RING_FULL, "nobody harvested it"
    monkeypatch.setattr(DirtyLog, "ring_full", lambda log, vcpu_id: False)
    assert guest.play(None).done
    assert guest.ram(15 * PAGE, 1) == b"\1"


# -- polling -------------------------------------------------------------------------------------------


def test_a_guest_that_polls_sees_what_the_host_does_meanwhile(guest: Programmed) -> None:
    guest.clock.stock = 0
    guest.byte(0, 1)
    guest.byte(PAGE, 7)
    run = guest.start(guest.vcpu.run([("spin_until_zero", RAM), ("spin_until_ne", RAM + PAGE, 7)]))
    guest.tick()
    assert not run.done
    guest.run(dontneed(guest.mm, guest.hva, PAGE))
    guest.tick()
    assert not run.done, "it polls the second word, which is 7"
    guest.byte(PAGE, 8)
    guest.tick()
    assert run.result().done


def test_what_a_polling_guest_loses_is_efault_and_what_it_keeps_is_not(guest: Programmed) -> None:
    guest.clock.stock = 0
    run = guest.start(guest.vcpu.run([("spin_until_ne", RAM, 0)]))
    guest.run(migrate(guest.mm, guest.hva, PAGE))
    guest.tick()
    assert not run.done
    guest.run(guest.mm.munmap(guest.hva, PAGE))
    guest.tick()
    assert run.result().exit.errno == errno.EFAULT
    guest.map(1, hva=guest.hva)
    guest.byte(0, 1)
    assert guest.play(None).done


def test_a_signal_ends_a_poll_and_the_next_run_goes_on_with_it(guest: Programmed) -> None:
    guest.clock.stock = 0
    run = guest.start(guest.vcpu.run([("spin_until_ne", RAM, 0)]))
    guest.vcpu.arch.kick()
    guest.tick()
    assert (run.result().exit.reason, run.result().exit.errno) == (ExitReason.INTR, errno.EINTR)
    guest.byte(0, 1)
    assert guest.play(None).done


def test_a_long_loop_gives_others_a_turn() -> None:
    guest = Programmed(pages=1)
    guest.clock.stock = 0
    run = guest.start(guest.vcpu.run([("rloop", RAM, 2000, 0)]))
    turns = 0
    while not run.done:
        guest.tick()
        turns += 1
    assert turns == 3


# -- system-management mode ----------------------------------------------------------------------------


@pytest.mark.rfc("RFC-96")
def test_smm_has_slots_and_a_root_of_its_own(guest: Programmed) -> None:
    world = guest
    smram = world.map(4)
    world.set_slot(1 << 16 | 5, RAM >> 12, 4, smram)
    guest.play([("w", RAM, b"normal")])
    guest.play([("w", RAM, b"secret")], smm=True)
    assert (guest.ram(0, 6), world.run(world.mm.read(smram, 6))) == (b"normal", b"secret")
    assert guest.play([("r", RAM, 6)]).reads == [b"normal"]
    assert guest.play([("r", RAM, 6)], 0, smm=True).reads == [b"secret"], "the emulator's too"
    normal, smm = guest.vcpu.arch.roots
    assert normal is not None
    assert smm is not None
    assert (normal.role.as_id, smm.role.as_id) == (0, 1)
    outside = guest.play([("r", RAM + 4 * PAGE, 1)], smm=True)
    assert outside.exit.reason is ExitReason.MMIO, "no slot of address space 1: no RAM there"
