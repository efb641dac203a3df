"""Samples: the daemons' counters when nothing is under way, under the names of `counters.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

import trio

from qemu_shim.scenarios.counters import (
    COUNTS,
    GAUGES,
    UNDER_WAY,
    Raw,
    added_up,
    grown,
    tables,
)
from qemu_shim.scenarios.measure import Report, Snapshot, check_system, snapshot
from qemu_shim.scenarios.run import Sample
from qemu_shim.vmm.machine import GuestCpu, Host, Machine

PATIENCE_S = 30.0
QUIET_POLL_S = 0.001
WAITED_TO_PAUSE = 16  # the pause before the next poll is one in so many of what it has waited already
VMS = {"VMs of before": ("kvmd.vm_count",)}


class NeverQuiet(Exception):
    """The system did not come to rest: somebody waits for what does not come."""


async def until(what: object, holds: Callable[[], Awaitable[bool]]) -> None:
    """Asks until it holds, less often the longer it has waited; NeverQuiet says `what` did not come about."""
    began = trio.current_time()
    with trio.move_on_after(PATIENCE_S):
        while True:
            if await holds():
                return
            await trio.sleep(max(QUIET_POLL_S, (trio.current_time() - began) / WAITED_TO_PAUSE))
    raise NeverQuiet(f"not quiet after {PATIENCE_S:.0f} s: {what}")


class Recorder:
    """Counts are those since `begin`, whatever the daemons did before."""

    def __init__(self, host: Host, *, alone: bool = True) -> None:
        self.cpus: list[GuestCpu] = []  # of guests that run, be it without a device
        self.machines: list[Machine] = []
        self.own: Counter[str] = Counter()  # what only the workload knows
        self.elsewhere = 0  # pages of the host that no machine has
        self.last: Snapshot  # what was looked at last
        self._host = host
        self._alone = alone  # no VM but ours is there, or it would be counted with ours
        self._before: Raw | None = None

    async def begin(self) -> None:
        """Nothing of an earlier run may be left, or it would be counted."""
        if self._before is None:
            self._before = await self._settled(VMS if self._alone else {}, Counter())

    async def quiet(self) -> Raw:
        """The counters once nothing is under way."""
        for machine in self.machines:
            for device in machine.devices:
                await device.portal.drain()
        assert self._before is not None, "nothing is counted: begin() comes first"
        return await self._settled(UNDER_WAY, self._before)

    async def without(self, machine: Machine, close: Callable[[], Awaitable[None]]) -> Raw:
        """Its VM ends, and what it counted goes with it: how much, for other counts that began before."""
        assert self._before is not None, "nothing is counted: begin() comes first"
        before = await self.quiet()
        self.machines.remove(machine)
        await close()
        left = before["kvmd.vm_count"] - 1
        lost = grown(before, await self._settled(VMS, Counter({"kvmd.vm_count": left})))
        self._before.subtract(lost)
        return lost

    async def sample(self, step: str) -> Sample:
        raw = await self.quiet()
        counts = added_up(COUNTS, grown(raw, self._before))
        return Sample(step, {**counts, **self.own}, added_up(GAUGES, raw) | tables(raw))

    async def problems(self) -> list[str]:
        """The invariants that do not hold, of any machine."""
        report = Report("")
        if self.machines:
            await check_system(self._host, report)
        return report.problems

    async def _settled(self, under_way: Mapping[str, tuple[str, ...]], before: Raw) -> Raw:
        raw, left = before, dict[str, int]()

        async def settled() -> bool:
            nonlocal raw
            raw = await self.look()
            left.clear()
            left.update(
                {what: count for what, count in added_up(under_way, grown(raw, before)).items() if count}
            )
            return not left

        await until(left, settled)
        return raw

    async def look(self) -> Raw:
        """The counters as they are."""
        self.last = await snapshot(self._host)
        raw = self.last.raw.copy()  # the snapshot stays what the daemons said
        raw["kvmd.frames"] -= self.elsewhere
        raw["guest.cpu_bytes"] = sum(cpu.bytes for cpu in self.cpus)
        raw["guest.cpu_pages"] = sum(cpu.pages for cpu in self.cpus)
        return raw
