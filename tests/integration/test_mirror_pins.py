"""Pins over pins on a mirror, with a VMM that drops what is pinned: whose page does the device reach?"""

from __future__ import annotations

from protocol.hw.dsa import Status
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.integration.on_ioas import iommu_stats, on_ioas
from tests.kit.vmm import GUEST_START, device_stats

AT = GUEST_START


async def test_a_page_pinned_over_a_pinned_one_is_never_the_vmms_next(host: Host) -> None:
    """Write X, pin, DONTNEED, write Y, pin more over it, unpin that, DONTNEED: what the VMM has next is its
    own, and the device reaches the page it pinned.
    """
    async with on_ioas(host, on_demand=True) as rig:
        _, device = rig.bound
        hva = rig.hva + AT
        await rig.process.write(hva, b"X" * PAGE_SIZE)
        await device.pin(AT, PAGE_SIZE)
        await rig.process.madvise_dontneed(hva, PAGE_SIZE)
        await rig.process.write(hva, b"Y" * PAGE_SIZE)
        await device.pin(AT, 2 * PAGE_SIZE)
        await device.unpin(AT, 2 * PAGE_SIZE)
        await rig.process.madvise_dontneed(hva, PAGE_SIZE)
        secret = await rig.process.mmap(16 * PAGE_SIZE)
        await rig.process.write(secret, b"secret" + bytes(16 * PAGE_SIZE - 6))

        assert (await rig.copy(AT + 4 * PAGE_SIZE, AT)).status is Status.SUCCESS
        assert await rig.seen_by_process(AT + 4 * PAGE_SIZE, 6) == b"XXXXXX"
        assert await rig.fill(AT) is Status.SUCCESS
        assert await rig.process.read(secret, 6) == b"secret"

        await device.unpin(AT, PAGE_SIZE)
        assert (await iommu_stats(host))["pinned_pages"] == 0
        assert await rig.fill(AT) is Status.SUCCESS
        assert (await rig.seen_by_process(AT, 6)) != bytes(6), "a page of the VMM's again, faulted in"
        assert (await device_stats(host))["stale_accesses"] == 0
        assert await host.kvmd.violations() + await host.iommufdd.violations() == []


async def test_pins_that_went_with_their_area_are_not_taken_from_who_pinned_since(host: Host) -> None:
    """Case 7, of a mirror: device 0's unpin after its area went and came back names its own request."""
    async with on_ioas(host, on_demand=True) as rig:
        iommu, device = rig.bound
        other = await host.iommufdd.open_device(1)
        rig.extra.append(other)
        await other.bind(iommu)
        await other.attach(rig.hwpt_id)
        await device.pin(AT, 4 * PAGE_SIZE)
        ram = 64 << 20
        assert await iommu.ioas_unmap(rig.ioas_id, 0, ram) == ram
        await iommu.ioas_map(rig.ioas_id, rig.process, rig.hva, ram, 0)
        assert (await iommu_stats(host))["pinned_pages"] == 0
        await other.pin(AT, 4 * PAGE_SIZE)
        await device.unpin(AT, 4 * PAGE_SIZE)
        assert (await iommu_stats(host))["pinned_pages"] == 4
        assert await rig.process.move_pages(rig.hva + AT, 4 * PAGE_SIZE) == 0, "they stay where they are"
        await other.unpin(AT, 4 * PAGE_SIZE)
        assert await rig.process.move_pages(rig.hva + AT, 4 * PAGE_SIZE) == 4
