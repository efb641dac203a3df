"""coherency: which remapping units may walk KVM's table, and what keeps all DMA on it coherent.

Three notes of the RFC.  A unit whose walks do not snoop would need KVM to flush cache lines; one that cannot
force DMA to snoop, or only entry by entry, would need bit 11 of KVM's entries: each is refused, with its
reason, where an HWPT is allocated and where a device behind it is attached (RFC-48, RFC-52).  Non-coherent
DMA needs guest memory types, which need a vCPU: it excludes an exported TDP (RFC-11).  What remains is one
control a table, PGSNP in the PASID entry (RFC-58), and bit 11 is 0 in every entry (RFC-27).
"""

from __future__ import annotations

import errno
import struct

from protocol.hw.caps import Ecap
from protocol.hw.dsa import Status
from protocol.hw.pasid_entry import PasidEntry
from protocol.pt import bits
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.scenarios.series.stage import Stage, staged
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.iommufd_client import VfioDevice
from qemu_shim.vmm.machine import Host, MachineConfig

HOLE = 3 * GIB
HW_INFO_BYTES = 24
NEEDED = ("smpwc", "sc", "smts")  # coherent walks, snoop control, scalable mode


async def play(ctx: Context) -> None:
    host, report = ctx.host, ctx.report
    async with staged(ctx, MachineConfig(ram_bytes=GIB)) as stage:
        found = await _devices(stage)
        found["pgsnp"] = await _forced(stage)
        await stage.report.expect_refused(
            "non-coherent DMA of a device that comes later",
            errno.EBUSY,
            "write-back",
            stage.guest.vm.ioctl("KVM_REGISTER_NONCOHERENT_DMA"),
        )
        found["entries"] = await _entries(stage)
    await _noncoherent_first(host, report)
    report.figures |= found
    report.rows += [
        ("devices refused / attached", f"{found['refused']} / {found['attached']}"),
        ("PASID entry", f"PGSNP {found['pgsnp']}"),
        ("entries a walker can see, bit 11 clear", f"{found['entries']}"),
    ]


async def _devices(stage: Stage) -> dict[str, int]:
    """Attach each further device to the HWPT, if its unit has what is needed."""
    count = len((await stage.host.device_sim.stats())["devices"])
    found = {"refused": 0, "attached": 1}
    for number in range(1, count):
        device = await stage.host.iommufdd.open_device(number)
        try:
            found["attached" if await _attach(stage, number, device) else "refused"] += 1
        finally:
            device.close()
    return found


async def _attach(stage: Stage, number: int, device: VfioDevice) -> bool:
    """Whether its unit allows it, which must be what its registers say."""
    guest = stage.guest
    dev_id = await device.bind(guest.iommu)
    info = await guest.iommu.ask("IOMMU_GET_HW_INFO", dev_id=dev_id, data_len=HW_INFO_BYTES)
    _, _, ecap = struct.unpack("<QQQ", info.body["data"])
    lacks = [name for name in NEEDED if not getattr(Ecap(ecap), name)]
    if not lacks:
        await device.attach(guest.hwpt_id)
        await device.detach()
        return True
    why = f"ECAP.{lacks[0].upper()}"
    await stage.report.expect_refused(
        f"HWPT_ALLOC by device {number}",
        errno.EOPNOTSUPP,
        why,
        guest.iommu.hwpt_alloc_kvm(dev_id, guest.tdp_fd),
    )
    await stage.report.expect_refused(
        f"attach of device {number}", errno.EINVAL, why, device.attach(guest.hwpt_id)
    )
    return False


async def _forced(stage: Stage) -> int:
    """PGSNP of the device that is attached: what makes its DMA snoop whatever it asks for."""
    device = (await stage.host.device_sim.stats())["devices"]["dsa0"]
    entry = PasidEntry.from_bytes(device["pasid_entry"])
    stage.report.expect(
        entry.present and entry.pgsnp and entry.pwsnp, f"the PASID entry does not snoop: {entry}"
    )
    return int(entry.pgsnp)


async def _entries(stage: Stage) -> int:
    """Every entry of every page of the table, after all kinds of them were made; how many are not zero."""
    guest = stage.guest
    pages = guest.memory.allocate(16)
    await guest.memory.touch([pages + n * PAGE_SIZE for n in range(8)])
    for n in range(8, 16):
        stage.report.expect_equal(await stage.fill(pages + n * PAGE_SIZE), Status.SUCCESS, "DMA write")
    for n in range(4):
        await guest.vcpu.run([("w", HOLE + n * PAGE_SIZE, b"mmio")])
    hva = guest.hva_of(pages)
    for at, action in enumerate(("age", "numa_hint", "swap_out")):
        await guest.process.host_action(action, hva + 4 * at * PAGE_SIZE, 2 * PAGE_SIZE)
    tables = await Inspector(stage.host.kvmd.channel).tables(guest.vm)
    entries = [entry for (entry,) in struct.iter_unpack("<Q", tables) if entry]
    stage.report.expect(not any(entry & bits.SNOOP for entry in entries), "I2: an entry has bit 11 set")
    return len(entries)


async def _noncoherent_first(host: Host, report: Report) -> None:
    """Registered before: then it is the export that is refused."""
    process = await host.kvmd.start_process()
    vm = await host.kvmd.create_vm(process)
    vcpu = await vm.create_vcpu(0)
    try:
        await vm.set_user_memory_region(0, 0, MIB, await process.mmap(MIB))
        await vcpu.set_cpuid(46)
        await vm.ioctl("KVM_REGISTER_NONCOHERENT_DMA")
        await report.expect_refused("export with it", errno.EINVAL, "non-coherent", vm.create_tdp_fd())
        await vm.ioctl("KVM_UNREGISTER_NONCOHERENT_DMA")
    finally:
        for file in (vcpu, vm, process):
            file.close()


SCENARIO = Scenario(
    name="coherency",
    summary="units without coherent walks, snoop control or scalable mode are refused; DMA always snoops",
    tags=("IOMMU page-walk coherency", "Non-coherent DMA", "Enforce DMA cache coherency", "RFC-52", "RFC-58"),
    play=play,
    options={
        "device_sim": (
            *("--devices", "4", "--units", "4"),
            *("--unit", "1:no-walk-coherency", "--device", "1:unit=1"),
            *("--unit", "2:no-snoop-control", "--device", "2:unit=2"),
            *("--unit", "3:no-scalable-mode", "--device", "3:unit=3"),
        )
    },
    designs=(SHARED.name,),
)
