"""Dirty logging and the gate before every ioctl, through the daemons: a real device's stores are logged."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from protocol.hw.dsa import Status
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.machine import Host
from qemu_shim.vmm.process import Process
from tests.kit.daemons import eventually
from tests.kit.refusals import refused
from tests.kit.vmm import FILLED, Vmm, rigged

LOG = 1
MANUAL_DIRTY_LOG_PROTECT2, DIRTY_LOG_RING, RING_WITH_BITMAP = 168, 192, 225


async def log_slot_0(rig: Vmm, *, on: bool = True) -> None:
    await rig.vm.set_user_memory_region(0, 0, GIB, rig.hva, LOG if on else 0)


async def dirty(rig: Vmm, buffer: int) -> set[int]:
    await rig.vm.get_dirty_log(0, buffer)
    bits = int.from_bytes(await rig.process.read(buffer, GIB // PAGE_SIZE // 8), "little")
    return {page for page in range(GIB // PAGE_SIZE) if bits >> page & 1} if bits else set()


@pytest.mark.rfc("RFC-97")
@pytest.mark.defect("B-35")
@pytest.mark.parametrize("page_size", [PAGE_SIZE, 2 * MIB], ids=["4K", "2M"])
async def test_every_store_of_a_device_is_logged_once_a_round(host: Host, page_size: int) -> None:
    """The unit caches a writable translation; GET takes it away before it answers (B-35)."""
    async with rigged(host, page_size=page_size) as rig:
        buffer = await rig.process.mmap(MIB)
        page = rig.memory.allocate(2, 2 * MIB)
        assert await rig.fill(page) is Status.SUCCESS
        await log_slot_0(rig)
        for _ in range(3):
            await dirty(rig, buffer)
            assert await rig.fill(page + PAGE_SIZE) is Status.SUCCESS
            assert await rig.seen_by_process(page + PAGE_SIZE) == FILLED
            found = await dirty(rig, buffer)
            assert (page + PAGE_SIZE) >> 12 in found
            assert page >> 12 not in found
        await log_slot_0(rig, on=False)
        assert await rig.fill(page) is Status.SUCCESS


@asynccontextmanager
async def vm_of(host: Host, *files: Vm | Process) -> AsyncIterator[tuple[Process, Vm]]:
    process = await host.kvmd.start_process()
    vm = await host.kvmd.create_vm(process)
    try:
        yield process, vm
    finally:
        for file in (*files, vm, process):
            file.close()


async def test_a_ring_is_memory_that_both_sides_see(host: Host) -> None:
    async with vm_of(host) as (process, vm):
        hva = await process.mmap(MIB)
        await vm.enable_cap(DIRTY_LOG_RING, 65536)
        await vm.enable_cap(RING_WITH_BITMAP)
        await vm.set_user_memory_region(3, 0, MIB, hva, LOG)
        vcpu = await vm.create_vcpu(7)
        await vcpu.set_cpuid(46)
        ring = await vcpu.dirty_ring()
        await vcpu.run([("w", 0x5000, b"x"), ("w", 0x2000, b"y"), ("w", 0x5008, b"z")])
        assert ring.harvest() == [(3, 5), (3, 2)]
        assert await vm.reset_dirty_rings() == 2
        await vcpu.run([("w", 0x5000, b"x")])
        assert ring.harvest() == [(3, 5)]
        ring.close()
        vcpu.close()


async def test_a_vcpu_without_a_ring_has_none_to_map(host: Host) -> None:
    async with vm_of(host) as (_, vm):
        vcpu = await vm.create_vcpu(0)
        with refused(errno.EINVAL):
            await vcpu.dirty_ring()
        vcpu.close()


async def test_another_processs_ioctl_is_eio_before_anything_else(host: Host) -> None:
    """RFC-15."""
    async with vm_of(host) as (process, vm):
        other = await host.kvmd.start_process()
        with refused(errno.EIO):
            await vm.set_user_memory_region(0, 1, 1, 1, 0xFF, argp=0, caller=other)
        for caller, number in ((other, errno.EIO), (process, errno.EINVAL)):
            with refused(number):
                await vm.set_user_memory_region(0, 1, 1, 1, 0xFF, caller=caller)
            with refused(number):
                await vm.create_tdp_fd(pad=1, caller=caller)
            with refused(number):
                await vm.set_user_memory_region2(0, 1, 1, 1, 4, guest_memfd=0, caller=caller)
        other.close()


async def test_a_struct_that_is_not_there_is_efault_before_its_fields(host: Host) -> None:
    async with vm_of(host) as (process, vm):
        page = await process.mmap(PAGE_SIZE)
        for argp in (0, page + PAGE_SIZE - 8, 0xFFFF_8880_0000_0000):
            with refused(errno.EFAULT):
                await vm.set_user_memory_region(0, 1, 1, 1, 0xFF, argp=argp)
        with refused(errno.EINVAL):
            await vm.set_user_memory_region(0, 1, 1, 1, 0xFF, argp=page)
        vcpu = await vm.create_vcpu(0)
        readonly = await process.mmap(PAGE_SIZE, prot="r")
        with refused(errno.EFAULT):
            await vcpu.ask("KVM_PRE_FAULT_MEMORY", gpa=0, size=PAGE_SIZE, argp=readonly)
        vcpu.close()


async def test_a_guest_memfd_is_known_by_its_file_and_keeps_its_vm(host: Host) -> None:
    process = await host.kvmd.start_process()
    vm = await host.kvmd.create_vm(process, kind=1)
    hva = await process.mmap(MIB)
    memfd = await vm.create_guest_memfd(MIB)
    null = os.open("/dev/null", os.O_RDWR)
    for wrong, number in ((0xFFFF_FFFF, errno.EBADF), (null, errno.EINVAL)):
        with refused(number):
            await vm.set_user_memory_region2(0, 0, MIB, hva, 4, guest_memfd=wrong)
    os.close(null)
    await vm.set_user_memory_region2(0, 0, MIB, hva, 4, guest_memfd=memfd, caller=process)
    await vm.set_memory_attributes(0, MIB, 8)
    vcpu = await vm.create_vcpu(0)
    await vcpu.set_cpuid(46)
    await vcpu.run([("w", 0, b"secret")])
    assert await process.read(hva, 6) == bytes(6)
    assert await vcpu.pre_fault_memory(0x1000, 0x2000) == (0x3000, 0)
    for file in (vcpu, vm, process):
        file.close()
    await eventually(host.kvmd.stats, lambda stats: stats["processes"] == 0, "the process is gone")
    assert (await host.kvmd.stats())["vm_count"] == 1, "its last file is open"
    memfd.close()
    await eventually(host.kvmd.stats, lambda stats: stats["vms"] == [], "the VM is gone")
    assert (await host.kvmd.stats())["frames"] == 0
