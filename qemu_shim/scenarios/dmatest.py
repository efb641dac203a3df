"""dmatest: the in-kernel DMA test the RFC's author ran, on a DSA with block on fault (RFC-108).

Buffers are filled by the CPU first, so they are present in the shared table when the device comes; what
faults is what the CPU never touched: the page of completion records.
"""

from __future__ import annotations

from time import perf_counter_ns

from protocol.units import GIB
from qemu_shim.guest.dmatest import dmatest
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.machine import Host, MachineConfig, machine
from qemu_shim.measure import Report, check_system, fill_table, snapshot
from qemu_shim.scenarios.scenario import Param, Params, Scenario


async def play(host: Host, params: Params, report: Report) -> None:
    config = MachineConfig(ram_bytes=params["ram_gib"] * GIB)
    async with machine(host, config) as guest:
        before = await snapshot(host, guest)
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=bool(params["block_on_fault"]))
        await queue.enable()
        result = await dmatest(
            queue,
            guest.memory,
            perf_counter_ns,
            iterations=params["iterations"],
            buf_size=params["buf_size"],
        )
        await queue.disable()
        after = await snapshot(host, guest)
        await check_system(host, report, after)
    report.lines += [*result.lines, result.summary]
    report.figures |= {
        "tests": result.tests,
        "failures": result.failures,
        "bytes_verified": result.bytes_verified,
    }
    report.rows += [
        ("tests / failures", f"{result.tests} / {result.failures}"),
        ("bytes verified", f"{result.bytes_verified}"),
    ]
    fill_table(report, before, after)
    report.expect(result.failures == 0, f"dmatest: {result.failures} of {result.tests} tests failed")
    if params["block_on_fault"]:
        requests = report.figures["page_requests"]
        report.expect(requests >= 1, "RFC-108: the device raised no page request")


SCENARIO = Scenario(
    name="dmatest",
    summary="the kernel's DMA test on a dedicated work queue of 16, block on fault, data verified",
    tags=("RFC-108",),
    play=play,
    params={
        "iterations": Param(5, 1, 1_000_000, "tests to run"),
        "buf_size": Param(4096, 64, 1 << 21, "bytes of each buffer"),
        "block_on_fault": Param(
            1, 0, 1, "0: a fault would end the descriptor, so the driver touches its records"
        ),
        "ram_gib": Param(1, 1, 1024, "guest RAM"),
    },
)
