"""What is taken from roots that devices alone walk, and which these are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.slots.memslot import Memslot, SlotChange
from kvmd.core.slots.slots_change import SlotsChange
from kvmd.core.tables.tdp_table import Root
from protocol.units import GfnSpan
from simulator.ghost.backing import Name
from simulator.ghost.probes.watch import Seams, Watch

seams = Seams()


def lent(watch: Watch, root: Root) -> None:
    """If user space asked for nothing that KVM does to a root of CPUs, but to fill it beside theirs."""
    policy, view = root.role.policy, watch.ghost.view_of(root.hpa)
    done = policy.ages, policy.logs, policy.tracks, policy.nx_huge, policy.zapped_whole
    if not policy.cpus and not any(done) and isinstance(view, tuple):
        watch.ghost.own.lends(root.hpa, view, f"vm{view[1]}", beside=policy.filled_beside)


@contextmanager
def _taking(watch: Watch, views: Iterable[Name], spans: Sequence[GfnSpan]) -> Iterator[None]:
    taken = [(view, (int(span.start), int(span.end))) for view in views for span in spans]
    for pages in taken:
        watch.ghost.own.takes(*pages)
    try:
        yield
    finally:
        for pages in taken:
            watch.ghost.own.has_taken(*pages)


@seams.around(SlotsChange, "_replace")
async def _slot_changes(
    watch: Watch,
    original: Any,
    changes: SlotsChange,
    change: SlotChange,
    old: Memslot | None,
    new: Memslot | None,
) -> Memslot | None:
    goes = [old] if old is not None and change in (SlotChange.DELETE, SlotChange.MOVE) else []
    views = [watch.view(changes._slots, slot.as_id) for slot in goes]
    with _taking(watch, views, [slot.span for slot in goes]):
        left: Memslot | None = await original(changes, change, old, new)
    return left


@seams.around(HostChanges, "zapped_gfns")
@asynccontextmanager
async def _zapped_gfns(
    watch: Watch, original: Any, changes: HostChanges, spans: Sequence[GfnSpan], told: GfnSpan | None = None
) -> AsyncIterator[None]:
    slots = changes._slots
    views = [watch.view(slots, as_id) for as_id in range(slots.address_spaces)]
    with _taking(watch, views, spans):
        async with original(changes, spans, told):
            yield
