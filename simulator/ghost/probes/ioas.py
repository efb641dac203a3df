"""What an IOAS shows of its processes, and which tables are of it.

An area is seen before anything of it is mapped, and goes when nothing of it is reached any more.  What it
shows is what was asked for (asked.py), not what iommufdd says of it.  Pages of a file count as not watched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from iommufdd.core.area import Area
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.ioas import Ioas
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.pages import Pages
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.space import AddressSpace
from protocol.units import PAGE_SHIFT, Hva
from simulator.ghost.backing import Name
from simulator.ghost.probes.asked import view_of
from simulator.ghost.probes.mmus import pages_of
from simulator.ghost.probes.watch import Seams, Watch
from simulator.ghost.spans import Spans

seams = Seams()


@seams.around(AddressSpace, "__init__")
def _address_space(watch: Watch, original: Any, mm: AddressSpace, *args: Any, **named: Any) -> None:
    original(mm, *args, **named)
    watch.processes.append(mm)


@seams.around(HwptPaging, "__init__")
def _hwpt(watch: Watch, original: Any, hwpt: HwptPaging, *args: Any, **named: Any) -> None:
    original(hwpt, *args, **named)
    watch.ghost.root_is_of(hwpt.table.root, view_of(watch, hwpt.ioas))
    if isinstance(hwpt.ioas, IoasOnDemand) and hwpt.ioas not in watch.on_demand:
        watch.on_demand.append(hwpt.ioas)


# -- a mirror lets go ----------------------------------------------------------------------------------


def _those_told(watch: Watch, mirror: Mirror) -> list[Name]:
    """Who answers through it: what is on demand of its process, as long as that has one mirror."""
    if sum(isinstance(other, Mirror) for other in mirror.mm.notifiers) > 1:
        return []
    return [view_of(watch, ioas) for ioas in watch.on_demand if ioas.mm_cookie == mirror.mm.cookie]


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


def _shows(watch: Watch, ioas: Ioas, area: Area) -> None:
    """What was asked for where the area is; a copy has several."""
    asked, view = watch.asked, view_of(watch, ioas)
    assert asked is not None, "who shows something was asked to"
    first, end = area.iova >> PAGE_SHIFT, area.end >> PAGE_SHIFT
    if asked.start is None:
        asked.start = first
    of_it = watch.pages_of.setdefault(view, Spans())
    for low, high, shown in asked.pages.within(first - asked.start, end - asked.start):
        where = asked.start + low, asked.start + high
        pages = shown if asked.host == watch.host else replace(shown, space=None)  # it died meanwhile
        of_it.put(*where, pages)
        watch.ghost.shows(view, *where, replace(pages, rights=pages.rights & asked.rights))


def _hides(watch: Watch, ioas: Ioas, area: Area) -> None:
    view, first, end = view_of(watch, ioas), area.iova >> PAGE_SHIFT, area.end >> PAGE_SHIFT
    watch.pages_of.setdefault(view, Spans()).clear(first, end)
    watch.ghost.hides(view, first, end)


async def _show(watch: Watch, original: Any, ioas: Ioas, area: Area, *pages: Pages) -> None:
    _shows(watch, ioas, area)
    try:
        await original(ioas, area, *pages)
    except BaseException:
        _hides(watch, ioas, area)
        raise


seams.around(Ioas, "show")(_show)
seams.around(IoasOnDemand, "enter")(_show)


async def _leave(watch: Watch, original: Any, ioas: Ioas, area: Area) -> None:
    await original(ioas, area)
    _hides(watch, ioas, area)


seams.around(Ioas, "leave")(_leave)
seams.around(IoasOnDemand, "leave")(_leave)
