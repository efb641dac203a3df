"""A VMM on real daemons, whose fds a test closes in whatever order it likes."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from protocol.hw.dsa import CompletionRecord, Status
from protocol.rpc.channel import Body, Channel, Fds
from protocol.units import GIB, MIB, PAGE_SIZE, Gpa
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.guest.memory import GuestMemory
from qemu_shim.vmm.device_client import Portal
from qemu_shim.vmm.file import File
from qemu_shim.vmm.iommufd_client import Iommu, VfioDevice
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.machine import GuestCpu, Host
from qemu_shim.vmm.process import Process
from qemu_shim.vmm.vcpu import Vcpu
from tests.kit.daemons import eventually

PATTERN = 0x1122_3344_5566_7788
FILLED = PATTERN.to_bytes(8, "little") * (PAGE_SIZE // 8)
QUEUE_START, GUEST_START = Gpa(16 * MIB), Gpa(32 * MIB)


class ProcessCpu:
    """Guest memory through the VMM's own mapping: works without vCPU and makes no EPT violation."""

    def __init__(self, process: Process, gpa: int, hva: int) -> None:
        self._process = process
        self._offset = hva - gpa

    async def access(self, accesses: Sequence[tuple[int, int | bytes]]) -> list[bytes]:
        reads = []
        for gpa, what in accesses:
            if isinstance(what, int):
                reads.append(await self._process.read(gpa + self._offset, what))
            else:
                await self._process.write(gpa + self._offset, what)
        return reads

    async def store_nothing(self, gpa: int) -> None:
        """Not in one: nobody else stores there."""
        await self._process.write(gpa + self._offset, await self._process.read(gpa + self._offset, 1))


@dataclass(slots=True)
class Vmm:
    """A VM with one slot at gpa 0, perhaps a device on it.  `None`: not made, or closed by the test."""

    host: Host
    process: Process
    vm: Vm
    vcpu: Vcpu
    hva: int
    memory: GuestMemory
    tdp_fd: int | None = None
    iommu: Iommu | None = None
    device: VfioDevice | None = None
    device_id: int = 0
    hwpt_id: int = 0
    ioas_id: int = 0
    portal: Portal | None = None
    queue: IdxdWorkQueue | None = None
    extra: list[File | Portal] = field(default_factory=list)

    def close_tdp_fd(self) -> None:
        if self.tdp_fd is not None:
            os.close(self.tdp_fd)
            self.tdp_fd = None

    def close_vm(self) -> None:
        """The VM's own fds: with them goes all that the user holds of it but the TDP FD."""
        self.vcpu.close()
        self.vm.close()

    def close(self) -> None:
        """Everything, as a process's end would: in no helpful order."""
        self.close_vm()
        self.close_tdp_fd()
        for file in (self.iommu, self.device, self.portal, self.process, *self.extra):
            if file is not None:
                file.close()

    @property
    def bound(self) -> tuple[Iommu, VfioDevice]:
        assert self.iommu is not None
        assert self.device is not None
        return self.iommu, self.device

    async def fill(self, gpa: int, pattern: int = PATTERN) -> Status:
        """The device writes a page."""
        assert self.queue is not None
        return (await self.queue.fill(gpa, pattern, PAGE_SIZE)).status

    async def copy(self, dst: int, src: int, size: int = PAGE_SIZE) -> CompletionRecord:
        assert self.queue is not None
        return await self.queue.memmove(dst, src, size)

    async def seen_by_process(self, gpa: int, size: int = PAGE_SIZE) -> bytes:
        return await self.process.read(self.hva + gpa, size)


async def bare_vm(host: Host, *, ram: int = GIB, page_size: int = 4096, maxphyaddr: int = 46) -> Vmm:
    """Process, VM, slot 0 at gpa 0, one vCPU."""
    process = await host.kvmd.start_process()
    vm = await host.kvmd.create_vm(process)
    hva = await process.mmap(ram, page_size=page_size)
    await vm.set_user_memory_region(0, 0, ram, hva)
    vcpu = await vm.create_vcpu(0)
    await vcpu.set_cpuid(maxphyaddr)
    memory = GuestMemory(GuestCpu(vcpu), GUEST_START, Gpa(ram))
    return Vmm(host, process, vm, vcpu, hva, memory)


async def bind_device(rig: Vmm, number: int = 0) -> None:
    """/dev/iommu, and the device bound to it."""
    rig.iommu = await rig.host.iommufdd.open_iommu(rig.process)
    rig.device = await rig.host.iommufdd.open_device(number)
    rig.device_id = await rig.device.bind(rig.iommu)


async def attach_device(rig: Vmm, number: int = 0) -> None:
    """The RFC's steps from the TDP FD on, and a work queue."""
    rig.tdp_fd = await rig.vm.create_tdp_fd()
    await bind_device(rig, number)
    iommu, device = rig.bound
    rig.hwpt_id = await iommu.hwpt_alloc_kvm(rig.device_id, rig.tdp_fd)
    await device.attach(rig.hwpt_id)
    rig.portal = await device.map_portal()
    records = GuestMemory(ProcessCpu(rig.process, 0, rig.hva), QUEUE_START, GUEST_START)
    rig.queue = IdxdWorkQueue(rig.portal, records, block_on_fault=True)
    await rig.queue.enable()


@asynccontextmanager
async def rigged(host: Host, **config: Any) -> AsyncIterator[Vmm]:
    """A VM with device 0 attached; everything left open is closed, and gone, at the end."""
    async with vm_only(host, **config) as rig:
        await attach_device(rig)
        yield rig


@asynccontextmanager
async def vm_only(host: Host, **config: Any) -> AsyncIterator[Vmm]:
    await accepted(host)
    rig = await bare_vm(host, **config)
    try:
        yield rig
    finally:
        rig.close()
    await nothing_left(host)


async def accepted(host: Host) -> None:
    """Each daemon has, and so has its end of the connection open: fds may be counted from now on."""
    for daemon in (host.kvmd, host.iommufdd, host.device_sim):
        await daemon.stats()


async def nothing_left(host: Host) -> None:
    """Waits until no daemon keeps anything of any VM."""
    await eventually(
        host.kvmd.stats,
        lambda s: not (s["vm_count"] or s["processes"] or s["frames"] or s["table_pages"]),
        "kvmd has given everything back",
    )
    await eventually(
        host.iommufdd.stats,
        lambda s: s["hwpts"] == [] and not (s["devices_bound"] or s["partial_held"]),
        "iommufdd has given everything back",
    )


async def unit_stats(host: Host) -> Body:
    unit: Body = (await host.device_sim.stats())["unit"]
    return unit


async def device_stats(host: Host, number: int = 0) -> Body:
    device: Body = (await host.device_sim.stats())["devices"][f"dsa{number}"]
    return device


async def vm_stats(host: Host) -> Body:
    stats: Body = (await host.kvmd.stats())["vms"][-1]
    return stats


async def fault_notes(host: Host, vm: Vm, told: list[Body] | None = None) -> Channel:
    """A channel of the VM's fault notes, which end up in `told`."""
    reply = await host.kvmd.channel.ask("KVM_FAULT_NOTES_GET", {}, [os.dup(vm._fd)])

    def on_notify(channel: Channel, body: Body, fds: Fds) -> None:
        if told is not None:
            told.append(body)

    return Channel(host.loop, socket.socket(fileno=reply.fds.take(0)), "notes", on_notify=on_notify)
