"""A host that is short of memory: somebody else has most of it, and what is left is reclaimed.

`crowded` starts another process that keeps all frames but so many, most of them in huge pages, which are not
swapped: who needs more is told ENOMEM by the host itself.  `Reclaim` plays a memory cgroup over those that
share the rest: when they have more than its limit it ages everything and swaps out what was used longest ago
[mm vmscan.c].  It knows what ageing tells: a device's use of a page only as far as a table of KVM's says so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.machine import Host
from qemu_shim.process import Process
from qemu_shim.workloads.context import Context
from qemu_shim.workloads.recorder import PATIENCE_S, POLL_S, NeverQuiet

HOST_BYTES = GIB
OPTIONS = {"kvmd": ("--ram", f"{HOST_BYTES // GIB}G")}  # of daemons for a host that can be crowded
HUGE = 2 * MIB


@asynccontextmanager
async def crowded(ctx: Context, free_pages: int) -> AsyncIterator[None]:
    """Meanwhile the host has `free_pages` pages for everybody else."""
    taken = HOST_BYTES - free_pages * PAGE_SIZE
    await _nothing_taken(ctx.host)
    neighbour = await ctx.host.kvmd.start_process()
    ctx.elsewhere(taken // PAGE_SIZE)
    try:
        huge, rest = taken // HUGE * HUGE, taken % HUGE
        at = await neighbour.mmap(huge, page_size=HUGE)
        for page in range(at, at + huge, HUGE):
            await neighbour.write(page, b"\1")
        if rest:
            at = await neighbour.mmap(rest)
            for start in range(0, rest, MIB):
                await neighbour.write(at + start, bytes(min(MIB, rest - start)))
        yield
    finally:
        neighbour.close()


async def _nothing_taken(host: Host) -> None:
    """A process of an earlier run may still be on its way out."""
    with trio.move_on_after(PATIENCE_S):
        while True:
            if not (await host.kvmd.stats())["frames"]:
                return
            await trio.sleep(POLL_S)
    raise NeverQuiet("the host's memory is in use: whoever crowds a host must be the first")


@dataclass(eq=False, slots=True)
class Chunk:
    """Memory that is aged and swapped out as one; `used`: the last scan that found it used."""

    process: Process
    hva: int
    size: int
    used: int = 0

    async def resident(self) -> int:
        return await self.process.resident_pages(self.hva, self.size)

    async def age(self, now: int) -> None:
        if await self.process.host_action("age", self.hva, self.size):
            self.used = now

    async def swap_out(self) -> int:
        return await self.process.host_action("swap_out", self.hva, self.size)


def chunks(process: Process, hva: int, size: int, chunk_pages: int) -> list[Chunk]:
    step = chunk_pages * PAGE_SIZE
    return [Chunk(process, at, min(step, hva + size - at)) for at in range(hva, hva + size, step)]


class Reclaim:
    """Keeps what the chunks have resident at `limit` pages or less."""

    def __init__(self, ctx: Context, over: Iterable[Chunk], limit: int) -> None:
        self._ctx = ctx
        self.swapped = 0
        self._chunks = list(over)
        self._limit = limit
        self._scans = 0

    async def balance(self) -> int:
        """How many pages are resident then."""
        await self._ctx.quiet()
        resident = {chunk: pages for chunk in self._chunks if (pages := await chunk.resident())}
        total = sum(resident.values())
        if total <= self._limit:
            return total
        self._scans += 1
        for chunk in resident:
            await chunk.age(self._scans)
        for chunk in sorted(resident, key=lambda chunk: chunk.used):
            if total <= self._limit:
                break
            self.swapped += await chunk.swap_out()
            total += await chunk.resident() - resident[chunk]
        return total
