"""What MMUs hear of a host, and what it answers them; those of a guest, and those outside of kvmd."""

from __future__ import annotations

from typing import Any

from kvmd.core.mm.hmm import FoundPages, Mirror
from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.vm import Kvm
from protocol.units import PAGE_SHIFT, Hva
from simulator.ghost.mmus import Pages
from simulator.ghost.probes.watch import Seams, Watch
from simulator.ghost.probes.windows import tell_private

seams = Seams()


def pages_of(mirror: Mirror, start: Hva, end: Hva) -> Pages:
    return f"mm{mirror.mm.id}", start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)


@seams.around(Kvm, "destroy")
async def _destroy(watch: Watch, original: Any, vm: Kvm) -> None:
    watch.ghost.mmus.leaves(f"vm{vm.id}")
    for slot in vm.slots:
        tell_private(watch, vm.slots, slot, slot.span.start, slot.span.end, there=False)
    await original(vm)
    for root in list(watch.roots.get(f"vm{vm.id}", {})):
        watch.ghost.root_left(root)


@seams.around(Mirror, "close")
async def _close(watch: Watch, original: Any, mirror: Mirror) -> None:
    watch.ghost.mmus.leaves(watch.name(mirror, "mirror"))
    await original(mirror)


@seams.around(HostChanges, "clear_flush_young")
async def _vm_is_asked(watch: Watch, original: Any, changes: HostChanges, start: Hva, end: Hva) -> bool:
    if id(changes._slots) in watch.vm_of:
        watch.ghost.mmus.is_asked(f"vm{watch.vm_of[id(changes._slots)]}")
    young: bool = await original(changes, start, end)
    return young


@seams.around(Mirror, "clear_flush_young")
async def _mirror_is_asked(watch: Watch, original: Any, mirror: Mirror, start: Hva, end: Hva) -> bool:
    watch.ghost.mmus.is_asked(watch.name(mirror, "mirror"))
    young: bool = await original(mirror, start, end)
    return young


@seams.around(Mirror, "watch")
def _watch(watch: Watch, original: Any, mirror: Mirror, start: Hva, size: int) -> None:
    original(mirror, start, size)
    watch.ghost.mmus.watches(watch.name(mirror, "mirror"), pages_of(mirror, start, Hva(start + size)))


@seams.around(Mirror, "unwatch")
def _unwatch(watch: Watch, original: Any, mirror: Mirror, start: Hva, size: int) -> None:
    original(mirror, start, size)
    watch.ghost.mmus.unwatches(watch.name(mirror, "mirror"), pages_of(mirror, start, Hva(start + size)))


@seams.around(Mirror, "range_fault")
async def _range_fault(
    watch: Watch, original: Any, mirror: Mirror, start: Hva, size: int, **how: Any
) -> FoundPages:
    found: FoundPages = await original(mirror, start, size, **how)
    watch.ghost.mmus.is_answered(watch.name(mirror, "mirror"), pages_of(mirror, start, found.end))
    return found
