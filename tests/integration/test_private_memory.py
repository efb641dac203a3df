"""Memory that becomes private and shared again under a device, on real daemons and on every design."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from protocol.errors import UapiError
from protocol.hw.dsa import Status
from protocol.uapi import names
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.machine import Host, Machine, MachineConfig, machine
from tests.kit.vmm import FILLED, PATTERN

RAM = 32 * MIB
BLOCK = 2 * MIB
PRIVATE = names.KVM_MEMORY_ATTRIBUTE_PRIVATE
ONE_TABLE = ("managed", "shared")  # KVM's: a device has what the guest has
OF_ITS_OWN = [design for design in DESIGNS if design not in ONE_TABLE]


@asynccontextmanager
async def running(host: Host, design: str) -> AsyncIterator[tuple[Machine, IdxdWorkQueue, int]]:
    """A machine, its queue, and a block that nobody has touched."""
    config = MachineConfig(RAM, design=DESIGNS[design], private_block=BLOCK)
    async with machine(host, config) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        yield guest, queue, guest.memory.allocate(BLOCK // PAGE_SIZE, BLOCK)


async def sound(host: Host) -> bool:
    return await host.kvmd.violations() == [] == await host.iommufdd.violations()


@pytest.mark.parametrize("design", DESIGNS)
async def test_device_and_guest_have_the_same_memory_before_during_and_after_it_is_private(
    host: Host, design: str
) -> None:
    async with running(host, design) as (guest, queue, page):
        await guest.memory.write(page, b"shared")
        assert (await queue.fill(page, PATTERN, PAGE_SIZE)).status is Status.SUCCESS
        assert await guest.memory.read(page, PAGE_SIZE) == FILLED
        await guest.convert(page, BLOCK, private=True)
        assert await guest.memory.read(page, PAGE_SIZE) == bytes(PAGE_SIZE)
        await guest.memory.write(page, b"secret")
        filled = await queue.fill(page, PATTERN, PAGE_SIZE)
        if design in ONE_TABLE:
            assert filled.status is Status.SUCCESS
            assert await guest.memory.read(page, PAGE_SIZE) == FILLED
        else:
            assert filled.status is not Status.SUCCESS
            assert await guest.memory.read(page, 6) == b"secret"
        assert await guest.process.read(guest.hva_of(page), PAGE_SIZE) == bytes(PAGE_SIZE)
        assert await sound(host)
        await guest.convert(page, BLOCK, private=False)
        assert await guest.memory.read(page, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert (await queue.fill(page, PATTERN, PAGE_SIZE)).status is Status.SUCCESS
        assert await guest.memory.read(page, PAGE_SIZE) == FILLED
        assert await guest.process.read(guest.hva_of(page), PAGE_SIZE) == FILLED
        await guest.convert(page, BLOCK, private=True)
        assert await guest.memory.read(page, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert await sound(host)


@pytest.mark.parametrize("design", OF_ITS_OWN)
async def test_who_would_keep_the_shared_pages_for_the_device_is_refused(host: Host, design: str) -> None:
    """A VMM that does not hear of the conversion, or that maps what is private."""
    async with running(host, design) as (guest, queue, page):
        with pytest.raises(UapiError, match="unmap it there first") as caught:
            await guest.vm.set_memory_attributes(page, PAGE_SIZE, PRIVATE)
        assert caught.value.errno == errno.EBUSY
        assert (await queue.fill(page, PATTERN, PAGE_SIZE)).status is Status.SUCCESS
        assert await guest.memory.read(page, PAGE_SIZE) == FILLED
        await guest.convert(page, BLOCK, private=True)
        slot = guest.slot_of(page)
        with pytest.raises(UapiError, match="private") as caught:
            await guest.container.populate(slot, page - slot.gpa, BLOCK)
        assert caught.value.errno == errno.EBUSY
        assert (await queue.fill(page, PATTERN, PAGE_SIZE)).status is not Status.SUCCESS
        assert await sound(host)


async def test_a_conversion_that_is_refused_leaves_the_device_its_memory(host: Host) -> None:
    async with running(host, "mirror") as (guest, queue, page):
        other = await guest.iommu.ioas_alloc()  # the same memory once more, pinned for another device
        await guest.iommu.ioas_map(other, guest.process, guest.hva_of(page), PAGE_SIZE, 0)
        hwpt = await guest.iommu.hwpt_alloc(guest.device_id, other)
        with pytest.raises(UapiError, match="unmap it there first"):
            await guest.convert(page, BLOCK, private=True)
        assert (await queue.fill(page, PATTERN, PAGE_SIZE)).status is Status.SUCCESS
        assert await guest.memory.read(page, PAGE_SIZE) == FILLED
        await guest.iommu.destroy(hwpt)
        await guest.convert(page, BLOCK, private=True)
        assert await guest.memory.read(page, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert await sound(host)


async def test_a_memslot_that_is_refused_leaves_no_guest_memfd(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise UapiError(errno.ENOMEM, "ENOMEM: KVM has no memory for a slot")

    monkeypatch.setattr(Vm, "set_user_memory_region2", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UapiError, match="no memory for a slot"):
        async with machine(host, MachineConfig(RAM, private_block=BLOCK)):
            pass
    assert len(os.listdir("/proc/self/fd")) == before
