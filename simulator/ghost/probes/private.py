"""Private memory: guest_memfd files as spaces of their own, and which gfns show them.

A gfn that turns private shows another page from then on, and nothing leads to the one it had: neither the
VM's own tables and caches, nor those of another MMU of its process, which would reach a page that the guest
believes nobody shares (R24).
"""

from __future__ import annotations

from typing import Any

from kvmd.core.slots.guest_memfd import GuestMemfd, MemoryAttributes
from kvmd.core.slots.private_memory import PrivateMemory
from protocol.pt import bits
from protocol.units import PAGE_SHIFT, GfnSpan, Gpa
from simulator.ghost.backing import Shown
from simulator.ghost.probes.watch import Seams, Watch
from simulator.ghost.probes.windows import tell_private, windows
from simulator.ghost.spans import Spans, Translation, merged

seams = Seams()


@seams.around(PrivateMemory, "__init__")
def _private_memory(watch: Watch, original: Any, private: PrivateMemory, *args: Any, **named: Any) -> None:
    original(private, *args, **named)
    watch.private_of[id(private._slots)] = private
    watch.slots_of[id(private.attributes)] = private._slots


@seams.around(PrivateMemory, "set_attributes")
async def _set_attributes(
    watch: Watch, original: Any, private: PrivateMemory, address: Gpa, size: int, attributes: int, flags: int
) -> None:
    """What is private then is what was asked for so far, whatever slots there are."""
    await original(private, address, size, attributes, flags)
    asked = watch.asked_private.setdefault(id(private), Spans())
    start, end = address >> PAGE_SHIFT, address + size >> PAGE_SHIFT
    asked.clear(start, end)
    if attributes:
        asked.put(start, end, Shown(None, start, 0))
    wanted = [(low, high) for low, high, _ in merged(asked)]
    if wanted != [(span.start, span.end) for span in private.attributes]:
        ranges = " and ".join(f"{low:#x}..{high:#x}" for low, high in wanted) or "none"
        watch.ghost.verdicts.say("R24", f"gfns that user space made private are {ranges}, and others are")


@seams.around(GuestMemfd, "page")
def _page(watch: Watch, original: Any, memfd: GuestMemfd, index: int) -> Any:
    page = original(memfd, index)
    name = watch.name(memfd, "guest_memfd")
    if watch.ghost.backing.space(name).get(index) is None:
        there = Translation(page.pfn, bits.READ | bits.WRITE)
        watch.ghost.backs(name, index, index + 1, there, of_file=True)
    return page


@seams.around(GuestMemfd, "drop")
def _drop(watch: Watch, original: Any, memfd: GuestMemfd, pages: range) -> None:
    name = watch.name(memfd, "guest_memfd")
    for start, end, _ in watch.ghost.backing.space(name).within(pages.start, pages.stop):
        watch.ghost.backs(name, start, end, None)
    original(memfd, pages)


@seams.around(MemoryAttributes, "set")
def _set(watch: Watch, original: Any, attributes: MemoryAttributes, span: GfnSpan, *, private: bool) -> None:
    original(attributes, span, private=private)
    slots = watch.slots_of.get(id(attributes))
    others = [view for view in watch.ghost.backing.views if isinstance(view, tuple) and view[0] == "ioas"]
    for slot in slots or ():
        start, end = max(span.start, slot.span.start), min(span.end, slot.span.end)
        if start < end:
            view = watch.view(slots, slot.as_id)
            watch.ghost.converts(view, start, end, others if private else ())
            tell_private(watch, slots, slot, start, end, there=True)
            for low, high, shown in windows(watch, slots, slot):
                first, last = max(low, start), min(high, end)
                if first < last:
                    watch.ghost.shows(view, first, last, shown.moved(first - low))
