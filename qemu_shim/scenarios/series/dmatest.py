"""dmatest: the in-kernel DMA test the RFC's author ran, on a DSA with block on fault (RFC-108).

Buffers are filled by the CPU first, so they are present in the shared table when the device comes; what
faults is what the CPU never touched: the page of completion records.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from math import inf
from random import Random

import trio

from protocol.hw.dsa import CompletionRecord
from qemu_shim.api import DESIGNS, MIB, Context, Guest, Param, QueueWish, Scenario
from qemu_shim.guest.dmatest import DmaChannel, DmatestParams, Result, Thread
from qemu_shim.guest.idxd import WQ_SIZE

SEED = 108


async def play(ctx: Context) -> None:
    params, design = ctx.params, ctx.design
    blocks = bool(params["block_on_fault"])
    if not blocks:
        design.check_no_block()
    guest = await ctx.boot(ram_bytes=params["ram_mib"] * MIB)
    async with ctx.counted() as cost:
        queues = await guest.devices[0].set_up([QueueWish(block_on_fault=blocks)] * params["channels"])
        results = await run_threads(guest, queues, dmatest_params(params))
    tell(ctx, results)
    if blocks:
        requests = cost.io_faults
        ctx.expect(design.pins == (requests == 0), f"RFC-108: {requests} page requests")


def dmatest_params(params: Mapping[str, int]) -> DmatestParams:
    return DmatestParams(
        iterations=params["iterations"],
        test_buf_size=params["buf_size"],
        threads_per_chan=params["threads_per_chan"],
        dmatest=params["memset"],
        timeout=params["timeout"],
        noverify=bool(params["noverify"]),
        norandom=bool(params["norandom"]),
        verbose=bool(params["verbose"]),
        alignment=params["alignment"],
        transfer_size=params["transfer_size"],
    )


async def run_threads(guest: Guest, channels: Sequence[DmaChannel], params: DmatestParams) -> list[Result]:
    """All threads of all channels at once; their results in the order of their names."""
    threads = [
        Thread(
            f"dma0chan{channel}-{params.kind}{n}",
            queue,
            guest.machine.memory,
            guest.machine.host.loop.kernel.monotonic_ns,
            params,
            Random(f"{SEED} {channel} {n}"),
            within,
        )
        for channel, queue in enumerate(channels)
        for n in range(params.threads_per_chan)
    ]
    async with trio.open_nursery() as nursery:
        for thread in threads:
            nursery.start_soon(thread.run)
    return [thread.result for thread in threads]


async def within(done: Awaitable[CompletionRecord], timeout_ms: int) -> CompletionRecord | None:
    with trio.move_on_after(timeout_ms / 1000 if timeout_ms >= 0 else inf):
        return await done
    return None


def tell(ctx: Context, results: list[Result]) -> None:
    tests = sum(result.tests for result in results)
    failures = sum(result.failures for result in results)
    verified = sum(result.bytes_verified for result in results)
    for result in results:
        for line in (*result.lines, result.summary):
            ctx.say(line)
        ctx.expect(result.code == 0, f"dmatest: {result.thread} returned {result.code}")
    ctx.figures |= {"tests": tests, "failures": failures, "bytes_verified": verified}
    ctx.row("tests / failures", f"{tests} / {failures}")
    ctx.row("bytes verified", verified)
    ctx.expect(failures == 0, f"dmatest: {failures} of {tests} tests failed")


TEST_PARAMS = {
    "iterations": Param(5, 1, 1_000_000, "tests of each thread"),
    "buf_size": Param(4096, 64, 1 << 21, "bytes of each buffer"),
    "threads_per_chan": Param(1, 1, WQ_SIZE, "threads on each channel"),
    "memset": Param(0, 0, 1, "1: set instead of copy"),
    "norandom": Param(1, 0, 1, "0: random lengths and offsets"),
    "alignment": Param(-1, -1, 20, "log2 of lengths and offsets; -1: the device's"),
    "transfer_size": Param(0, 0, 1 << 21, "bytes of each transfer; 0: by norandom"),
    "noverify": Param(0, 0, 1, "1: do not look at the data"),
    "verbose": Param(1, 0, 1, "0: no lines about tests that passed"),
    "timeout": Param(30_000, -1, 600_000, "milliseconds a transfer may take; -1: any"),
}
SCENARIO = Scenario(
    name="dmatest",
    summary="the kernel's DMA test on a dedicated work queue of 16, block on fault, data verified",
    tags=("RFC-108",),
    play=play,
    designs=tuple(DESIGNS),
    params={
        **TEST_PARAMS,
        "channels": Param(1, 1, 8, "work queues, each a channel"),
        "block_on_fault": Param(
            1, 0, 1, "0: a fault would end the descriptor, so the driver touches its records"
        ),
        "ram_mib": Param(1024, 32, 1 << 20, "MiB of guest RAM"),
    },
)
