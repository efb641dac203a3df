"""Units and devices that lack something: what is refused where, and one table walked behind two units."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from protocol.hw.dsa import Status
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.guest.memory import GuestMemory
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.iommufd_client import VfioDevice
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.test_iommufd_uapi import ioas_of, paging
from tests.kit.daemons import Options, eventually, system
from tests.kit.refusals import refused
from tests.kit.vmm import (
    GUEST_START,
    QUEUE_START,
    ProcessCpu,
    Vmm,
    bare_vm,
    bind_device,
    device_stats,
    nothing_left,
    rigged,
    unit_stats,
    vm_stats,
)

MSI = 0xFEE0_0000


@asynccontextmanager
async def with_silicon(
    *options: str, iommufdd: Sequence[str] = (), kvmd: Sequence[str] = (), ram: int = GIB
) -> AsyncIterator[Vmm]:
    """A VM with its TDP FD and device 0 bound, on silicon of that kind."""
    settings: Options = {"device_sim": options, "iommufdd": iommufdd, "kvmd": kvmd}
    with system(settings) as made:
        async with connect_host(made.directory) as host:
            rig = await bare_vm(host, ram=ram)
            rig.tdp_fd = await rig.vm.create_tdp_fd()
            await bind_device(rig)
            try:
                yield rig
            finally:
                rig.close()
            await nothing_left(host)


async def alloc(rig: Vmm, dev_id: int | None = None) -> int:
    assert rig.tdp_fd is not None
    return await rig.bound[0].hwpt_alloc_kvm(dev_id or rig.device_id, rig.tdp_fd)


async def another(rig: Vmm, number: int) -> tuple[VfioDevice, int]:
    """One more device, bound; and its id."""
    device = await rig.host.iommufdd.open_device(number)
    rig.extra.append(device)
    return device, await device.bind(rig.bound[0])


async def queue_of(rig: Vmm, device: VfioDevice, at: int) -> IdxdWorkQueue:
    """A work queue of that device, its completion records at `at`."""
    portal = await device.map_portal()
    rig.extra.append(portal)
    records = GuestMemory(ProcessCpu(rig.process, 0, rig.hva), QUEUE_START + at, GUEST_START)  # type: ignore[arg-type]
    queue = IdxdWorkQueue(portal, records, block_on_fault=True)
    await queue.enable()
    return queue


# -- refused at allocation -----------------------------------------------------------------------------

UNITS = [
    ("--no-snoop-control", "ECAP.SC", "RFC-48"),
    ("--no-scalable-mode", "ECAP.SMTS", "RFC-48"),
    ("--no-walk-coherency", "ECAP.SMPWC", "RFC-48"),
    ("--max-page=2M", "CAP.SSLPS", "RFC-49"),
    ("--no-second-stage", "ECAP.SSTS", "RFC-51"),
    ("--caching-mode", "CAP.CM", "B-32"),
]


@pytest.mark.rfc("RFC-48", "RFC-49", "RFC-51", "RFC-53")
@pytest.mark.defect("B-15", "B-32")
@pytest.mark.parametrize(("option", "why"), [row[:2] for row in UNITS], ids=[row[2] for row in UNITS])
async def test_a_unit_that_cannot_walk_the_table_is_eopnotsupp_with_the_reason(option: str, why: str) -> None:
    """B-15: with a first stage only the root was installed as a first-stage table."""
    async with with_silicon(option) as rig:
        for _ in range(2):
            with refused(errno.EOPNOTSUPP, why):
                await alloc(rig)
        assert (await vm_stats(rig.host))["importers"] == 0
        assert (await rig.host.iommufdd.stats())["hwpts"] == []


# -- refused at attach ---------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-52")
@pytest.mark.parametrize(("option", "why"), [row[:2] for row in UNITS], ids=[row[2] for row in UNITS])
async def test_behind_a_second_weaker_unit_attach_is_einval_and_the_device_stays_blocked(
    option: str, why: str
) -> None:
    weaker = f"1:{option.removeprefix('--')}"
    async with with_silicon(
        *("--devices", "2", "--units", "2", "--unit", weaker, "--device", "1:unit=1")
    ) as rig:
        hwpt = await alloc(rig)
        second, _ = await another(rig, 1)
        with refused(errno.EINVAL, why):
            await second.attach(hwpt)
        with refused(errno.ENXIO, "BUSMASTER_EN"):
            await queue_of(rig, second, 0)
        stats = await device_stats(rig.host, 1)
        assert (stats["work_descriptors"], stats["bytes_moved"], stats["page_request_groups"]) == (0, 0, 0)
        await rig.bound[1].attach(hwpt)


@pytest.mark.rfc("RFC-61")
@pytest.mark.parametrize(
    "options",
    [["--no-ats"], ["--no-pri"], ["--no-device-tlb"], ["--no-prs"], ["--device", "0:no-pri"]],
    ids=str,
)
async def test_without_ats_or_page_requests_on_either_side_attach_is_enodev(options: list[str]) -> None:
    async with with_silicon(*options) as rig:
        iommu, device = rig.bound
        hwpt = await alloc(rig)
        with refused(errno.ENODEV):
            await device.attach(hwpt)
        await iommu.destroy(hwpt)
        if "--no-device-tlb" not in options:
            await device.attach(await paging(rig, await ioas_of(rig)))


@pytest.mark.rfc("RFC-62", "RFC-107")
async def test_a_device_whose_page_requests_are_on_already_attaches_and_keeps_them_on() -> None:
    async with with_silicon("--pri-on") as rig:
        _, device = rig.bound
        hwpt = await alloc(rig)
        queue = None
        for n in range(3):
            await device.attach(hwpt)
            queue = queue or await queue_of(rig, device, 0)
            record = await queue.fill(GUEST_START + n * PAGE_SIZE, 0, PAGE_SIZE)
            assert record.status is Status.SUCCESS
            await device.detach()


@pytest.mark.rfc("RFC-63")
async def test_a_device_with_pasid_whose_responses_need_none_is_einval() -> None:
    async with with_silicon("--devices", "2", "--pasid-optional", "--device", "1:no-pasid") as rig:
        hwpt = await alloc(rig)
        with refused(errno.EINVAL, "PASID"):
            await rig.bound[1].attach(hwpt)
        second, _ = await another(rig, 1)
        await second.attach(hwpt)


# -- two units -----------------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-90", "RFC-94")
async def test_a_page_taken_away_is_forgotten_behind_every_unit() -> None:
    async with with_silicon("--devices", "2", "--units", "2", "--device", "1:unit=1") as rig:
        hwpt = await alloc(rig)
        second, _ = await another(rig, 1)
        queues = []
        for n, device in enumerate((rig.bound[1], second)):
            await device.attach(hwpt)
            queues.append(await queue_of(rig, device, n * PAGE_SIZE))
        page = rig.memory.allocate(1)
        for pattern in range(1, 9):
            for queue in queues:
                assert (await queue.fill(page, pattern, PAGE_SIZE)).status is Status.SUCCESS
            assert await rig.process.move_pages(rig.hva + page, PAGE_SIZE) == 1
        for number in (0, 1):
            stats = await device_stats(rig.host, number)
            assert stats["stale_accesses"] == 0
            assert stats["devtlb_misses"] >= 8, "each time the page moved, each device asked its unit again"


@pytest.mark.rfc("RFC-91")
@pytest.mark.parametrize("options", [["--no-psi"], ["--mamv", "0"], ["--units", "2", "--unit", "1:no-psi"]])
async def test_every_unit_is_sent_only_descriptors_it_knows(options: list[str]) -> None:
    """Any other would stop its queue, and the ack would never come."""
    async with with_silicon(*options, "--devices", "1") as rig:
        hwpt = await alloc(rig)
        await rig.bound[1].attach(hwpt)
        queue = await queue_of(rig, rig.bound[1], 0)
        page = rig.memory.allocate(4)
        for n in range(4):
            assert (await queue.fill(page + n * PAGE_SIZE, 1, PAGE_SIZE)).status is Status.SUCCESS
        assert await rig.process.move_pages(rig.hva + page, 4 * PAGE_SIZE) == 4
        assert (await queue.fill(page, 2, PAGE_SIZE)).status is Status.SUCCESS
        assert (await device_stats(rig.host))["stale_accesses"] == 0


# -- devices that fault only in part -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iommufdd", "attached"),
    [
        ([], [True, False, False]),
        (["--fault-policy", "declared"], [True, False, False]),
        (["--fault-policy", "trust"], [True, True, False]),  # there is nothing to trust in
        (["--fault-policy", "allow-list", "--may-fault", "6a:02.0"], [False, True, False]),
        (["--fault-policy", "allow-list"], [False, False, False]),
    ],
    ids=str,
)
async def test_who_may_be_attached_is_policy_and_pinned_memory_is_for_everybody(
    iommufdd: list[str], attached: list[bool]
) -> None:
    devices = ["--device", "1:fault-capability=partial", "--device", "2:fault-capability=none"]
    async with with_silicon("--devices", "3", *devices, iommufdd=iommufdd, ram=16 * MIB) as rig:
        hwpt = await alloc(rig)
        found = [rig.bound[1], (await another(rig, 1))[0], (await another(rig, 2))[0]]
        for device, may in zip(found, attached, strict=True):
            if may:
                await device.attach(hwpt)
                continue
            trusted = "trust" in iommufdd
            with refused(*(errno.ENODEV, "cannot ask") if trusted else (errno.EINVAL, "pinned")):
                await device.attach(hwpt)
            await device.attach(hwpt, pinned=True)
        pinned = (await vm_stats(rig.host))["pinned_pages"]
        assert pinned == (0 if all(attached) else 16 * MIB // PAGE_SIZE)
        assert [hwpt["functions"] for hwpt in (await rig.host.iommufdd.stats())["hwpts"]] == [3]


# -- what an attach does not map -----------------------------------------------------------------------


@pytest.mark.rfc("RFC-64")
@pytest.mark.parametrize("touched", [0, 5])
async def test_an_attach_changes_no_byte_of_the_table_and_pins_no_page(host: Host, touched: int) -> None:
    """Neither of an empty table nor of one that has pages: read as bytes, counted by the host."""

    async def seen(rig: Vmm) -> tuple[object, ...]:
        stats = await host.kvmd.stats()
        tables = await Inspector(host.kvmd.channel).tables(rig.vm)
        memory = stats["memory"]
        return tables, stats["frames"], stats["table_pages"], memory["pinned_pages"], memory["pages_pinned"]

    async with rigged(host) as rig:
        _, device = rig.bound
        pages = rig.memory.allocate(8)
        await rig.memory.touch([pages + n * PAGE_SIZE for n in range(touched)])
        await device.detach()
        before = await seen(rig), await vm_stats(host)
        await device.attach(rig.hwpt_id)
        assert (await seen(rig), await vm_stats(host)) == before
        assert before[1]["pages_4k"] == touched
        assert before[0][3] == 0


async def test_an_interrupt_message_needs_no_mapping_and_anything_else_there_is_a_fault(host: Host) -> None:
    async with rigged(host) as rig:
        assert rig.queue is not None
        before = await unit_stats(host), (await host.iommufdd.stats())["faults_recorded"]
        record = await rig.queue.fill(MSI | 0x2000, 0x4041, 4)
        assert record.status is Status.SUCCESS
        after = await unit_stats(host)
        assert after["interrupts"] == before[0]["interrupts"] + 1
        assert after["interrupt_messages"][-1] == [0x6A08, MSI | 0x2000, 0x4041]
        for size in (8, PAGE_SIZE):
            assert (await rig.queue.fill(MSI, 1, size)).status is not Status.SUCCESS
        assert (await rig.copy(rig.memory.allocate(1), MSI, 4)).status is not Status.SUCCESS
        await eventually(
            host.iommufdd.stats, lambda s: s["faults_recorded"] == before[1] + 3, "the faults are told"
        )
        assert (await unit_stats(host))["interrupts"] == after["interrupts"]
