"""A VM whose device is on an IOAS: pinned, on demand, or on demand and following KVM."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from protocol.rpc.channel import Body
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.guest.memory import GuestMemory
from qemu_shim.vmm.machine import Host
from tests.kit.daemons import eventually
from tests.kit.vmm import GUEST_START, QUEUE_START, ProcessCpu, Vmm, bind_device, vm_only, vm_stats

RAM = 64 << 20


async def attach_on_ioas(
    rig: Vmm, *, ram: int = RAM, on_demand: bool = False, follow: bool = False, pinned: bool = False
) -> int:
    """The device on an HWPT of an IOAS that maps the VM's memory at its gpas; the IOAS's id."""
    await bind_device(rig)
    iommu, device = rig.bound
    ioas = await iommu.ioas_alloc(on_demand=on_demand)
    await iommu.ioas_map(ioas, rig.process, rig.hva, ram, 0)
    if follow:
        await iommu.follow_kvm(ioas, rig.vm)
    rig.hwpt_id = await iommu.hwpt_alloc(rig.device_id, ioas)
    await device.attach(rig.hwpt_id, pinned=pinned)
    rig.portal = await device.map_portal()
    records = GuestMemory(ProcessCpu(rig.process, 0, rig.hva), QUEUE_START, GUEST_START)
    rig.queue = IdxdWorkQueue(rig.portal, records, block_on_fault=True)
    await rig.queue.enable()
    return ioas


@asynccontextmanager
async def on_ioas(host: Host, *, ram: int = RAM, page_size: int = 4096, **how: Any) -> AsyncIterator[Vmm]:
    async with vm_only(host, ram=ram, page_size=page_size) as rig:
        rig.ioas_id = await attach_on_ioas(rig, ram=ram, **how)
        yield rig


async def iommu_stats(host: Host) -> Body:
    return await host.iommufdd.stats()


async def hwpt_stats(host: Host) -> Body:
    stats: Body = (await host.iommufdd.stats())["hwpts"][-1]
    return stats


async def noted(host: Host, before: Body) -> Body:
    """STATS once every note that KVM sent since `before` was worked off."""
    sent = (await vm_stats(host))["notes"] + before["notes"]
    return await eventually(
        host.iommufdd.stats,
        lambda s: s["notes"] == sent and not s["notes_pending"],
        f"{sent} notes are worked off",
    )
