"""The driver beside iommufdd that stories play: what it does while it waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from simulator.search.replay import Replay
from simulator.world.other_driver import OtherDriver
from simulator.world.scheduler import World


async def test_who_dies_before_it_acks_has_nothing_to_ack(autojump_clock: MockClock) -> None:
    """It is patient with what it was told, and dies meanwhile: then there is nothing to choose from."""
    world = World(Replay(()))
    loop: Any = SimpleNamespace(kernel=SimpleNamespace(host=world.host))
    channel: Any = SimpleNamespace(close=lambda: None)
    driver = OtherDriver(loop, "a")
    driver._channel = channel
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.serve)
        await wait_all_tasks_blocked()
        driver.told(1, 0, 1)
        await wait_all_tasks_blocked()
        driver.hang_up()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
