"""A host that is short of memory: somebody else has most of it, and what is left is reclaimed.

`crowded` starts another process that keeps all frames but so many, most of them in huge pages, which are not
swapped: who needs more is told ENOMEM by the host itself.  `Reclaim` plays a memory cgroup over those that
share the rest: when they have more than its limit it ages everything and swaps out what was used longest ago
[mm vmscan.c].  It knows what ageing tells: a device's use of a page only as far as a table of KVM's says so.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from protocol.units import TIB, align_up
from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest, UapiError

OPTIONS = {"kvmd": ("--ram", "1G")}  # of daemons whose host is quickly crowded
HUGE = 2 * MIB
MORE_THAN_THERE_IS = 32 * TIB


@asynccontextmanager
async def crowded(ctx: Context, free_pages: int) -> AsyncIterator[None]:
    """Meanwhile the host has `free_pages` pages for everybody else."""

    async def nothing_taken() -> bool:  # a process of an earlier run may still be on its way out
        return not (await ctx.host.kvmd.stats())["frames"]

    await ctx.until("the host's memory is free: whoever crowds a host must be the first", nothing_taken)
    neighbour = await ctx.host.kvmd.start_process()
    try:
        # In huge pages until the host has no more, and then back what must be free.
        at, taken = await neighbour.mmap(MORE_THAN_THERE_IS, page_size=HUGE), 0
        while await _had(neighbour.write(at + taken, b"\1")):
            taken += HUGE
        free = free_pages * PAGE_SIZE
        back = align_up(free, HUGE)
        await neighbour.munmap(at + taken - back, back)
        if back > free:
            small = await neighbour.mmap(back - free)
            for start in range(0, back - free, MIB):
                await neighbour.write(small + start, bytes(min(MIB, back - free - start)))
        ctx.elsewhere((await ctx.host.kvmd.stats())["frames"])
        yield
    finally:
        neighbour.close()


async def _had(memory: Awaitable[object]) -> bool:
    """Whether the host had it."""
    try:
        await memory
    except UapiError as error:
        if error.errno != errno.ENOMEM:
            raise
        return False
    return True


@dataclass(eq=False, slots=True)
class Chunk:
    """Memory of a guest that is aged and swapped out as one; `used`: the last scan that found it used."""

    guest: Guest
    gpa: int
    size: int
    used: int = 0

    async def resident(self) -> int:
        return await self.guest.resident_pages(self.gpa, self.size)

    async def age(self, now: int) -> None:
        if await self.guest.age(self.gpa, self.size):
            self.used = now

    async def swap_out(self) -> None:
        await self.guest.swap_out(self.gpa, self.size)


def chunks(guest: Guest, gpa: int, size: int, chunk_pages: int) -> list[Chunk]:
    step = chunk_pages * PAGE_SIZE
    return [Chunk(guest, at, min(step, gpa + size - at)) for at in range(gpa, gpa + size, step)]


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
