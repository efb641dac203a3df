"""A locked instruction that KVM emulates: at once at the host's address, or not at all, or user space's.

What is expected is emulator_cmpxchg_emulated's [KVM x86.c]: the answer depends on the slot first (none, or
read-only: a plain store, so MMIO), then on the host's page (it faults: emulation failed), then on the value.
"""

from __future__ import annotations

import pytest

from kvmd.core.cpu.exits import Exit, Mmio
from kvmd.core.cpu.program import Instruction
from kvmd.core.cpu.vcpu import RunResult, Vcpu
from kvmd.core.invariants import check_vm
from kvmd.core.mm.vma import Prot
from protocol.kvm_run import ExitReason
from protocol.units import Gpa, Hva
from tests.kit.kvmd import RW, World

GPA, HVA, PAGES = 0x1000_0000, 0x5000_0000, 8
AT = GPA + 0x1000
SIZES = pytest.mark.parametrize("size", [1, 2, 4, 8])
ONE = (1).to_bytes(8, "little")


def locked(name: str, size: int, gpa: int = AT) -> Instruction:
    """Stores 1 over 0."""
    operands = {"add": (size, 1), "xchg": (ONE[:size],), "cmpxchg": (size, 0, 1), "fails": (size, 9, 1)}
    return ("cmpxchg" if name == "fails" else name, gpa, *operands[name])


LOCKED = pytest.mark.parametrize("name", ["add", "xchg", "cmpxchg", "fails"])


def machine(prot: Prot | None, flags: int = 0) -> tuple[World, Vcpu]:
    world = World()
    if prot is not None:
        world.map(PAGES, prot=prot, hva=HVA)
    world.set_slot(1, GPA >> 12, PAGES, HVA, flags=flags)
    return world, world.create_vcpu()


def run(world: World, vcpu: Vcpu, *code: Instruction) -> RunResult:
    return world.run(vcpu.run(list(code), 0))


def logged(world: World) -> list[int]:
    """The pages of the slot whose bits are set, by KVM_GET_DIRTY_LOG."""
    buffer = world.map(1)
    world.run(world.vm.dirty_log.get(1, buffer))
    bits = int.from_bytes(world.run(world.mm.read(buffer, 8)), "little")
    return [page for page in range(PAGES) if bits >> page & 1]


def failed(left: Exit) -> bool:
    return (left.reason, left.suberror, left.mmio) == (ExitReason.INTERNAL_ERROR, 1, None)


@SIZES
@LOCKED
def test_over_memory_that_may_not_be_written_emulation_fails_and_starts_again(name: str, size: int) -> None:
    world, vcpu = machine(Prot.READ, flags=1)
    ran = run(world, vcpu, locked(name, size))
    assert failed(ran.exit)
    assert (ran.done, ran.finished) == (False, 0)
    assert logged(world) == []
    world.run(world.mm.mprotect(Hva(HVA), PAGES << 12, RW))
    ran = world.run(vcpu.run(None))
    assert ran.done
    assert logged(world) == [1], "a comparison that fails writes the old value back"
    assert world.run(world.mm.read(Hva(HVA + 0x1000), 1)) == (b"\0" if name == "fails" else b"\1")
    assert check_vm(world.vm) == []


@SIZES
@LOCKED
def test_over_no_memory_the_load_is_user_spaces_and_the_store_fails(name: str, size: int) -> None:
    world, vcpu = machine(None)
    ran = run(world, vcpu, locked(name, size))
    assert ran.exit.mmio == Mmio(Gpa(AT), size, False, b"")
    ran = world.run(vcpu.run(None, mmio_data=b"\x10"))
    assert failed(ran.exit)
    ran = world.run(vcpu.run(None))
    assert ran.exit.mmio == Mmio(Gpa(AT), size, False, b""), "from its start"


@SIZES
@LOCKED
def test_what_user_space_answered_is_compared_with_what_came_to_be_there(name: str, size: int) -> None:
    """Memory appears between load and store: another value, so the instruction starts again."""
    world, vcpu = machine(None)
    run(world, vcpu, locked(name, size))
    world.map(PAGES, hva=HVA)
    ran = world.run(vcpu.run(None, mmio_data=b"\x10"))
    assert ran.done
    assert world.run(world.mm.read(Hva(HVA + 0x1000), 1)) == (b"\0" if name == "fails" else b"\1")


@SIZES
@LOCKED
@pytest.mark.parametrize("where", ["a read-only slot", "no slot"])
def test_where_the_host_has_no_address_it_is_a_plain_store(name: str, size: int, where: str) -> None:
    world, vcpu = machine(RW, flags=2)
    at = AT if where == "a read-only slot" else 0x2000_0000
    ran = run(world, vcpu, locked(name, size, at))
    if where == "no slot":
        assert ran.exit.mmio == Mmio(Gpa(at), size, False, b"")
        ran = world.run(vcpu.run(None, mmio_data=bytes(size)))
    stored = bytes(size) if name == "fails" else ONE[:size]
    assert ran.exit.mmio == Mmio(Gpa(at), size, True, stored)
    assert world.run(vcpu.run(None)).done


@LOCKED
def test_across_two_pages_it_is_a_plain_store_of_both_parts(name: str) -> None:
    """Of which the part without memory to write is user space's."""
    world, vcpu = machine(RW, flags=1)
    world.run(world.mm.mprotect(Hva(HVA + 0x2000), 0x1000, Prot.READ))
    at = GPA + 0x2000 - 4
    ran = run(world, vcpu, locked(name, 8, at))
    assert ran.exit.mmio == Mmio(Gpa(GPA + 0x2000), 4, True, bytes(4))
    assert world.run(vcpu.run(None)).done
    assert logged(world) == [1]


@pytest.mark.parametrize("prot", [Prot.READ, None])
def test_without_a_lock_it_is_a_load_and_a_store(prot: Prot | None) -> None:
    world, vcpu = machine(prot)
    ran = run(world, vcpu, ("or", AT, 1, 0))
    if prot is None:
        assert ran.exit.mmio == Mmio(Gpa(AT), 1, False, b"")
        ran = world.run(vcpu.run(None, mmio_data=b"\x10"))
    assert ran.exit.mmio == Mmio(Gpa(AT), 1, True, b"\x10" if prot is None else b"\0")
    assert world.run(vcpu.run(None)).done


def test_memory_that_is_only_written_is_read_by_the_emulator_and_not_mapped_to_be_read() -> None:
    world, vcpu = machine(Prot.WRITE)
    assert run(world, vcpu, ("r", AT, 8)).reads == [bytes(8)], "copy_from_user asks the CPU"
    ran = world.run(vcpu.run([("r", AT, 8)], 3))
    assert (ran.exit.errno, ran.done) == (14, False), "get_user_pages asks the mapping"
    assert run(world, vcpu, locked("add", 8)).done
    assert world.run(vcpu.run([("r", AT, 8)], 3)).reads == [ONE]


def test_a_read_only_slot_over_memory_that_is_only_written_is_never_read() -> None:
    """No entry that is there helps: a slot that is never written is never tried for write."""
    world, vcpu = machine(Prot.WRITE, flags=2)
    world.run(world.mm.write(Hva(HVA + 0x1000), ONE))
    assert world.run(vcpu.run([("r", AT, 8)], 3)).exit.errno == 14
