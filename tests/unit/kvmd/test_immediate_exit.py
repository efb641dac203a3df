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
from kvmd.core.cpu.vcpu import RunResult, Vcpu
from protocol.kvm_run import ExitReason
from protocol.units import Gpa, Hva
from tests.kit.kvmd import World

RAM, HOLE, UNBACKED = 0x1000_0000, 0x2000_0000, 0x3000_0000
PRIVILEGES = pytest.mark.parametrize("cpl", [0, 3])


class Guest:
    def __init__(self) -> None:
        self.world = World()
        self.hva = self.world.map(16)
        self.world.set_slot(1, RAM >> 12, 16, self.hva)
        self.world.set_slot(2, UNBACKED >> 12, 16, 0x7000_0000)
        self.vcpu: Vcpu = self.world.create_vcpu()

    def run(
        self, code: list[Instruction] | None, cpl: int = 3, *, stay: bool = False, reply: bytes = b""
    ) -> RunResult:
        return self.world.run(self.vcpu.run(code, cpl, mmio_data=reply, immediate_exit=stay))

    def ram(self) -> bytes:
        return self.world.run(self.world.mm.read(Hva(self.hva), 1))


def interrupted(ran: RunResult, reason: ExitReason) -> bool:
    return (ran.exit.errno, ran.exit.reason, ran.exit.mmio, ran.done) == (errno.EINTR, reason, None, False)


def test_it_is_said_to_be_there() -> None:
    world = World()
    assert [check_extension(world.host.features, vm, 136) for vm in (None, world.vm)] == [1, 1]


@PRIVILEGES
def test_the_guest_does_not_run_until_it_may(cpl: int) -> None:
    guest = Guest()
    assert interrupted(guest.run([("w", RAM, b"x")], cpl, stay=True), ExitReason.UNKNOWN)
    assert interrupted(guest.run(None, stay=True), ExitReason.UNKNOWN)
    assert (guest.ram(), guest.vcpu.arch.ept_violations) == (b"\0", 0)
    assert guest.run(None).done
    assert guest.ram() == b"x"
    assert interrupted(guest.run(None, stay=True), ExitReason.IO), "code that ended is not run again either"
    assert interrupted(guest.run([("w", RAM, b"y")], cpl, stay=True), ExitReason.IO)
    assert guest.run([("w", RAM, b"z")], cpl).done, "new code instead of the one that never ran"
    assert guest.ram() == b"z"


@PRIVILEGES
def test_a_load_that_user_space_answered_is_completed_and_what_follows_is_not_run(cpl: int) -> None:
    guest = Guest()
    assert guest.run([("r", HOLE, 1), ("w", RAM, b"x")], cpl).exit.mmio == Mmio(Gpa(HOLE), 1, False, b"")
    ran = guest.run(None, stay=True, reply=b"\x42")
    assert interrupted(ran, ExitReason.MMIO)
    assert (ran.reads, ran.finished) == ([b"\x42"], 1)
    assert guest.ram() == b"\0"
    assert guest.run(None).done
    assert guest.ram() == b"x"


@PRIVILEGES
def test_the_last_instruction_is_completed_and_its_end_not_reached(cpl: int) -> None:
    guest = Guest()
    guest.run([("w", HOLE, b"x")], cpl)
    assert interrupted(guest.run(None, stay=True), ExitReason.MMIO)
    assert guest.run(None).done


@PRIVILEGES
def test_completing_may_ask_user_space_for_more(cpl: int) -> None:
    guest = Guest()
    guest.run([("w", HOLE, bytes(range(16))), ("add", HOLE, 8, 1)], cpl)
    assert guest.run(None, stay=True).exit.mmio == Mmio(Gpa(HOLE + 8), 8, True, bytes(range(8, 16)))
    assert interrupted(guest.run(None, stay=True), ExitReason.MMIO)
    assert guest.run(None).exit.mmio == Mmio(Gpa(HOLE), 8, False, b"")
    stored = guest.run(None, stay=True, reply=bytes(8)).exit.mmio
    assert stored == Mmio(Gpa(HOLE), 8, True, (1).to_bytes(8, "little")), "the store of the same instruction"
    assert interrupted(guest.run(None, stay=True), ExitReason.MMIO)
    assert guest.run(None).done


@PRIVILEGES
@pytest.mark.parametrize("string", [("stos", HOLE, 7, 3), ("movs", HOLE, RAM, 3)])
def test_a_string_instruction_is_completed_as_one(cpl: int, string: Instruction) -> None:
    guest = Guest()
    ran = guest.run([string, ("w", RAM, b"x")], cpl)
    for byte in range(3):
        assert ran.exit.mmio is not None
        assert (ran.exit.errno, ran.exit.mmio.phys_addr) == (0, HOLE + byte)
        ran = guest.run(None, stay=True)
    assert interrupted(ran, ExitReason.MMIO)
    assert guest.run(None).done


def test_a_loop_is_left_between_its_accesses() -> None:
    guest = Guest()
    guest.run([("wloop", HOLE, 3, 8, 1)], 0)
    assert interrupted(guest.run(None, stay=True), ExitReason.MMIO)
    assert guest.run(None).exit.mmio == Mmio(Gpa(HOLE + 8), 8, True, (1).to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("cpl", "code", "reason"),
    [(3, ("r", UNBACKED, 1), ExitReason.UNKNOWN), (0, ("exec", UNBACKED), ExitReason.INTERNAL_ERROR)],
)
def test_what_failed_is_not_tried_again(cpl: int, code: Instruction, reason: ExitReason) -> None:
    guest = Guest()
    assert guest.run([code], cpl).exit.reason is reason
    violations = guest.vcpu.arch.ept_violations
    assert interrupted(guest.run(None, stay=True), reason)
    assert guest.vcpu.arch.ept_violations == violations
    guest.world.map(16, hva=0x7000_0000)
    assert guest.run(None).done
