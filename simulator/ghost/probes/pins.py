"""What is pinned: guest frames of a VM, pages of a process or a file, and what the host counts of either.

A pin is written down where it is counted, in one step; a VM's is struck out a while before, when its page is
let go of in `Pinning.put`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from iommufdd.core.pages import Pages
from iommufdd.core.source import Sources
from iommufdd.hmm_client import HmmMirror
from kvmd.core.export.pinning import Pinning
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import Page
from kvmd.core.mm.pins import PinnedPage, PinsByArea
from kvmd.core.slots.memslot import Memslot
from kvmd.core.slots.pinned import AS_ID, Pin, PinnedGfns
from protocol.errors import UapiError
from protocol.units import PAGE_SHIFT, Gfn, Hva, size_of_level
from simulator.ghost.backing import Name
from simulator.ghost.probes.watch import Seams, Watch

seams = Seams()


def _judge_counts(watch: Watch, mm: Mm, *pages: Page) -> None:
    """Behind each change of one of them."""
    held = watch.ghost.held
    for page in pages:
        held.counts_pins(id(page), page.pfn, page.pins)
    for payer in (mm.locked, mm.memory.locked):
        held.counts_paid(id(payer), payer.whose, payer.pages)


# -- guest frames ------------------------------------------------------------------------------------------


@seams.around(PinnedGfns, "add")
def _add_pin(watch: Watch, original: Any, pinned: PinnedGfns, gfn: Gfn, pin: Pin) -> None:
    original(pinned, gfn, pin)
    watch.ghost.pinned(watch.view(pinned, AS_ID), gfn, pin.pfn)
    mm = watch.mm_of[id(pinned)]
    watch.ghost.held.pins(id(pin.page), id(mm.locked), 1)
    _judge_counts(watch, mm, pin.page)


@seams.around(PinnedGfns, "remove")
def _remove_pin(watch: Watch, original: Any, pinned: PinnedGfns, gfn: Gfn) -> Page:
    """Nobody asks for it any more; it is let go of in `Pinning.put`."""
    pin = pinned[gfn]
    page: Page = original(pinned, gfn)
    watch.kept.append(page)
    leaving = watch.view(pinned, AS_ID), gfn, pin.pfn
    watch.ghost.pin_leaves(*leaving)
    watch.pins.setdefault(id(page), []).append(leaving)
    return page


@seams.around(Pinning, "put")
def _put(watch: Watch, original: Any, pinning: Pinning, pages: Iterable[Page]) -> None:
    """Others may have pinned the same pages."""
    pages, mm = [*pages], pinning._frames.mm
    for page in pages:
        watch.ghost.unpinned(*watch.pins[id(page)].pop(0))
        watch.ghost.held.unpins(id(page), id(mm.locked), 1)
    original(pinning, pages)
    _judge_counts(watch, mm, *pages)


@seams.around(Pinning, "follow")
async def _follow(watch: Watch, original: Any, pinning: Pinning, slot: Memslot) -> None:
    """A slot came: who pins everything, and did before, has all of it now, if there is nothing private."""
    before = [request for request in pinning.requests() if request.everything]
    await original(pinning, slot)
    if slot.as_id != AS_ID or slot.readonly or slot.private is not None:
        return
    for request in pinning.requests():
        lacks = set(range(slot.span.start, slot.span.end)) - request.gfns if request in before else ()
        for gfn in sorted(lacks)[:1]:
            watch.ghost.verdicts.say("I22", f"gfn {gfn:#x} came, and who pins everything has it not pinned")


@seams.around(Pinning, "forget")
def _forget(watch: Watch, original: Any, pinning: Pinning, slot: Memslot) -> list[Page]:
    """A slot goes, and what was pinned of it."""
    pages: list[Page] = original(pinning, slot)
    believed = {gfn for request in pinning.requests() for gfn in request.gfns}
    for gfn in believed.difference(pinning.pinned):
        watch.ghost.verdicts.say("I22", f"gfn {gfn:#x} went with its slot, and is believed pinned")
    return pages


# -- pages of a process, or of a file ----------------------------------------------------------------------


@seams.around(Mirror, "__init__")
def _mirror(watch: Watch, original: Any, mirror: Mirror, *args: Any, **named: Any) -> None:
    original(mirror, *args, **named)
    watch.mirror_of[id(mirror.pins)] = mirror


@seams.around(PinsByArea, "add")
def _add_area_pin(
    watch: Watch, original: Any, pins: PinsByArea, area: int, at: Hva, pinned: PinnedPage
) -> None:
    original(pins, area, at, pinned)
    mirror = watch.mirror_of[id(pins)]
    who = watch.name(mirror, "mirror")
    for space, page, frame in _pinned_pages(watch, pins, at, pinned):
        watch.ghost.pinned(space, page, frame)
        watch.ghost.mmus.pins(who, (space, page, page + 1))
    watch.ghost.held.pins(id(pinned.page), id(mirror.payer), pinned.npages)
    _judge_counts(watch, mirror.mm, pinned.page)


@seams.around(PinsByArea, "remove")
def _remove_area_pin(
    watch: Watch, original: Any, pins: PinsByArea, area: int, at: Hva, pinned: PinnedPage
) -> bool:
    removed: bool = original(pins, area, at, pinned)
    if removed:
        for page in _pinned_pages(watch, pins, at, pinned):
            watch.ghost.unpinned(*page)
        payer = watch.mirror_of[id(pins)].payer
        watch.ghost.held.unpins(id(pinned.page), id(payer), pinned.npages)
    return removed


@seams.around(Mirror, "_take_back")
def _take_back(watch: Watch, original: Any, mirror: Mirror, area: int, at: Hva, pinned: PinnedPage) -> None:
    original(mirror, area, at, pinned)
    _judge_counts(watch, mirror.mm, pinned.page)


@seams.around(Mirror, "_pay_with")
def _pay_with(watch: Watch, original: Any, mirror: Mirror, mm: Mm, npages: int) -> None:
    before, was = mirror.payer, mirror.mm
    original(mirror, mm, npages)
    paid = sum(pinned.npages for _, pinned in mirror.pins)
    watch.ghost.held.pays(id(before), id(mirror.payer), paid)
    for each in (was, mm):
        _judge_counts(watch, each)


# -- files, which are pinned by offset ---------------------------------------------------------------------


@seams.around(HmmMirror, "open_file")
async def _open_file(watch: Watch, original: Any, host: HmmMirror, fd: Any) -> int:
    file: int = await original(host, fd)
    watch.files.add((watch.name(host, "host"), file))
    return file


@seams.around(HmmMirror, "close_file")
async def _close_file(watch: Watch, original: Any, host: HmmMirror, file: int) -> None:
    watch.files.discard((watch.name(host, "host"), file))
    await original(host, file)


@seams.around(Pages, "put")
async def _put_pages(watch: Watch, original: Any, pages: Pages) -> None:
    """The last one lets go of their file, too (I14)."""
    await original(pages)
    host = watch.name(pages.source.host, "host")
    if not pages.users and (host, pages.file) in watch.files:
        watch.ghost.verdicts.say("I14", f"nobody has pages of file {pages.file} of {host}, and it is open")


@seams.around(Sources, "change_process")
async def _change_process(watch: Watch, original: Any, sources: Sources, mm: Any) -> None:
    """All is another's, or, if it fails, whose it was; but where a host was cut off, which may have been in
    the middle."""
    before = {mirror: mirror.mm for mirror in watch.mirror_of.values()}
    try:
        await original(sources, mm)
    except UapiError:
        cut_off = any(source.host.is_gone for source in sources._mms)
        for mirror, whose in before.items():
            if mirror.mm is not whose and not cut_off:
                what = f"{watch.name(mirror, 'mirror')} is of mm{mirror.mm.id}"
                watch.ghost.verdicts.say("I6", f"{what}, who did not take it over from mm{whose.id}")
        raise


def _pinned_pages(
    watch: Watch, pins: PinsByArea, at: Hva, pinned: PinnedPage
) -> Iterator[tuple[Name, int, int]]:
    """(space, page of it, frame) of what was asked for; in a file, by the file's own page numbers."""
    mirror = watch.mirror_of[id(pins)]
    space = f"files of {watch.name(mirror, 'mirror')}" if pinned.by_offset else f"mm{mirror.mm.id}"
    inside = at % size_of_level(pinned.level)
    frame = pinned.pfn + (inside >> PAGE_SHIFT)
    for n in range(pinned.size >> PAGE_SHIFT):
        yield space, (at >> PAGE_SHIFT) + n, frame + n
