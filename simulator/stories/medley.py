"""Of many changes two at once, whichever come first, beneath a device's stores and a vCPU's.

Written for no mistake: what the others have one by one, to meet what nobody has thought of.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from protocol.uapi import names
from qemu_shim.api import PAGE_SIZE, Context, Guest, RamSlot
from simulator.search.excerpt import Excerpt
from simulator.stories.common import (
    AT,
    MAY_TAKE,
    NEXT,
    PAGES,
    SLOT_BYTES,
    agree,
    if_it_is_let,
    run_store,
    try_fill,
)
from simulator.stories.devices import TWO
from simulator.stories.slots import move
from simulator.stories.story import SmallStory

CHANGES_AT_ONCE = 2

Change = Callable[[], Awaitable[object]]


class _Changes:
    """Of one slot, its memory and a second device; what was there before is there behind each."""

    def __init__(self, guest: Guest, slot: RamSlot, bitmap: int) -> None:
        self._guest = guest
        self._slot = slot
        self._bitmap = bitmap

    @property
    def all(self) -> list[Change]:
        guest, process, slot = self._guest, self._guest.machine.process, self._slot
        return [
            partial(guest.migrate, AT),
            partial(guest.swap_out, AT),
            partial(guest.age, AT),
            partial(guest.numa_hint, AT),
            partial(process.host_action, "merge", slot.hva, slot.size),
            self._forked,
            self._protected,
            self._pinned,
            self._logged,
            self._replaced,
            self._attached,
        ]

    async def _forked(self) -> None:
        child = await self._guest.machine.process.fork()
        child.close()

    async def _protected(self) -> None:
        process, hva = self._guest.machine.process, self._slot.hva
        await process.mprotect(hva, PAGE_SIZE, "r")
        await process.mprotect(hva, PAGE_SIZE, "rw")

    async def _pinned(self) -> None:
        vfio = self._guest.machine.device
        await vfio.pin(AT, PAGE_SIZE)
        await vfio.unpin(AT, PAGE_SIZE)

    async def _logged(self) -> None:
        vm, slot = self._guest.machine.vm, self._slot
        logs = names.KVM_MEM_LOG_DIRTY_PAGES
        await vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, logs)
        await vm.get_dirty_log(slot.slot, self._bitmap)
        await vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva)

    async def _replaced(self) -> None:
        """By the same."""
        self._slot = await move(self._guest, self._slot, self._slot.hva)

    async def _attached(self) -> None:
        """Anew."""
        vfio = self._guest.devices[1].plugged.vfio
        await vfio.detach()
        await vfio.attach(self._guest.machine.hwpt_id)


async def _medley(ctx: Context, excerpt: Excerpt) -> None:
    """Which changes there are is decided by who comes first, as all else is."""
    wishes = ctx.sized(PAGES)
    wishes["vcpus"] = 2
    guest = await ctx.boot(**wishes)
    slot = await guest.add_slot(SLOT_BYTES, AT)
    await guest.plug(1)
    process = guest.machine.process
    await process.madvise(slot.hva, slot.size, "mergeable")
    changes = _Changes(guest, slot, await process.mmap(PAGE_SIZE))

    async def first(change: Change, places: list[int]) -> None:
        if places:
            places.pop()
            await if_it_is_let(change())

    for _ in excerpt.rounds():
        await guest.write(AT, bytes(128))
        await guest.fill(NEXT, 64)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(try_fill, guest, AT + 64)
                nursery.start_soon(run_store, guest, NEXT + 8)
                places = [*range(CHANGES_AT_ONCE)]
                for change in changes.all:
                    nursery.start_soon(first, change, places)
        await agree(ctx, guest, AT)
        await agree(ctx, guest, NEXT)
        await process.madvise_dontneed(slot.hva, slot.size)


MEDLEY = (SmallStory("medley", "of many changes two at once, beneath stores", _medley, MAY_TAKE, TWO),)
