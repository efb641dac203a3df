"""smm: what only system-management mode may see, a device never sees (RFC-05, RFC-89, RFC-96).

Address space 1 has memslots and a root of its own.  Its secret lies in two places: over RAM that address
space 0 has as well, as on a PC, and where address space 0 has nothing.  To the device the first is the normal
RAM, the second nothing at all.  Only the normal table can be exported; but an importer hears of every flush,
those of the other address space too.
"""

from __future__ import annotations

import errno

from protocol.hw.dsa import Status
from protocol.kvm_run import ExitReason
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.scenarios.series.stage import FILLED, Stage, staged
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import MachineConfig

ADDRESS_SPACE_1 = 1 << 16  # in the number of a slot
OVER_RAM, ALONE = 0xA_0000, 0xC000_0000
PAGES = 8
SECRET = b"for firmware's eyes only".ljust(PAGE_SIZE, b".")


async def play(ctx: Context) -> None:
    report = ctx.report
    async with staged(ctx, MachineConfig(ram_bytes=GIB)) as stage:
        hva = await _add_smram(stage)
        leaks = await _search(stage)
        roots = await _roots(stage)
        await report.expect_refused(
            "export of address space 1", errno.EINVAL, "1", stage.guest.vm.create_tdp_fd(as_id=1)
        )
        told = await _flushes(stage, hva)
    report.figures |= {"leaks": leaks, "roots": roots} | told
    report.rows += [
        ("bytes of the secret that a device found", f"{leaks}"),
        ("roots, of them exported", f"{roots}, 1"),
        ("invalidations: migration / deletion", f"{told['told_of_migration']} / {told['told_of_deletion']}"),
    ]


async def _add_smram(stage: Stage) -> int:
    """Two slots of address space 1 on one piece of memory, the secret written by a vCPU in SMM."""
    guest = stage.guest
    hva = await guest.process.mmap(2 * PAGES * PAGE_SIZE)
    for n, gpa in enumerate((OVER_RAM, ALONE)):
        size = PAGES * PAGE_SIZE
        await guest.vm.set_user_memory_region(ADDRESS_SPACE_1 | n, gpa, size, hva + n * size)
        for page in range(gpa, gpa + size, PAGE_SIZE):
            await guest.vcpu.run([("w", page, SECRET)], smm=True)
    for page in range(OVER_RAM, OVER_RAM + PAGES * PAGE_SIZE, PAGE_SIZE):
        await guest.memory.write(page, bytes(PAGE_SIZE))
    return hva


async def _search(stage: Stage) -> int:
    """The device reads and writes everywhere the secret is; how many of its bytes it got."""
    report, guest = stage.report, stage.guest
    leaks, target = 0, guest.memory.allocate(1)
    await guest.memory.write(target, bytes(PAGE_SIZE))
    for n in range(PAGES):
        over, alone = OVER_RAM + n * PAGE_SIZE, ALONE + n * PAGE_SIZE
        report.expect_equal(await stage.copy(target, over), Status.SUCCESS, "DMA read of RAM under SMRAM")
        leaks += sum(byte != 0 for byte in await guest.memory.read(target, PAGE_SIZE))
        report.expect_equal(await stage.fill(over), Status.SUCCESS, "DMA write to RAM under SMRAM")
        report.expect_equal(await stage.copy(target, alone), Status.PAGE_FAULT_IR, "DMA read of SMRAM")
        leaks += sum(byte != 0 for byte in await guest.memory.read(target, PAGE_SIZE))
        report.expect_equal(await stage.fill(alone), Status.PAGE_FAULT_IR, "DMA write to SMRAM")
        report.expect_equal(await guest.memory.read(over, PAGE_SIZE), FILLED, "normal RAM there")
        ran = await guest.vcpu.run([("r", over, PAGE_SIZE), ("r", alone, PAGE_SIZE)], smm=True)
        report.expect_equal(ran.reads, [SECRET, SECRET], "the secret, read in SMM")
    outside = await guest.vcpu.run([("r", ALONE, 8)])
    report.expect_equal(outside.exit_reason, ExitReason.MMIO, "the same outside SMM")
    report.expect_equal(leaks, 0, "bytes of the secret that the device found")
    return leaks


async def _roots(stage: Stage) -> int:
    """Each address space has its root; the one of address space 0 is lent out, and no other."""
    roots = (await stage.inspect())["roots"]
    lent = [root["as_id"] for root in roots if root["exported"]]
    stage.report.expect_equal(lent, [0], "address spaces lent out")
    stage.report.expect_equal(sorted(root["as_id"] for root in roots), [0, 1], "address spaces with a root")
    return len({root["hpa"] for root in roots})


async def _flushes(stage: Stage, hva: int) -> dict[str, int]:
    """Both are about address space 1 alone, and the importer hears of both; a deletion makes every other
    root invalid, so the one lent out, which cannot be, loses its leaves.
    """
    guest, report = stage.guest, stage.report
    size = PAGES * PAGE_SIZE
    async with stage.counted() as migration:
        await guest.process.move_pages(hva, 2 * size)
    async with stage.counted() as deletion:
        await guest.vcpu.run([("r", ALONE, 8)], smm=True)
        await guest.vm.set_user_memory_region(ADDRESS_SPACE_1 | 1, 0, 0, 0)
    told = {
        "told_of_migration": migration.invalidations,
        "told_of_deletion": deletion.invalidations,
    }
    for name, count in told.items():
        report.expect(count > 0, f"RFC-89: {name}: the importer was told nothing")
    ran = await guest.vcpu.run([("r", OVER_RAM, PAGE_SIZE)], smm=True)
    report.expect_equal(ran.reads, [SECRET], "what is left of the secret, in SMM")
    async with stage.counted() as cost:
        report.expect_equal(await stage.fill(OVER_RAM), Status.SUCCESS, "DMA write afterwards")
    report.expect_equal(cost.io_faults, 2, "page requests, of the page and of the records'")
    return told


SCENARIO = Scenario(
    name="smm",
    summary="SMM's RAM has a table of its own that no device reaches; its flushes reach importers",
    tags=("Address space of a TDP FD", "RFC-05", "RFC-89", "RFC-96"),
    play=play,
    designs=(SHARED.name,),
)
