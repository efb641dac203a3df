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
from protocol.hw.pasid_entry import PasidEntry
from protocol.pt import bits
from qemu_shim.api import GIB, MIB, PAGE_SIZE, Context, Guest, Scenario
from qemu_shim.scenarios.series.common import PATTERN

HOLE = 3 * GIB
HW_INFO_BYTES = 24
NEEDED = ("smpwc", "sc", "smts")  # coherent walks, snoop control, scalable mode


async def play(ctx: Context) -> None:
    guest = await ctx.boot(records_present=True)
    found = await _devices(ctx, guest)
    found["pgsnp"] = await _forced(ctx)
    later = guest.machine.vm.ioctl("KVM_REGISTER_NONCOHERENT_DMA")
    what = "non-coherent DMA of a device that comes later"
    await ctx.expect_refused(what, errno.EBUSY, "write-back", later)
    found["entries"] = await _entries(ctx, guest)
    await ctx.shut_down(guest)
    await _noncoherent_first(ctx)
    ctx.figures |= found
    ctx.row("devices refused / attached", f"{found['refused']} / {found['attached']}")
    ctx.row("PASID entry", f"PGSNP {found['pgsnp']}")
    ctx.row("entries a walker can see, bit 11 clear", found["entries"])


async def _devices(ctx: Context, guest: Guest) -> dict[str, int]:
    """Attach each further device to the HWPT, if its unit has what is needed."""
    count = len((await ctx.host.device_sim.stats())["devices"])
    found = {"refused": 0, "attached": 1}
    for number in range(1, count):
        found["attached" if await _attach(ctx, guest, number) else "refused"] += 1
    return found


async def _attach(ctx: Context, guest: Guest, number: int) -> bool:
    """Whether its unit allows it, which must be what its registers say."""
    iommu, hwpt_id = guest.machine.iommu, guest.machine.hwpt_id
    device = await ctx.host.iommufdd.open_device(number)
    try:
        dev_id = await device.bind(iommu)
        info = await iommu.ask("IOMMU_GET_HW_INFO", dev_id=dev_id, data_len=HW_INFO_BYTES)
        _, _, ecap = struct.unpack("<QQQ", info.body["data"])
        lacks = [name for name in NEEDED if not getattr(Ecap(ecap), name)]
        if not lacks:
            await device.attach(hwpt_id)
            await device.detach()
            return True
        why = f"ECAP.{lacks[0].upper()}"
        alloc, attach = iommu.hwpt_alloc_kvm(dev_id, guest.machine.tdp_fd), device.attach(hwpt_id)
        await ctx.expect_refused(f"HWPT_ALLOC by device {number}", errno.EOPNOTSUPP, why, alloc)
        await ctx.expect_refused(f"attach of device {number}", errno.EINVAL, why, attach)
        return False
    finally:
        device.close()


async def _forced(ctx: Context) -> int:
    """PGSNP of the device that is attached: what makes its DMA snoop whatever it asks for."""
    device = (await ctx.host.device_sim.stats())["devices"]["dsa0"]
    entry = PasidEntry.from_bytes(device["pasid_entry"])
    ctx.expect(entry.present and entry.pgsnp and entry.pwsnp, f"the PASID entry does not snoop: {entry}")
    return int(entry.pgsnp)


async def _entries(ctx: Context, guest: Guest) -> int:
    """Every entry of every page of the table, after all kinds of them were made; how many are not zero."""
    pages = guest.pages(16)
    await guest.touch(pages[:8])
    for gpa in pages[8:]:
        await guest.fill(gpa, pattern=PATTERN)
    for n in range(4):
        await guest.machine.vcpu.run([("w", HOLE + n * PAGE_SIZE, b"mmio")])
    for at, act in enumerate((guest.age, guest.numa_hint, guest.swap_out)):
        await act(pages[4 * at], 2 * PAGE_SIZE)
    entries = [entry for (entry,) in struct.iter_unpack("<Q", await guest.tables()) if entry]
    ctx.expect(not any(entry & bits.SNOOP for entry in entries), "I2: an entry has bit 11 set")
    return len(entries)


async def _noncoherent_first(ctx: Context) -> None:
    """Registered before: then it is the export that is refused."""
    process = await ctx.host.kvmd.start_process()
    vm = await ctx.host.kvmd.create_vm(process)
    vcpu = await vm.create_vcpu(0)
    try:
        await vm.set_user_memory_region(0, 0, MIB, await process.mmap(MIB))
        await vcpu.set_cpuid(46)
        await vm.ioctl("KVM_REGISTER_NONCOHERENT_DMA")
        await ctx.expect_refused("export with it", errno.EINVAL, "non-coherent", vm.create_tdp_fd())
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
    designs=("shared",),
)
