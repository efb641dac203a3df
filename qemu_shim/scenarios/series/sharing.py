"""sharing: one fault for each page, by whoever comes first (RFC-69, RFC-70).

The vCPU touches half of the pages, the device the other half; then each touches the other's half.  The
second round faults nowhere, and all faults together are as many as there are pages.
"""

from __future__ import annotations

from protocol.hw.dsa import Status
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.measure import Report, Snapshot, check_system, fill_table, snapshot
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import Machine, MachineConfig, machine

PATTERN = 0x5AA5_F00D_CAFE_BEEF


async def play(ctx: Context) -> None:
    host, params, report = ctx.host, ctx.params, ctx.report
    half = params["pages"] // 2
    async with machine(host, MachineConfig(ram_bytes=GIB)) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        await guest.memory.touch([queue.record_page])  # not part of the story
        base = guest.memory.allocate(2 * half)
        by_cpu = [base + n * PAGE_SIZE for n in range(half)]
        by_device = [base + n * PAGE_SIZE for n in range(half, 2 * half)]
        before = await snapshot(host)

        await guest.memory.touch(by_cpu)
        first = await snapshot(host)
        await _write_by_device(queue, by_cpu, report)
        second = await snapshot(host)
        await _write_by_device(queue, by_device, report)
        third = await snapshot(host)
        await _check_by_cpu(guest, by_device, report)
        after = await snapshot(host)
        await check_system(host, report)

    steps = [
        ("vCPU touches its half", before, first, half, 0),
        ("device writes the vCPU's half", first, second, 0, 0),
        ("device writes its own half", second, third, 0, half),
        ("vCPU reads the device's half", third, after, 0, 0),
    ]
    for what, start, end, violations, requests in steps:
        _step(report, what, start, end, violations, requests)
    whole = after.since(before)
    faults = whole.cpu_faults + whole.io_faults
    report.rows += [("distinct pages", f"{2 * half}"), ("faults, vCPU + device", f"{faults}")]
    report.figures |= {"pages": 2 * half, "faults": faults}
    report.expect(faults == 2 * half, f"{faults} faults for {2 * half} pages")
    fill_table(report, before, after)


async def _write_by_device(queue: IdxdWorkQueue, gpas: list[int], report: Report) -> None:
    for gpa in gpas:
        record = await queue.fill(gpa, PATTERN, PAGE_SIZE)
        report.expect(record.status is Status.SUCCESS, f"fill of gpa {gpa:#x}: {record.status.name}")


async def _check_by_cpu(guest: Machine, gpas: list[int], report: Report) -> None:
    expected = PATTERN.to_bytes(8, "little") * (PAGE_SIZE // 8)
    for gpa in gpas:
        report.expect(await guest.memory.read(gpa, PAGE_SIZE) == expected, f"gpa {gpa:#x}: wrong data")


def _step(report: Report, what: str, start: Snapshot, end: Snapshot, violations: int, requests: int) -> None:
    cost = end.since(start)
    report.lines.append(f"{what}: {cost.cpu_faults} EPT violations, {cost.io_faults} page requests")
    report.expect(
        (cost.cpu_faults, cost.io_faults) == (violations, requests),
        f"{what}: expected {violations} EPT violations and {requests} page requests",
    )


SCENARIO = Scenario(
    name="sharing",
    summary="one fault a page, whether the vCPU or the device comes first; counted exactly",
    tags=("RFC-69", "RFC-70"),
    play=play,
    params={"pages": Param(64, 2, 65536, "distinct pages, half for each")},
    designs=(SHARED.name,),
)
