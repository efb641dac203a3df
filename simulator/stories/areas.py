"""Areas of an IOAS, and what they show: whose memory, with which rights, which part of it."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import trio

from qemu_shim.api import PAGE_SIZE, Context, UapiError
from qemu_shim.vmm.designs import IoasContainer
from qemu_shim.vmm.process import Process
from simulator.search.excerpt import Excerpt
from simulator.stories.common import AFTER, AT, BEFORE, OWN_TABLE, PAGES, SLOT_BYTES, try_copy
from simulator.stories.slots import ELSEWHERE
from simulator.stories.story import SmallStory


async def _owners(ctx: Context, excerpt: Excerpt) -> None:
    """A device is to have memory of two processes, at one address in both; on demand it has the VMM's
    alone."""
    guest = await ctx.boot_for(PAGES)
    machine = guest.machine
    assert isinstance(machine.container, IoasContainer)
    iommu, ioas_id, mine = machine.iommu, machine.container.ioas_id, machine.process
    other = await machine.host.kvmd.start_process()
    hva = await mine.mmap(SLOT_BYTES)
    await other.mmap(SLOT_BYTES, addr=hva)
    places = list(zip((AT, ELSEWHERE), (other, mine), (BEFORE, AFTER), guest.pages(2), strict=True))

    async def shown(at: int, process: Process, copied: int) -> None:
        on_demand = not machine.config.design.pins
        with suppress(UapiError) if process is other and on_demand else nullcontext():
            await iommu.ioas_map(ioas_id, process, hva, SLOT_BYTES, at)
            there.append(at)
        await try_copy(guest, copied, at)

    for _ in excerpt.rounds():
        there = list[int]()
        for _, process, said, _ in places:
            await process.write(hva, said)
        with excerpt:
            async with trio.open_nursery() as nursery:
                for at, process, _, copied in places:
                    nursery.start_soon(shown, at, process, copied)
                    nursery.start_soon(process.move_pages, hva, PAGE_SIZE)
        for at, process, said, copied in places:
            if at in there:
                await guest.copy(copied, at)
                seen = await guest.read(copied, len(said))
                whose = "its VMM" if process is mine else "another process"
                ctx.expect_equal(seen, said, f"I28: what a device reads of {whose}")
                await iommu.ioas_unmap(ioas_id, at, SLOT_BYTES)


AREAS = (SmallStory("owners", "a device has memory of two processes", _owners, OWN_TABLE),)
