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
from qemu_shim.api import PAGE_SIZE, Context, Guest, Scenario
from qemu_shim.scenarios.series.common import FILLED, PATTERN, status_of

ADDRESS_SPACE_1 = 1 << 16  # in the number of a slot
OVER_RAM, ALONE = 0xA_0000, 0xC000_0000
PAGES = 8
SECRET = b"for firmware's eyes only".ljust(PAGE_SIZE, b".")


async def play(ctx: Context) -> None:
    guest = await ctx.boot(records_present=True)
    hva = await _add_smram(guest)
    leaks = await _search(ctx, guest)
    roots = await _roots(ctx, guest)
    export = guest.machine.vm.create_tdp_fd(as_id=1)
    await ctx.expect_refused("export of address space 1", errno.EINVAL, "1", export)
    told = await _flushes(ctx, guest, hva)
    ctx.figures |= {"leaks": leaks, "roots": roots} | told
    ctx.row("bytes of the secret that a device found", leaks)
    ctx.row("roots, of them exported", f"{roots}, 1")
    ctx.row(
        "invalidations: migration / deletion", f"{told['told_of_migration']} / {told['told_of_deletion']}"
    )


async def _add_smram(guest: Guest) -> int:
    """Two slots of address space 1 on one piece of memory, the secret written by a vCPU in SMM."""
    machine = guest.machine
    hva = await machine.process.mmap(2 * PAGES * PAGE_SIZE)
    for n, gpa in enumerate((OVER_RAM, ALONE)):
        size = PAGES * PAGE_SIZE
        await machine.vm.set_user_memory_region(ADDRESS_SPACE_1 | n, gpa, size, hva + n * size)
        for page in range(gpa, gpa + size, PAGE_SIZE):
            await machine.vcpu.run([("w", page, SECRET)], smm=True)
    for page in range(OVER_RAM, OVER_RAM + PAGES * PAGE_SIZE, PAGE_SIZE):
        await guest.write(page, bytes(PAGE_SIZE))
    return hva


async def _search(ctx: Context, guest: Guest) -> int:
    """The device reads and writes everywhere the secret is; how many of its bytes it got."""
    vcpu, leaks, (target,) = guest.machine.vcpu, 0, guest.pages(1)
    await guest.write(target, bytes(PAGE_SIZE))
    for n in range(PAGES):
        over, alone = OVER_RAM + n * PAGE_SIZE, ALONE + n * PAGE_SIZE
        await guest.copy(target, over)
        leaks += sum(byte != 0 for byte in await guest.read(target))
        await guest.fill(over, pattern=PATTERN)
        read, write = guest.copy(target, alone), guest.fill(alone, pattern=PATTERN)
        ctx.expect_equal(await status_of(read), Status.PAGE_FAULT_IR, "DMA read of SMRAM")
        leaks += sum(byte != 0 for byte in await guest.read(target))
        ctx.expect_equal(await status_of(write), Status.PAGE_FAULT_IR, "DMA write to SMRAM")
        ctx.expect_equal(await guest.read(over), FILLED, "normal RAM there")
        ran = await vcpu.run([("r", over, PAGE_SIZE), ("r", alone, PAGE_SIZE)], smm=True)
        ctx.expect_equal(ran.reads, [SECRET, SECRET], "the secret, read in SMM")
    outside = await vcpu.run([("r", ALONE, 8)])
    ctx.expect_equal(outside.exit_reason, ExitReason.MMIO, "the same outside SMM")
    ctx.expect_equal(leaks, 0, "bytes of the secret that the device found")
    return leaks


async def _roots(ctx: Context, guest: Guest) -> int:
    """Each address space has its root; the one of address space 0 is lent out, and no other."""
    roots = (await guest.inspect())["roots"]
    lent = [root["as_id"] for root in roots if root["exported"]]
    ctx.expect_equal(lent, [0], "address spaces lent out")
    ctx.expect_equal(sorted(root["as_id"] for root in roots), [0, 1], "address spaces with a root")
    return len({root["hpa"] for root in roots})


async def _flushes(ctx: Context, guest: Guest, hva: int) -> dict[str, int]:
    """Both are about address space 1 alone, and the importer hears of both; a deletion makes every other
    root invalid, so the one lent out, which cannot be, loses its leaves.
    """
    machine, size = guest.machine, PAGES * PAGE_SIZE
    async with ctx.counted() as migration:
        await machine.process.move_pages(hva, 2 * size)
    async with ctx.counted() as deletion:
        await machine.vcpu.run([("r", ALONE, 8)], smm=True)
        await machine.vm.set_user_memory_region(ADDRESS_SPACE_1 | 1, 0, 0, 0)
    told = {
        "told_of_migration": migration.invalidations,
        "told_of_deletion": deletion.invalidations,
    }
    for name, count in told.items():
        ctx.expect(count > 0, f"RFC-89: {name}: the importer was told nothing")
    ran = await machine.vcpu.run([("r", OVER_RAM, PAGE_SIZE)], smm=True)
    ctx.expect_equal(ran.reads, [SECRET], "what is left of the secret, in SMM")
    async with ctx.counted() as cost:
        await guest.fill(OVER_RAM, pattern=PATTERN)
    ctx.expect_equal(cost.io_faults, 2, "page requests, of the page and of the records'")
    return told


SCENARIO = Scenario(
    name="smm",
    summary="SMM's RAM has a table of its own that no device reaches; its flushes reach importers",
    tags=("Address space of a TDP FD", "RFC-05", "RFC-89", "RFC-96"),
    play=play,
    designs=("shared",),
)
