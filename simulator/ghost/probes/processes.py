"""Processes and what they wait for of each other: deaths, who is told of them, and the clock they live by.

A daemon's memory goes with it, and whoever was lent some of it hears of that a little later: iommufdd of
kvmd's end, device_sim of iommufdd's.  Until then they may use what they have; then nothing of it is left
(R28).
"""

from __future__ import annotations

from typing import Any

from device_sim.core.root_complex import RootComplex
from iommufdd.core.hwpt import NOT_LENT, Hwpt
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.platform import Platform
from iommufdd.kvm_client import KvmTdp
from iommufdd.kvmd_channel import KvmdChannel
from kvmd.core.export.importer import Registration
from kvmd.core.mm.hmm import Mirror
from simulator.ghost.probes.watch import Seams, Watch
from simulator.world.scheduler import World
from simulator.world.thread import SimThread

seams = Seams()
DEAD_KVM, DEAD_DRIVER, LOAN = "table of a dead KVM", "link of a dead driver", "loan of who hung up"


@seams.around(World, "__init__")
def _world(watch: Watch, original: Any, world: World, *args: Any, **named: Any) -> None:
    original(world, *args, **named)
    watch.now = world.now_ns


@seams.around(World, "close")
def _close(watch: Watch, original: Any, world: World) -> None:
    """What is cut off in the middle does nothing that counts."""
    watch.over = True
    original(world)


@seams.around(World, "kill")
def _kill(watch: Watch, original: Any, world: World, thread: SimThread) -> None:
    gone, ghost = thread.process.name, watch.ghost
    renamed = ghost.process_gone(gone)
    if gone in ("iommufdd", "device_sim"):
        ghost.functions.forget_all()
        watch.leading.clear()
    if gone == "device_sim":
        watch.plugged = False
    if gone == "kvmd":
        watch.forget_kvmd()
    for filled, root in watch.filling.items():  # a walk may be under way
        watch.filling[filled] = renamed.get(root, root)
    for did, root in watch.orphans.items():
        watch.orphans[did] = renamed.get(root, root)
    for did, hwpt in watch.hwpts.items():
        if hwpt.domain.root in renamed and did not in watch.orphans:
            watch.orphans[did] = renamed[hwpt.domain.root]
            if gone == "kvmd" and hwpt.attached:
                watch.begins(DEAD_KVM, watch.orphans[did])
    if gone == "iommufdd":
        for did, hwpt in watch.hwpts.items():  # until they hear of it units walk a KVM's root, which may die
            watch.orphans.setdefault(did, hwpt.domain.root)
        watch.hwpts.clear()
        watch.ending.clear()
        watch.giving_back.clear()
        watch.platform = None  # what it had is nobody's, and not left over
        if watch.plugged:
            watch.begins(DEAD_DRIVER, "device_sim")
    original(world, thread)


@seams.around(Hwpt, "__init__")
def _hwpt(watch: Watch, original: Any, hwpt: Hwpt, *args: Any, **named: Any) -> None:
    original(hwpt, *args, **named)
    did = hwpt.domain.did
    if did in watch.ending:
        watch.ghost.verdicts.say("R10", f"domain id {did} is given again, and units have not let go of it")
    watch.hwpts[did] = hwpt
    watch.orphans.pop(did, None)
    watch.ghost.opened(hwpt.domain.root)


@seams.around(Hwpt, "give_back")
async def _give_back(watch: Watch, original: Any, hwpt: Hwpt) -> None:
    did, first = hwpt.domain.did, hwpt.memory != NOT_LENT
    if first:
        watch.giving_back.add(did)
    await original(hwpt)
    if first:
        watch.giving_back.discard(did)


@seams.around(Platform, "__init__")
def _platform(watch: Watch, original: Any, platform: Platform, *args: Any, **named: Any) -> None:
    original(platform, *args, **named)
    watch.platform = platform


@seams.around(Platform, "lose_kvm")
async def _lose_kvm(watch: Watch, original: Any, platform: Platform, hwpt: Hwpt) -> None:
    await original(platform, hwpt)
    root = watch.root(hwpt.domain.did, hwpt.domain.root)
    watch.ends(DEAD_KVM, root)
    watch.ghost.closed(root)


@seams.around(Platform, "destroy_hwpt")
async def _destroy_hwpt(watch: Watch, original: Any, platform: Platform, hwpt: Hwpt) -> None:
    did = hwpt.domain.did
    watch.ending.add(did)
    try:
        await original(platform, hwpt)
    finally:
        watch.ending.discard(did)
    if did in watch.giving_back:
        watch.ghost.verdicts.say("R10", f"domain id {did} is free, and units have not let go of its memory")
    watch.ends(DEAD_KVM, watch.root(did, hwpt.domain.root))
    if watch.hwpts.get(did) is hwpt:
        del watch.hwpts[did]


@seams.around(RootComplex, "plug")
def _plug(watch: Watch, original: Any, silicon: RootComplex, driver: object) -> None:
    original(silicon, driver)
    watch.plugged = True


@seams.around(RootComplex, "unplug")
def _unplug(watch: Watch, original: Any, silicon: RootComplex) -> None:
    original(silicon)
    watch.plugged = False
    watch.ends(DEAD_DRIVER, "device_sim")
    watch.ghost.unplugged()
    watch.ghost.groups.forget_all()  # nobody is left who would answer


@seams.around(KvmdChannel, "call_for_fds")
async def _call(watch: Watch, original: Any, channel: KvmdChannel, op: str, *args: Any, **named: Any) -> Any:
    """Of iommufdd, which holds its own answers up until kvmd answers (R27)."""
    with watch.must_end("request", or_its_daemon=True):
        return await original(channel, op, *args, **named)


@seams.around(KvmTdp, "unregister")
async def _unregister(watch: Watch, original: Any, tdp: KvmTdp) -> None:
    for did, hwpt in watch.hwpts.items():
        if isinstance(hwpt, HwptKvm) and hwpt._tdp is tdp and hwpt.memory != NOT_LENT:
            watch.ghost.verdicts.say("I13", f"domain {did} is unregistered, and units walk its table")
    await original(tdp)


@seams.around(Registration, "leave")
async def _leave(watch: Watch, original: Any, registration: Registration) -> None:
    """kvmd waits for the lease of an importer whose channel ended."""
    with watch.must_end(LOAN, or_its_daemon=True):
        await original(registration)


@seams.around(Mirror, "release")
async def _release(watch: Watch, original: Any, mirror: Mirror) -> None:
    with watch.must_end(LOAN, or_its_daemon=True):
        await original(mirror)
