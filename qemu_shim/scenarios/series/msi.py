"""msi: 0xfee00000 to 0xfeefffff is no memory for a device, whatever KVM has there.

The RFC asks how MSI pages are to be mapped where an IOMMU translates them; on x86 none is: a write of four
aligned bytes is an interrupt message, which reaches the VMM, and anything else there is a fault.  So the
device never reaches a memslot over the window, RAM to the vCPU, and nothing has to be mapped or pinned.
"""

from __future__ import annotations

from protocol.hw.dsa import Status
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.scenarios.series.stage import FILLED, Stage, staged
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import MachineConfig

START, BYTES = 0xFEE0_0000, MIB
SLOT = 7
VECTOR = 0x4021


async def play(ctx: Context) -> None:
    params, report = ctx.params, ctx.report
    count = params["interrupts"]
    found: dict[str, int] = {}
    async with staged(ctx, MachineConfig(ram_bytes=GIB)) as stage:
        source = stage.guest.memory.allocate(1)
        await stage.guest.memory.write(source, FILLED)
        for where in ("nothing", "a memslot"):
            if where == "a memslot":
                await stage.guest.add_slot(SLOT, START, BYTES)
                for page in range(START, START + BYTES, PAGE_SIZE):
                    await stage.guest.memory.write(page, FILLED)
            async with stage.counted() as cost:
                delivered = await _messages(stage, count)
                refused = await _others(stage, source)
            report.expect_equal(cost.interrupts, count, "interrupt messages")
            report.expect_equal(cost.faults_recorded, refused, "faults recorded")
            report.expect_equal(cost.io_faults, 0, "page requests for the window")
            report.lines.append(f"{where} behind the window: {delivered} messages, {refused} faults")
            found |= {"interrupts": delivered, "faults": refused}
        await _untouched(stage)
    report.figures |= found | {"window_pages": BYTES // PAGE_SIZE}
    report.rows += [
        ("interrupt messages, each way", f"{found['interrupts']}"),
        ("other accesses refused, each way", f"{found['faults']}"),
        ("pages of the memslot unchanged", f"{BYTES // PAGE_SIZE}"),
    ]


async def _messages(stage: Stage, count: int) -> int:
    """Aligned writes of four bytes over the whole window; how many of them reached the VMM as they were."""
    report, portal = stage.report, stage.guest.portal
    portal.messages.clear()
    sent = [(START + n * BYTES // count // 4 * 4, VECTOR + n) for n in range(count)]
    for addr, data in sent:
        report.expect_equal(await stage.fill(addr, data, 4), Status.SUCCESS, f"a message to {addr:#x}")
    report.expect_equal(list(portal.messages), sent, "messages that reached the VMM")
    return len(portal.messages)


async def _others(stage: Stage, source: int) -> int:
    """Reads, and writes of any other size: each fails and is recorded; how many that were."""
    report = stage.report
    last = START + BYTES - 4
    statuses = [
        await stage.copy(source, START, 4),
        await stage.copy(source, START),
        await stage.copy(source, last, 4),
        *[await stage.fill(START, size=size) for size in (1, 2, 8, PAGE_SIZE)],
        await stage.fill(START + 2, size=4),
        await stage.fill(last + 2, size=2),
        await stage.copy(START, source),
    ]
    report.expect(Status.SUCCESS not in statuses, f"what is no message: {[s.name for s in statuses]}")
    report.expect_equal(await stage.guest.memory.read(source, PAGE_SIZE), FILLED, "the target of the reads")
    return len(statuses)


async def _untouched(stage: Stage) -> None:
    for page in range(START, START + BYTES, PAGE_SIZE):
        stage.report.expect_equal(
            await stage.guest.memory.read(page, PAGE_SIZE), FILLED, f"the memslot's page {page:#x}"
        )


SCENARIO = Scenario(
    name="msi",
    summary="a DMA write of 4 bytes to 0xfeexxxxx is an interrupt message, all else a fault, RAM or not",
    tags=("How to map MSI pages",),
    play=play,
    params={"interrupts": Param(64, 1, 1024, "interrupt messages, spread over the window, each way")},
    designs=(SHARED.name,),
)
