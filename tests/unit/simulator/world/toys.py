"""Small processes on the kernel in memory, and a strategy that is told what to answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simulator.kernel.process import SimProcess
from simulator.search.option import Option
from simulator.world.scheduler import World


class Script:
    """Answers by label: the first option that one of the words is in; else the default."""

    watches = True

    def __init__(self, *words: str) -> None:
        self._words = list(words)
        self.offered: list[list[str]] = []
        self.taken: list[Option] = []

    def choose(self, options: Sequence[Option]) -> int:
        told = [f"{option.actor}: {option.label}" for option in options]
        self.offered.append(told)
        for n, each in enumerate(told):
            if self._words and self._words[0] in each:
                del self._words[0]
                return n
        return 0

    def took(self, step: Option) -> None:
        self.taken.append(step)

    def ended(self, failed: bool) -> bool:
        return False


def made(world: World, **bodies: Callable[[SimProcess], None]) -> None:
    for name, body in bodies.items():
        process = SimProcess(world.host, name)
        world.spawn(process, lambda body=body, process=process: body(process))  # type: ignore[misc]


def finish(world: World) -> None:
    for thread in list(world.threads):
        world.run(thread)
    assert world.failures == []
