"""A device leaves its domain, or an allocation undoes itself, while somebody is in the middle of it."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio

from protocol.units import GIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.integration.test_errno import alloc
from tests.integration.test_units import with_silicon
from tests.kit.daemons import eventually
from tests.kit.refusals import refused
from tests.kit.vmm import rigged, vm_stats

SLOT, GPA = 5, 8 * GIB


@pytest.mark.rfc("RFC-100")
@pytest.mark.defect("B-20")
async def test_a_detach_waits_for_the_request_that_sleeps_in_kvm_and_nothing_asks_after(
    host: Host,
) -> None:
    """B-20: the domain went while a group was on its way to KVM through it.

    The page is in a userfaultfd, so the group sleeps in KVM as long as the test likes.  Until it is answered
    the detach is not over and the HWPT is in use; after the detach KVM is asked for nothing more.
    """
    async with rigged(host) as rig:
        iommu, device = rig.bound
        hva = await rig.process.mmap(PAGE_SIZE)
        await rig.vm.set_user_memory_region(SLOT, GPA, PAGE_SIZE, hva)
        uffd = await rig.process.userfaultfd()
        rig.extra.append(uffd)
        await uffd.register(hva, PAGE_SIZE, "missing")
        over: list[str] = []
        async with trio.open_nursery() as nursery:

            async def fill() -> None:
                await rig.fill(GPA)
                over.append("fill")

            async def detach() -> None:
                await device.detach()
                over.append("detach")

            nursery.start_soon(fill)
            assert (await uffd.next_event())[0] == hva
            before = await host.iommufdd.stats()
            nursery.start_soon(detach)
            drained = before["descriptors"].get("wait", 0) + 2
            await eventually(
                host.iommufdd.stats,
                lambda s: s["descriptors"].get("wait", 0) >= drained,
                "the queue is drained",
            )
            with refused(errno.EBUSY):
                await iommu.destroy(rig.hwpt_id)
            now = await host.iommufdd.stats()
            assert now["responses"] == before["responses"]
            assert now["descriptors"].get("pasid_cache", 0) == before["descriptors"].get("pasid_cache", 0)
            assert "detach" not in over
            await uffd.copy(hva, bytes(PAGE_SIZE))
            await eventually(_said(over), lambda said: "detach" in said, "the detach is over")
            assert (await host.iommufdd.stats())["responses"] == before["responses"] + 1
            asked = (await vm_stats(host))["io_pf_taken"]
            await iommu.destroy(rig.hwpt_id)
            assert (await vm_stats(host))["io_pf_taken"] == asked
            nursery.cancel_scope.cancel()  # what the device had not done when it left it never does
        assert await host.kvmd.violations() == []


def _said(over: list[str]) -> Callable[[], Awaitable[list[str]]]:
    async def look() -> list[str]:
        return over

    return look


FAILURES = {
    "a unit that cannot walk it": (["--unit", "1:no-snoop-control"], errno.EOPNOTSUPP),
    "a second HWPT": ([], errno.EBUSY),
    "of another process": ([], errno.EINVAL),
}


@pytest.mark.defect("B-08")
@pytest.mark.parametrize("why", FAILURES)
async def test_an_alloc_that_undid_itself_put_the_tdp_fd_once(why: str) -> None:
    """B-08: once more, so that the reference of somebody else was gone, and the export with it.

    Each fails after the TDP FD was taken.  A put too many would end the export under the user's fd or the
    first HWPT, one too few would keep it alive behind both: KVM sees it by who has hung up.
    """
    options, number = FAILURES[why]
    async with with_silicon("--devices", "2", "--units", "2", "--device", "1:unit=1", *options) as rig:
        hwpt = await alloc(rig) if why == "a second HWPT" else None
        process = await rig.host.kvmd.start_process() if why == "of another process" else rig.process
        iommu = await rig.host.iommufdd.open_iommu(process)
        device = await rig.host.iommufdd.open_device(1)
        rig.extra += [iommu, device]
        assert rig.tdp_fd is not None
        dev_id = await device.bind(iommu)
        for _ in range(3):
            with refused(number):
                await iommu.hwpt_alloc_kvm(dev_id, rig.tdp_fd)
            stats = await vm_stats(rig.host)
            assert (stats["exported_tdps"], stats["importers"]) == (1, int(hwpt is not None))
        rig.close_tdp_fd()
        if hwpt is not None:
            assert (await vm_stats(rig.host))["exported_tdps"] == 1, "the first HWPT holds it"
            await rig.bound[1].attach(hwpt)
            await rig.bound[1].detach()
            await rig.bound[0].destroy(hwpt)
        await eventually(lambda: vm_stats(rig.host), lambda s: s["exported_tdps"] == 0, "nobody holds it")
        if process is not rig.process:
            process.close()
