"""Two VMMs ask at random, many requests at once, and close what they like; a third's DMA goes on beside them.

The third must not notice: its data is right, and its VM's counters stand still, for its pages are mapped.
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
import trio

from protocol.errors import PeerError
from protocol.hw.dsa import Status
from protocol.rpc.service import Service
from protocol.units import PAGE_SIZE
from qemu_shim.vmm.machine import Host
from tests.integration.zoo import OPS, REQUESTS, SLOT_BYTES, SLOT_GPA, Zoo, zoo_of
from tests.kit.daemons import System
from tests.kit.vmm import FILLED, GUEST_START, Vmm, attach_device, vm_only

SEEDS = (20231202, 42, 107)
AT_ONCE, STEPS = 4, 100
GIVE_UP_S = 0.05  # what sleeps longer is left asleep
SHARED = {"kvmd", "iommufdd", "device_sim"}  # front doors: not ours to close
PAGES = [GUEST_START + n * PAGE_SIZE for n in range(4)]


FIELDS: dict[tuple[str, str], dict[str, Any]] = {
    (service.name, op): service.methods[op].model.model_json_schema()["properties"] for service, op in OPS
}


class Walk:
    """One VMM; `others` has the fds it may send along."""

    def __init__(self, chance: random.Random, zoo: Zoo, others: Zoo) -> None:
        self._chance = chance
        self._zoo = zoo
        self._others = others
        self.bugs: list[str] = []

    async def go(self) -> None:
        for _ in range(STEPS):
            service, op = self._chance.choice(OPS)
            if service.name not in SHARED and self._chance.random() < 0.002:
                self._zoo.objects[service.name].close()
            elif service.name == "portal" and self._chance.random() < 0.5:
                descriptor = self._chance.randbytes(64)
                self._zoo.objects["portal"].notify("MOVDIR64B", {"wq": 0, "descriptor": descriptor})
            else:
                await self._ask(service, op)

    async def _ask(self, service: Service[Any], op: str) -> None:
        with suppress(OSError):  # a copy of what was closed
            body, fds = REQUESTS[service.name, op](self._zoo)
            for name, says in FIELDS[service.name, op].items():
                if (
                    name not in ("op", "other_mm", "tail", "data", "program", "args")
                    and self._chance.random() < 0.25
                ):
                    body = {**body, name: self._value(name, says, body.get(name))}
            if len(fds) < service.methods[op].max_fds and self._chance.random() < 0.3:
                owner = self._chance.choice((self._zoo, self._others))
                fds.append(owner.copy(self._chance.choice(list(owner.fds))))
            with trio.move_on_after(GIVE_UP_S), suppress(PeerError):
                if await self._zoo.is_bug(service, op, body, fds):
                    self.bugs.append(f"{service.name} {op} {body}")

    def _value(self, name: str, says: dict[str, Any], usual: Any) -> Any:
        """Another of its kind, most often one that means something."""
        kinds = {kind.get("type") for kind in (says, *says.get("anyOf", ()))}
        chance, zoo = self._chance, self._zoo
        if "enum" in says:
            return chance.choice(says["enum"])
        if "boolean" in kinds:
            return chance.random() < 0.5
        if "integer" not in kinds:
            return usual
        base = chance.choice((0, 0, 0, zoo.spare, zoo.logged, zoo.rig.hva, SLOT_GPA, GUEST_START))
        step = chance.choice((1, PAGE_SIZE, PAGE_SIZE, SLOT_BYTES // 2))
        if name in ("size", "len", "memory_size", "old_size", "new_size"):
            return chance.randrange(8) * PAGE_SIZE
        return chance.choice((chance.randrange(8), base + chance.randrange(8) * step, *zoo.ids.values()))


async def copy_for_ever(rig: Vmm, done: list[int]) -> None:
    """The innocent: fill, copy, compare."""
    first, second = PAGES[:2]
    while True:
        pattern = random.Random(len(done)).randbytes(8)
        assert await rig.fill(first, int.from_bytes(pattern, "little")) is Status.SUCCESS
        assert (await rig.copy(second, first)).status is Status.SUCCESS
        assert await rig.seen_by_process(second) == pattern * (len(FILLED) // 8)
        done.append(1)


@pytest.mark.parametrize("seed", SEEDS)
async def test_nobody_notices_two_vmms_that_ask_at_random(
    host: Host, shared_system: System, seed: int
) -> None:
    chance = random.Random(seed)
    async with vm_only(host) as innocent:
        await attach_device(innocent, 2)
        for page in PAGES:
            assert await innocent.fill(page) is Status.SUCCESS
        before = (await host.kvmd.stats())["vms"][0]
        rounds: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy_for_ever, innocent, rounds)
            async with zoo_of(host, 0) as one, zoo_of(host, 1) as two:
                walks = [Walk(chance, one, two), Walk(chance, two, one)]
                async with trio.open_nursery() as walkers:
                    for walk in walks * AT_ONCE:
                        walkers.start_soon(walk.go)
                assert [bug for walk in walks for bug in walk.bugs] == []
                assert await host.kvmd.violations() == []
            nursery.cancel_scope.cancel()
        assert len(rounds) > 10
        assert (await host.kvmd.stats())["vms"][0] == before
        assert await innocent.fill(PAGES[0]) is Status.SUCCESS
    for name in shared_system.names:
        assert not shared_system.exited(name), shared_system.log(name)
