"""DMA that does not wait for what the host or the VMM does meanwhile.

What faults then depends on who is faster, so a workload lets it happen after its last sample, where nothing
is counted any more.  What must hold whoever is faster is checked: no DMA fails, and nothing that was written
is lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from qemu_shim.api import PAGE_SIZE, Context, DmaFailed, Guest, UapiError

WORKERS = 4


async def under_dma(
    ctx: Context, guest: Guest, gpas: Sequence[int], act: Callable[[], Awaitable[None]]
) -> None:
    """Workers have the device read and write these pages, each its own, a new word each time, while `act`
    runs.
    """
    words: dict[int, int] = {}
    over = False

    async def work(own: Sequence[int]) -> None:
        try:
            for gpa in own:
                words[gpa] = 1
                await guest.fill(gpa, pattern=words[gpa])
            while not over:
                for gpa in own:
                    equal = await guest.holds(gpa, PAGE_SIZE, words[gpa])
                    ctx.expect(equal, f"under DMA: the {words[gpa]:#x} written to gpa {gpa:#x} is lost")
                    words[gpa] += 1
                    await guest.fill(gpa, pattern=words[gpa])
        except DmaFailed as failed:
            ctx.expect(False, f"under DMA: {failed}")

    async with trio.open_nursery() as nursery:
        for worker in range(min(WORKERS, len(gpas))):
            nursery.start_soon(work, gpas[worker::WORKERS])
        try:
            await act()
        except UapiError as error:
            ctx.expect(False, f"under DMA: {error}")
        over = True
    for gpa, word in words.items():
        found = int.from_bytes(await guest.read(gpa, 8), "little")
        ctx.expect(found == word, f"after DMA: the {word:#x} written to gpa {gpa:#x} is lost: {found:#x}")
