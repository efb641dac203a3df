"""The small stories: a device's access beside one thing that the host, the VMM or a vCPU does.

Each round ends with what must be true whatever came first (the bytes that are read are those of a state
there was) and leaves the memory as it found it, so that another may follow in the same machine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from qemu_shim.api import PAGE_SIZE, Context, DmaFailed, Guest
from simulator.search.excerpt import Excerpt
from simulator.stories.story import SmallStory

_AT = 0x1_8000_0000  # of the slot the story is about; behind all that a machine has of its own
_SLOT_BYTES = 2 * PAGE_SIZE
_PAGES = 16  # of the machine's own memory: pinned whole, where a design pins
_BEFORE, _AFTER = b"before", b"after"

Change = Callable[[Guest, int], Awaitable[Any]]


def _copy_beside(change: Change, *, may_lose: bool = False) -> Callable[[Context, Excerpt], Awaitable[None]]:
    """A device copies a page that something is done to.  `may_lose`: it may be zeroes behind that."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(_PAGES)
        await guest.add_slot(_SLOT_BYTES, _AT)
        src, dst = _AT, _AT + PAGE_SIZE
        right = (_BEFORE, bytes(len(_BEFORE))) if may_lose else (_BEFORE,)
        for _ in excerpt.rounds():
            await guest.write(src, _BEFORE)
            await guest.copy(dst, src)  # so the device has it cached
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.copy, dst, src)
                    await change(guest, src)
            seen = await guest.read(dst, len(_BEFORE))
            ctx.expect(seen in right, f"the copy holds {seen!r}")

    return play


async def _store_beside_discard(ctx: Context, excerpt: Excerpt) -> None:
    """Three times given up beside a device's store, then stored to once more: that must be there."""
    guest = await ctx.boot_for(_PAGES)
    await guest.add_slot(_SLOT_BYTES, _AT)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, _AT)
                for _ in range(3):
                    await guest.discard(_AT)
        await guest.fill(_AT, pattern=0x5A5A)
        ctx.expect(await guest.holds(_AT, PAGE_SIZE, 0x5A5A), "a device's store is lost")
        await guest.discard(_AT)


async def _slot_goes(ctx: Context, excerpt: Excerpt) -> None:
    """A slot is deleted under a device's store: it is stored, or fails, and hurts nobody (R21)."""
    guest = await ctx.boot_for(_PAGES)

    async def store() -> None:
        try:
            await guest.fill(_AT)
        except DmaFailed:
            ctx.say("the store failed: the slot was gone")

    for _ in excerpt.rounds():
        slot = await guest.add_slot(_SLOT_BYTES, _AT)
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store)
                await guest.remove_slot(slot)


async def _cpu_beside_device(ctx: Context, excerpt: Excerpt) -> None:
    """A vCPU and a device touch one absent page first: both see one page."""
    guest = await ctx.boot_for(_PAGES)
    await guest.add_slot(_SLOT_BYTES, _AT)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, _AT, 64)
                await guest.write(_AT + 64, _AFTER)
        ctx.expect(await guest.holds(_AT, 64, 0), "the device's store is lost")
        ctx.expect(await guest.read(_AT + 64, len(_AFTER)) == _AFTER, "the CPU's store is lost")
        await guest.discard(_AT)


STORIES: Mapping[str, SmallStory] = {
    story.name: story
    for story in (
        SmallStory(
            "discard", "a copy beside MADV_DONTNEED of its source", _copy_beside(Guest.discard, may_lose=True)
        ),
        SmallStory("migrate", "a copy beside its source going to another frame", _copy_beside(Guest.migrate)),
        SmallStory("swap", "a copy beside its source going to swap", _copy_beside(Guest.swap_out)),
        SmallStory("age", "a copy beside a look at the accessed bits", _copy_beside(Guest.age)),
        SmallStory("discards", "a store beside three MADV_DONTNEED", _store_beside_discard),
        SmallStory("slot", "a store beside the deletion of its slot", _slot_goes),
        SmallStory("both", "a vCPU and a device touch one page first", _cpu_beside_device),
    )
}
