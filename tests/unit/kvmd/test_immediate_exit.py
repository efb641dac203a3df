"""kvm_run.immediate_exit: what user space was asked for is completed, and the guest does not run.

[KVM x86.c, kvm_arch_vcpu_ioctl_run]: complete_userspace_io comes first, and may leave with another exit; then
EINTR, with kvm_run.exit_reason as the last exit left it.
"""

from __future__ import annotations

import errno

import pytest

from kvmd.core.capability import check_extension
from kvmd.core.cpu.exits import Mmio
from kvmd.core.cpu.program import Instruction
from kvmd.core.cpu.vcpu import RunResult
from protocol.kvm_run import ExitReason
from protocol.units import Gpa
from tests.kit.kvmd import World
from tests.kit.lent import Backed

RAM, HOLE, UNBACKED = 0x1000_0000, 0x2000_0000, 0x3000_0000
PRIVILEGES = pytest.mark.parametrize("cpl", [0, 3])


class Interrupted(Backed):
    """RAM, and a slot whose memory is not there."""

    def __init__(self) -> None:
        super().__init__(RAM >> 12, 16, slot=1)
        self.set_slot(2, UNBACKED >> 12, 16, 0x7000_0000)

    def enter(
        self, code: list[Instruction] | None, cpl: int = 3, *, stay: bool = False, reply: bytes = b""
    ) -> RunResult:
        return self.run(self.vcpu.run(code, cpl, mmio_data=reply, immediate_exit=stay))


def interrupted(ran: RunResult, reason: ExitReason) -> bool:
    return (ran.exit.errno, ran.exit.reason, ran.exit.mmio, ran.done) == (errno.EINTR, reason, None, False)


def test_it_is_said_to_be_there() -> None:
    world = World()
    assert [check_extension(world.host.features, vm, 136) for vm in (None, world.vm)] == [1, 1]


@PRIVILEGES
def test_the_guest_does_not_run_until_it_may(cpl: int) -> None:
    guest = Interrupted()
    assert interrupted(guest.enter([("w", RAM, b"x")], cpl, stay=True), ExitReason.UNKNOWN)
    assert interrupted(guest.enter(None, stay=True), ExitReason.UNKNOWN)
    assert (guest.ram(0, 1), guest.vcpu.arch.ept_violations) == (b"\0", 0)
    assert guest.enter(None).done
    assert guest.ram(0, 1) == b"x"
    assert interrupted(guest.enter(None, stay=True), ExitReason.IO), "code that ended is not run again either"
    assert interrupted(guest.enter([("w", RAM, b"y")], cpl, stay=True), ExitReason.IO)
    assert guest.enter([("w", RAM, b"z")], cpl).done, "new code instead of the one that never ran"
    assert guest.ram(0, 1) == b"z"


@PRIVILEGES
def test_a_load_that_user_space_answered_is_completed_and_what_follows_is_not_run(cpl: int) -> None:
    guest = Interrupted()
    assert guest.enter([("r", HOLE, 1), ("w", RAM, b"x")], cpl).exit.mmio == Mmio(Gpa(HOLE), 1, False, b"")
    ran = guest.enter(None, stay=True, reply=b"\x42")
    assert interrupted(ran, ExitReason.MMIO)
    assert (ran.reads, ran.finished) == ([b"\x42"], 1)
    assert guest.ram(0, 1) == b"\0"
    assert guest.enter(None).done
    assert guest.ram(0, 1) == b"x"


@PRIVILEGES
def test_the_last_instruction_is_completed_and_its_end_not_reached(cpl: int) -> None:
    guest = Interrupted()
    guest.enter([("w", HOLE, b"x")], cpl)
    assert interrupted(guest.enter(None, stay=True), ExitReason.MMIO)
    assert guest.enter(None).done


@PRIVILEGES
def test_completing_may_ask_user_space_for_more(cpl: int) -> None:
    guest = Interrupted()
    guest.enter([("w", HOLE, bytes(range(16))), ("add", HOLE, 8, 1)], cpl)
    assert guest.enter(None, stay=True).exit.mmio == Mmio(Gpa(HOLE + 8), 8, True, bytes(range(8, 16)))
    assert interrupted(guest.enter(None, stay=True), ExitReason.MMIO)
    assert guest.enter(None).exit.mmio == Mmio(Gpa(HOLE), 8, False, b"")
    stored = guest.enter(None, stay=True, reply=bytes(8)).exit.mmio
    assert stored == Mmio(Gpa(HOLE), 8, True, (1).to_bytes(8, "little")), "the store of the same instruction"
    assert interrupted(guest.enter(None, stay=True), ExitReason.MMIO)
    assert guest.enter(None).done


@PRIVILEGES
@pytest.mark.parametrize("string", [("stos", HOLE, 7, 3), ("movs", HOLE, RAM, 3)])
def test_a_string_instruction_is_completed_as_one(cpl: int, string: Instruction) -> None:
    guest = Interrupted()
    ran = guest.enter([string, ("w", RAM, b"x")], cpl)
    for byte in range(3):
        assert ran.exit.mmio is not None
        assert (ran.exit.errno, ran.exit.mmio.phys_addr) == (0, HOLE + byte)
        ran = guest.enter(None, stay=True)
    assert interrupted(ran, ExitReason.MMIO)
    assert guest.enter(None).done


def test_a_loop_is_left_between_its_accesses() -> None:
    guest = Interrupted()
    guest.enter([("wloop", HOLE, 3, 8, 1)], 0)
    assert interrupted(guest.enter(None, stay=True), ExitReason.MMIO)
    assert guest.enter(None).exit.mmio == Mmio(Gpa(HOLE + 8), 8, True, (1).to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("cpl", "code", "reason"),
    [(3, ("r", UNBACKED, 1), ExitReason.UNKNOWN), (0, ("exec", UNBACKED), ExitReason.INTERNAL_ERROR)],
)
def test_what_failed_is_not_tried_again(cpl: int, code: Instruction, reason: ExitReason) -> None:
    guest = Interrupted()
    assert guest.enter([code], cpl).exit.reason is reason
    violations = guest.vcpu.arch.ept_violations
    assert interrupted(guest.enter(None, stay=True), reason)
    assert guest.vcpu.arch.ept_violations == violations
    guest.map(16, hva=0x7000_0000)
    assert guest.enter(None).done
