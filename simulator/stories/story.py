"""What a small story is: a scenario of which only the middle is searched.

The machine is brought up and taken down in the default order (`simulator/search/excerpt.py`); schedules are
chosen while the excerpt is open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from qemu_shim.api import DESIGNS, Context, Param, Scenario
from simulator.search.excerpt import Excerpt

Play = Callable[[Context, Excerpt], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class SmallStory:
    """`designs`: those it can be played on, none named: any; `options` start its daemons, by their names;
    `faults`: kinds of which each schedule has at most one (simulator/faults/kinds.py)."""

    name: str
    summary: str
    play: Play
    designs: tuple[str, ...] = ()
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    params: ClassVar[Mapping[str, Param]] = {}

    @property
    def playable(self) -> list[str]:
        """The designs it can be played on, in the order of DESIGNS."""
        return [name for name in DESIGNS if name in self.designs or not self.designs]

    def scenario(self, excerpt: Excerpt) -> Scenario:
        """To be played under `excerpt`."""

        async def play(ctx: Context) -> None:
            await self.play(ctx, excerpt)

        return Scenario(
            name=self.name,
            summary=self.summary,
            play=play,
            designs=self.designs,
            options=self.options,
            counted=False,
        )
