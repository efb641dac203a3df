"""write-tracking: a page whose every store KVM wants to see, and a device that writes to it (RFC-73).

The RFC leaves the conflict open: a vCPU's store to a tracked page is emulated, and nobody can emulate DMA.
Here the entry is writable for nobody while the page is tracked; the device reads, and what it writes is
refused after one page request each, as often as it tries.
"""

from __future__ import annotations

from protocol.hw.dsa import Status
from protocol.pt import bits
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.scenarios.series.stage import FILLED, Stage, staged
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import MachineConfig


async def play(ctx: Context) -> None:
    params, report = ctx.params, ctx.report
    tries = params["tries"]
    async with staged(ctx, MachineConfig(ram_bytes=GIB)) as stage:
        guest = stage.guest
        tracked, target = guest.memory.allocate(2), guest.memory.allocate(1)
        await guest.memory.write(tracked, bytes(2 * PAGE_SIZE))
        stage.report.expect_equal(await stage.fill(tracked), Status.SUCCESS, "DMA write before")
        await guest.vm.page_track_add(tracked)
        stores = await _store(stage, tracked, tries)
        reads = await _read(stage, tracked, target)
        refused = await _write(stage, tracked, tries)
        stage.report.expect_equal(
            await stage.fill(tracked + PAGE_SIZE), Status.SUCCESS, "DMA write to its neighbour"
        )
        await guest.vm.page_track_remove(tracked)
        await _untracked(stage, tracked)
    report.figures |= {"tries": tries, "stores_emulated": stores, "requests_of_reads": reads} | refused
    report.rows += [
        ("stores of a vCPU / emulated", f"{tries} / {stores}"),
        ("DMA writes / refused", f"{2 * tries} / {refused['dma_refused']}"),
        ("page requests, faults in KVM for them", f"{refused['requests']}, {refused['io_faults']}"),
    ]


async def _store(stage: Stage, gpa: int, tries: int) -> int:
    """Each store of the CPU is emulated and the entry stays as it is."""
    async with stage.counted() as cost:
        for n in range(tries):
            await stage.guest.memory.write(gpa + 8 * n, n.to_bytes(8, "little"))
            await _read_only(stage, gpa)
    stage.report.expect_equal(cost.stores_emulated, tries, "stores emulated")
    for n in range(tries):
        word = await stage.guest.memory.read(gpa + 8 * n, 8)
        stage.report.expect_equal(int.from_bytes(word, "little"), n, f"the store at {8 * n}")
    return cost.stores_emulated


async def _read(stage: Stage, gpa: int, target: int) -> int:
    """The device reads what the CPU wrote; its page requests, but for the one for the target."""
    async with stage.counted() as cost:
        stage.report.expect_equal(await stage.copy(target, gpa), Status.SUCCESS, "DMA read")
    wanted = await stage.guest.memory.read(gpa, PAGE_SIZE)
    stage.report.expect_equal(
        await stage.guest.memory.read(target, PAGE_SIZE), wanted, "what the device read"
    )
    return cost.io_faults - 1


async def _write(stage: Stage, gpa: int, tries: int) -> dict[str, int]:
    """Writes, and copies of the page onto itself, which read it as well: none gets anywhere, none loops."""
    before = await stage.guest.memory.read(gpa, PAGE_SIZE)
    statuses = []
    async with stage.counted() as cost:
        for _ in range(tries):
            statuses += [await stage.fill(gpa), await stage.copy(gpa + 8, gpa, 64)]
            await _read_only(stage, gpa)
    stage.report.expect_equal(set(statuses), {Status.PAGE_FAULT_IR}, "DMA writes")
    stage.report.expect_equal(
        await stage.guest.memory.read(gpa, PAGE_SIZE), before, "the page after DMA writes"
    )
    found = {
        "dma_refused": statuses.count(Status.PAGE_FAULT_IR),
        "requests": cost.io_faults,
        "io_faults": cost.io_faults_refused,
    }
    for name, count in found.items():
        stage.report.expect_equal(count, 2 * tries, f"{name} for {2 * tries} DMA writes")
    stage.report.expect_equal((cost.pages_mapped_io, cost.fault_retries), (0, 0), "pages mapped, retries")
    return found


async def _read_only(stage: Stage, gpa: int) -> None:
    """No walker finds W."""
    found = await stage.walks(gpa)
    for walker in ("cpu", "unit"):
        _, _, _, rights, *_ = found[walker]
        stage.report.expect(not rights & bits.WRITE, f"a tracked page is writable for the {walker}")


async def _untracked(stage: Stage, gpa: int) -> None:
    """Both write again; the entry is made writable by whoever comes first."""
    async with stage.counted() as cost:
        stage.report.expect_equal(await stage.fill(gpa), Status.SUCCESS, "DMA write once untracked")
        stage.report.expect_equal(
            await stage.guest.memory.read(gpa, PAGE_SIZE), FILLED, "what the device wrote"
        )
        await stage.guest.memory.write(gpa, b"cpu")
    stage.report.expect_equal((cost.io_faults, cost.stores_emulated), (1, 0), "requests, emulated stores")
    stage.report.expect_equal(await stage.guest.memory.read(gpa, 3), b"cpu", "what the CPU wrote")


SCENARIO = Scenario(
    name="write-tracking",
    summary="a tracked page: a vCPU's store is emulated, a device's refused after one request, never mapped",
    tags=("KVM page write-tracking", "RFC-73"),
    play=play,
    params={"tries": Param(8, 1, 256, "stores of the vCPU, and DMA writes of two kinds")},
    designs=(SHARED.name,),
)
