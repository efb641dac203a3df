"""What a small story of yours is written with, beside `qemu_shim/api.py`.

    # A device copies a page while it goes to swap.
    import trio
    from qemu_shim.api import Context
    from simulator.api import Excerpt, story

    @story()
    async def swapped(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(16)
        src, dst = guest.pages(2)
        for _ in excerpt.rounds():
            await guest.write(src, b"mine")
            with excerpt:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.copy, dst, src)
                    await guest.swap_out(src)
            ctx.expect_equal(await guest.read(dst, 4), b"mine", "the copy")

`qemu-shim sim FILE.py` plays it in one order after the other: what is in `with excerpt` in any, the rest in
the default one.  A round leaves memory as it found it, so that many fit into one machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from simulator.search.excerpt import Excerpt
from simulator.stories.story import Play, SmallStory

__all__ = ("Excerpt", "SmallStory", "story")


def story(*, name: str = "", designs: Sequence[str] = ()) -> Callable[[Play], SmallStory]:
    """Makes a small story of the coroutine that plays it.

    Its name is the function's, with dashes, unless it is given; its summary the first line of the function's
    docstring, or its file's.  It is played on `designs`, none named: any.
    """

    def made(play: Play) -> SmallStory:
        text = (play.__doc__ or sys.modules[play.__module__].__doc__ or "").strip()
        called = name or getattr(play, "__name__", "story").replace("_", "-")
        return SmallStory(called, text.partition("\n")[0].rstrip("."), play, tuple(designs))

    return made
