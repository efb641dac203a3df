"""Everything a daemon has, in as many answers as it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from protocol.rpc.channel import Body
from protocol.uapi.message import MAX_TOLD
from qemu_shim.vmm.stats import ask_all


class Daemon:
    """One that numbers its objects 3, 6, 9 and so on."""

    def __init__(self, count: int) -> None:
        self.numbers = range(3, 3 * count + 1, 3)
        self.asked = 0

    async def ask(self, op: str, body: Body) -> Any:
        self.asked += 1
        told = [{"did": n} for n in self.numbers if n > body.get("after", 0)]
        return SimpleNamespace(body={"hwpts": told[:MAX_TOLD], "asked": self.asked})


@pytest.mark.parametrize("count", [0, 1, MAX_TOLD - 1, MAX_TOLD, MAX_TOLD + 1, 9600])
async def test_everything_is_asked_for_once(count: int) -> None:
    daemon = Daemon(count)
    body, found = await ask_all(daemon, "hwpts", "did")  # type: ignore[arg-type]
    assert [one["did"] for one in found] == list(daemon.numbers)
    assert body["asked"] == daemon.asked == count // MAX_TOLD + 1
