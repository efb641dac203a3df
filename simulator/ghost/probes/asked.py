"""What user space asks an IOAS to show, by its request as it came: whose memory, what of it, to do what.

Whose it is the fd says that came with it, as the kernel knows it; what iommufdd makes of that, and keeps in
its books, is what is judged.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from iommufdd.core.ioas import Ioas, Slice
from iommufdd.service.objects import IommuFile
from protocol.pt import bits
from protocol.rpc.channel import Body, Fds
from protocol.rpc.service import Service
from protocol.uapi import names
from protocol.units import PAGE_SHIFT, Iova
from simulator.ghost.backing import Name, Shown
from simulator.ghost.probes.watch import Asked, During, Seams, Watch, step_by_step
from simulator.ghost.spans import Spans

seams = Seams()


def view_of(watch: Watch, ioas: object) -> Name:
    return "ioas", watch.name(ioas, "ioas")


@seams.around(Service, "_run")
def _run(watch: Watch, original: Any, service: Service[Any], obj: Any, body: Body, fds: Fds) -> Any:
    """What is checked already is asked for; its fds are there still."""
    result = original(service, obj, body, fds)
    if type(obj) is not IommuFile or not isinstance(result, Coroutine):
        return result
    asked = _asked(watch, obj, body, fds)
    return result if asked is None else _answer(watch, asked, result)


async def _answer(watch: Watch, asked: Asked, answering: Coroutine[Any, Any, Any]) -> Any:
    return await step_by_step(answering, During(watch, "asked", asked))


def _asked(watch: Watch, held: IommuFile, body: Body, fds: Fds) -> Asked | None:
    op = body["op"]
    if op not in ("IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_COPY"):
        return None
    flags, size = body["flags"], body["length"] >> PAGE_SHIFT
    rights = bits.READ | bits.WRITE if flags & names.IOMMU_IOAS_MAP_WRITEABLE else bits.READ
    at = body.get("dst_iova" if op == "IOMMU_IOAS_COPY" else "iova", 0)
    start = at >> PAGE_SHIFT if flags & names.IOMMU_IOAS_MAP_FIXED_IOVA else None
    asked = Asked(rights, start, watch.host)
    if op == "IOMMU_IOAS_COPY":
        asked.copied = body["src_iova"] >> PAGE_SHIFT, body["src_iova"] + body["length"] >> PAGE_SHIFT
    elif op == "IOMMU_IOAS_MAP_FILE":
        asked.pages.put(0, size, Shown(None, body["start"] >> PAGE_SHIFT, rights))
    elif len(fds):
        space = watch.space_of(held.app.loop.kernel.cookie_of(fds.peek(0)))
        asked.pages.put(0, size, Shown(space, body["user_va"] >> PAGE_SHIFT, rights))
    return asked


@seams.around(Ioas, "slices")
async def _slices(watch: Watch, original: Any, ioas: Ioas, iova: Iova, size: int) -> list[Slice]:
    """A copy is of what is shown there when it is looked at."""
    found: list[Slice] = await original(ioas, iova, size)
    asked = watch.asked
    assert asked is not None, "who copies was asked to"
    start, end = asked.copied
    for low, high, shown in watch.pages_of.get(view_of(watch, ioas), Spans[Shown]()).within(start, end):
        asked.pages.put(low - start, high - start, shown)
    return found
