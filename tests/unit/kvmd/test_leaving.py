"""Ways out of KVM_RUN that depend on what the VM's process, or this KVM, has to offer."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from kvmd.core.cpu.exits import MemoryFault, Mmio
from kvmd.core.host import CpuFeatures
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.slots.guest_memfd import ATTRIBUTE_PRIVATE as PRIVATE
from kvmd.core.slots.guest_memfd import MemfdFlag
from kvmd.core.vm import Kvm, VmType
from protocol.errors import UapiError
from protocol.kvm_run import ExitReason
from protocol.units import Gpa
from tests.kit.kvmd import World

RAM, PAGE = 0x10_0000, 4096


def test_private_memory_without_a_page_leaves_as_memory_fault_that_says_so() -> None:
    world = World()
    world.vm = Kvm(world.host, world.mm, kind=VmType.SW_PROTECTED)
    world.set_slot(0, 0x100, 16, world.map(16))
    vcpu = world.create_vcpu()
    world.run(world.vm.private.set_attributes(Gpa(RAM + PAGE), PAGE, PRIVATE, 0))
    ran = world.guest_read(vcpu, RAM + PAGE + 8, 8)
    assert (ran.exit.reason, ran.exit.errno) == (ExitReason.MEMORY_FAULT, errno.EFAULT)
    assert ran.exit.memory_fault == MemoryFault(PRIVATE, Gpa(RAM + PAGE), PAGE)
    assert world.guest_read(vcpu, RAM, 8).done, "the page beside it is shared"
    world.run(world.vm.private.set_attributes(Gpa(RAM + PAGE), PAGE, 0, 0))
    assert world.run(vcpu.run(None)).done, "made shared, the access is tried again"


def test_a_guest_memfd_that_is_gone_leaves_as_memory_fault_of_shared_memory() -> None:
    world = World()
    memfd = world.vm.private.create(16 * PAGE, MemfdFlag.MMAP | MemfdFlag.INIT_SHARED)
    region = world.region(0, 0x100, 16, world.map(16), flags=4)
    world.run(world.vm.slots_change.set_memory_region(replace(region, version=2, guest_memfd=lambda: memfd)))
    vcpu = world.create_vcpu()
    assert world.guest_write(vcpu, RAM, b"in the file").done
    world.run(world.vm.private.close(memfd))
    ran = world.guest_read(vcpu, RAM, 8)
    assert ran.exit.memory_fault == MemoryFault(0, Gpa(RAM), PAGE)


@pytest.mark.parametrize(
    ("cpl", "reason", "number"), [(3, ExitReason.UNKNOWN, errno.EFAULT), (0, ExitReason.MMIO, 0)]
)
def test_a_userfaultfd_for_user_mode_only_is_asked_neither_for_cpu_nor_emulator(
    cpl: int, reason: ExitReason, number: int
) -> None:
    """Both are the kernel's faults: the CPU's fails, the emulator takes it for memory that is not there."""
    world = World()
    hva = world.map(16)
    world.set_slot(0, 0x100, 16, hva)
    uffd = Userfaultfd(world.mm, user_mode_only=True)
    world.run(uffd.register(hva, 16 * PAGE, missing=True, wp=False))
    ran = world.run(world.create_vcpu().run([("r", RAM, 8)], cpl))
    assert (ran.exit.reason, ran.exit.errno) == (reason, number)
    if cpl == 0:
        assert ran.exit.mmio == Mmio(Gpa(RAM), 8, False, b"")


def test_there_is_no_system_management_mode_without_its_address_space() -> None:
    world = World(CpuFeatures(address_spaces=1))
    vcpu = world.create_vcpu()
    with pytest.raises(UapiError) as refused:
        world.run(vcpu.run([("r", RAM, 8)], smm=True))
    assert refused.value.errno == errno.EINVAL
    assert not vcpu.running
