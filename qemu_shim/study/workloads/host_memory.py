"""A host that is short of memory: somebody else has most of it, and what is left is reclaimed.

`crowded` starts another process that keeps all frames but so many, most of them in huge pages, which are not
swapped: who needs more is told ENOMEM by the host itself.  `Reclaim` plays a memory cgroup over those that
share the rest: when they have more than its limit it ages everything and swaps out what was used longest ago
[mm vmscan.c].  It knows what ageing tells: a device's use of a page only as far as a table of KVM's says so.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from protocol.errors import UapiError
from protocol.units import TIB, align_up
from qemu_shim.api import MIB, PAGE_SIZE, Context
from qemu_shim.scenarios.recorder import PATIENCE_S, QUIET_POLL_S, NeverQuiet
from qemu_shim.vmm.machine import Host
from qemu_shim.vmm.process import Process

OPTIONS = {"kvmd": ("--ram", "1G")}  # of daemons whose host is quickly crowded
HUGE = 2 * MIB
MORE_THAN_THERE_IS = 32 * TIB


@asynccontextmanager
async def crowded(ctx: Context, free_pages: int) -> AsyncIterator[None]:
    """Meanwhile the host has `free_pages` pages for everybody else."""
    await _nothing_taken(ctx.host)
    neighbour = await ctx.host.kvmd.start_process()
    try:
        await _take_all_but(neighbour, free_pages)
        ctx.elsewhere((await ctx.host.kvmd.stats())["frames"])
        yield
    finally:
        neighbour.close()


async def _take_all_but(neighbour: Process, free_pages: int) -> None:
    """In huge pages until the host has no more, and then back what must be free."""
    at, taken = await neighbour.mmap(MORE_THAN_THERE_IS, page_size=HUGE), 0
    try:
        while True:
            await neighbour.write(at + taken, b"\1")
            taken += HUGE
    except UapiError as error:
        if error.errno != errno.ENOMEM:
            raise
    free = free_pages * PAGE_SIZE
    back = align_up(free, HUGE)
    await neighbour.munmap(at + taken - back, back)
    if back > free:
        small = await neighbour.mmap(back - free)
        for start in range(0, back - free, MIB):
            await neighbour.write(small + start, bytes(min(MIB, back - free - start)))


async def _nothing_taken(host: Host) -> None:
    """A process of an earlier run may still be on its way out."""
    with trio.move_on_after(PATIENCE_S):
        while True:
            if not (await host.kvmd.stats())["frames"]:
                return
            await trio.sleep(QUIET_POLL_S)
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

    async def swap_out(self) -> None:
        await self.process.host_action("swap_out", self.hva, self.size)


def chunks(process: Process, hva: int, size: int, chunk_pages: int) -> list[Chunk]:
    step = chunk_pages * PAGE_SIZE
    return [Chunk(process, at, min(step, hva + size - at)) for at in range(hva, hva + size, step)]


class Reclaim:
    """Keeps what the chunks have resident at `limit` pages or less."""

    def __init__(self, ctx: Context, over: Iterable[Chunk], limit: int) -> None:
        self._ctx = ctx
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
            await chunk.swap_out()
            total += await chunk.resident() - resident[chunk]
        return total
