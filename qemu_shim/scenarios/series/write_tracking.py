"""write-tracking: a page whose every store KVM wants to see, and a device that writes to it (RFC-73).

The RFC leaves the conflict open: a vCPU's store to a tracked page is emulated, and nobody can emulate DMA.
Here the entry is writable for nobody while the page is tracked; the device reads, and what it writes is
refused after one page request each, as often as it tries.
"""

from __future__ import annotations

from protocol.hw.dsa import Status
from protocol.pt import bits
from qemu_shim.api import PAGE_SIZE, Context, Guest, Param, Scenario
from qemu_shim.scenarios.series.common import FILLED, PATTERN, status_of


async def play(ctx: Context) -> None:
    tries = ctx.params["tries"]
    guest = await ctx.boot(records_present=True)
    tracked, neighbour, target = guest.pages(3)
    await guest.write(tracked, bytes(2 * PAGE_SIZE))
    await guest.fill(tracked, pattern=PATTERN)
    await guest.machine.vm.page_track_add(tracked)
    stores = await _store(ctx, guest, tracked, tries)
    reads = await _read(ctx, guest, tracked, target)
    refused = await _write(ctx, guest, tracked, tries)
    await guest.fill(neighbour, pattern=PATTERN)
    await guest.machine.vm.page_track_remove(tracked)
    await _untracked(ctx, guest, tracked)
    ctx.figures |= {"tries": tries, "stores_emulated": stores, "requests_of_reads": reads} | refused
    ctx.row("stores of a vCPU / emulated", f"{tries} / {stores}")
    ctx.row("DMA writes / refused", f"{2 * tries} / {refused['dma_refused']}")
    ctx.row("page requests, faults in KVM for them", f"{refused['requests']}, {refused['io_faults']}")


async def _store(ctx: Context, guest: Guest, gpa: int, tries: int) -> int:
    """Each store of the CPU is emulated and the entry stays as it is."""
    async with ctx.counted() as cost:
        for n in range(tries):
            await guest.write(gpa + 8 * n, n.to_bytes(8, "little"))
            await _read_only(ctx, guest, gpa)
    ctx.expect_equal(cost.stores_emulated, tries, "stores emulated")
    for n in range(tries):
        word = await guest.read(gpa + 8 * n, 8)
        ctx.expect_equal(int.from_bytes(word, "little"), n, f"the store at {8 * n}")
    return cost.stores_emulated


async def _read(ctx: Context, guest: Guest, gpa: int, target: int) -> int:
    """The device reads what the CPU wrote; its page requests, but for the one for the target."""
    async with ctx.counted() as cost:
        await guest.copy(target, gpa)
    ctx.expect_equal(await guest.read(target), await guest.read(gpa), "what the device read")
    return cost.io_faults - 1


async def _write(ctx: Context, guest: Guest, gpa: int, tries: int) -> dict[str, int]:
    """Writes, and copies of the page onto itself, which read it as well: none gets anywhere, none loops."""
    before = await guest.read(gpa)
    statuses = []
    async with ctx.counted() as cost:
        for _ in range(tries):
            for write in (guest.fill(gpa, pattern=PATTERN), guest.copy(gpa + 8, gpa, 64)):
                statuses.append(await status_of(write))
            await _read_only(ctx, guest, gpa)
    ctx.expect_equal(set(statuses), {Status.PAGE_FAULT_IR}, "DMA writes")
    ctx.expect_equal(await guest.read(gpa), before, "the page after DMA writes")
    found = {
        "dma_refused": statuses.count(Status.PAGE_FAULT_IR),
        "requests": cost.io_faults,
        "io_faults": cost.io_faults_refused,
    }
    for name, count in found.items():
        ctx.expect_equal(count, 2 * tries, f"{name} for {2 * tries} DMA writes")
    ctx.expect_equal((cost.pages_mapped_io, cost.fault_retries), (0, 0), "pages mapped, retries")
    return found


async def _read_only(ctx: Context, guest: Guest, gpa: int) -> None:
    """No walker finds W."""
    found = await guest.inspect_gpa(gpa)
    for walker in ("cpu", "unit"):
        _, _, _, rights, *_ = found[walker]
        ctx.expect(not rights & bits.WRITE, f"a tracked page is writable for the {walker}")


async def _untracked(ctx: Context, guest: Guest, gpa: int) -> None:
    """Both write again; the entry is made writable by whoever comes first."""
    async with ctx.counted() as cost:
        await guest.fill(gpa, pattern=PATTERN)
        ctx.expect_equal(await guest.read(gpa), FILLED, "what the device wrote")
        await guest.write(gpa, b"cpu")
    ctx.expect_equal((cost.io_faults, cost.stores_emulated), (1, 0), "requests, emulated stores")
    ctx.expect_equal(await guest.read(gpa, 3), b"cpu", "what the CPU wrote")


SCENARIO = Scenario(
    name="write-tracking",
    summary="a tracked page: a vCPU's store is emulated, a device's refused after one request, never mapped",
    tags=("KVM page write-tracking", "RFC-73"),
    play=play,
    params={"tries": Param(8, 1, 256, "stores of the vCPU, and DMA writes of two kinds")},
    designs=("shared",),
)
