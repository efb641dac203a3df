"""What an IOAS shows of its processes, and which tables are of it.

An area is seen before anything of it is mapped, and goes when nothing of it is reached any more.  Whose
memory it is iommufdd knows by a cookie, as kvmd does.  Pages of a file count as not watched.
"""

from __future__ import annotations

from typing import Any

from iommufdd.core.area import Area
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.pages import Pages
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.space import AddressSpace
from protocol.pt import bits
from protocol.units import PAGE_SHIFT, Hva
from simulator.ghost.backing import Name, Shown
from simulator.ghost.probes.mmus import pages_of
from simulator.ghost.probes.watch import Seams, Watch

seams = Seams()


@seams.around(AddressSpace, "__init__")
def _address_space(watch: Watch, original: Any, mm: AddressSpace, *args: Any, **named: Any) -> None:
    original(mm, *args, **named)
    watch.processes.append(mm)


def _view(watch: Watch, ioas: object) -> Name:
    return "ioas", watch.name(ioas, "ioas")


@seams.around(HwptPaging, "__init__")
def _hwpt(watch: Watch, original: Any, hwpt: HwptPaging, *args: Any, **named: Any) -> None:
    original(hwpt, *args, **named)
    watch.ghost.root_is_of(hwpt.table.root, _view(watch, hwpt.ioas))
    if isinstance(hwpt.ioas, IoasOnDemand) and hwpt.ioas not in watch.on_demand:
        watch.on_demand.append(hwpt.ioas)


# -- a mirror lets go ----------------------------------------------------------------------------------


def _those_told(watch: Watch, mirror: Mirror) -> list[Name]:
    """Who answers through it: what is on demand of its process, as long as that has one mirror."""
    if sum(isinstance(other, Mirror) for other in mirror.mm.notifiers) > 1:
        return []
    return [_view(watch, ioas) for ioas in watch.on_demand if ioas.mm_cookie == mirror.mm.cookie]


@seams.around(Mirror, "invalidate_range_start")
async def _mirror_start(watch: Watch, original: Any, mirror: Mirror, start: Hva, end: Hva) -> None:
    watch.ghost.mmus.hears(watch.name(mirror, "mirror"), pages_of(mirror, start, end))
    await original(mirror, start, end)
    told = _those_told(watch, mirror)
    watch.told.setdefault((id(mirror), start, end), []).append(told)
    for view in told:
        watch.ghost.lets_go(view, *pages_of(mirror, start, end))


@seams.around(Mirror, "invalidate_range_end")
def _mirror_end(watch: Watch, original: Any, mirror: Mirror, start: Hva, end: Hva) -> None:
    """Who was told that it begins hears of it."""
    begun = watch.told.get((id(mirror), start, end))
    for view in begun.pop() if begun else ():
        watch.ghost.told_changed(view, *pages_of(mirror, start, end))
    watch.ghost.mmus.hears_of_the_end(watch.name(mirror, "mirror"), pages_of(mirror, start, end))
    original(mirror, start, end)


# -- areas ---------------------------------------------------------------------------------------------


def _shows(watch: Watch, ioas: Ioas, area: Area, space: str | None) -> None:
    rights = bits.READ | bits.WRITE if area.writable else bits.READ
    start, end = area.iova >> PAGE_SHIFT, area.end >> PAGE_SHIFT
    watch.ghost.shows(_view(watch, ioas), start, end, Shown(space, area.hva >> PAGE_SHIFT, rights))


def _hides(watch: Watch, ioas: Ioas, area: Area) -> None:
    watch.ghost.hides(_view(watch, ioas), area.iova >> PAGE_SHIFT, area.end >> PAGE_SHIFT)


@seams.around(Ioas, "show")
async def _show(watch: Watch, original: Any, ioas: Ioas, area: Area, pages: Pages) -> None:
    cookie = ioas._sources._mms.get(pages.source)
    _shows(watch, ioas, area, None if pages.file or cookie is None else watch.space_of(cookie))
    try:
        await original(ioas, area, pages)
    except BaseException:
        _hides(watch, ioas, area)
        raise


@seams.around(IoasOnDemand, "enter")
async def _enter(watch: Watch, original: Any, ioas: IoasOnDemand, area: Area) -> None:
    _shows(watch, ioas, area, watch.space_of(ioas.mm_cookie))
    try:
        await original(ioas, area)
    except BaseException:
        _hides(watch, ioas, area)
        raise


async def _leave(watch: Watch, original: Any, ioas: Ioas, area: Area) -> None:
    await original(ioas, area)
    _hides(watch, ioas, area)


seams.around(Ioas, "leave")(_leave)
seams.around(IoasOnDemand, "leave")(_leave)
