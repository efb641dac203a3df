"""DMA that does not wait for what the host or the VMM does meanwhile.

What faults then depends on who is faster, so a workload lets it happen after its last sample, where nothing
is counted any more.  What must hold whoever is faster is checked: no DMA fails, and every page ends up with
what was written there last.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from protocol.errors import UapiError
from qemu_shim.workloads.context import Context, DmaFailed, Guest

WORKERS = 4


async def under_dma(
    ctx: Context, guest: Guest, gpas: Sequence[int], act: Callable[[], Awaitable[None]]
) -> None:
    """Workers have the device write these pages, each its own, a new word each time, while `act` runs."""
    words = dict.fromkeys(gpas, 0)
    over = False

    async def work(own: Sequence[int]) -> None:
        while not over:
            for gpa in own:
                words[gpa] += 1
                try:
                    await guest.fill(gpa, pattern=words[gpa])
                except DmaFailed as failed:
                    ctx.expect(False, f"under DMA: {failed}")
                    return

    async with trio.open_nursery() as nursery:
        for worker in range(WORKERS):
            nursery.start_soon(work, gpas[worker::WORKERS])
        try:
            await act()
        except UapiError as error:
            ctx.expect(False, f"under DMA: {error}")
        over = True
    for gpa, word in words.items():
        found = int.from_bytes(await guest.machine.memory.read(gpa, 8), "little")
        ctx.expect(found == word, f"gpa {gpa:#x} holds {found:#x}, not the {word:#x} that was written last")
