"""A run retold: its steps as people call them, each with the messages that went in it."""

from __future__ import annotations

import re

from simulator.faults.plan import FAULT
from simulator.ghost.probes.watch import Watch
from simulator.names import Messages, Names
from simulator.search.diagram import draw, rows_of
from simulator.search.option import Option, Strategy, is_within
from simulator.search.replay import Recorded
from simulator.world.journal import Journal

_VERBS = {"send": "sends", "recv": "gets"}
_UNSAID = (
    "goes on",
    "begins",
    "has sent to",
    "is told",
    "time is up",
    "is woken",
)  # that programs run is no news
_FATES = (" is killed", " is stopped")
_WORD = re.compile(r"(loads|stores) (\S.*)\[(\d+)\]")  # as the scheduler calls an access


class Overheard(Journal):
    """What went over channels in the step under way, and what failed."""

    def __init__(self) -> None:
        super().__init__()
        self._messages = Messages()
        self.heard: list[str] = []

    def add(self, line: str, data: bytes | bytearray | memoryview = b"") -> None:
        super().add(line, data)
        if ": " in line:  # a step begins
            self.heard = []
        if line.startswith(FAULT) or line.endswith(_FATES):
            self.heard.append(line)
        words = line.split()
        if data and len(words) == 3 and words[1] in _VERBS:
            _, done, end = words
            self.heard += [f"{_VERBS[done]} {name}" for name in self._messages.named(done, end, bytes(data))]


class Narrator(Recorded):
    """Strategy: another one, whose machine it looks on at; of its `steps` the labels are as people read
    them.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy, steps=True)
        self.journal = Overheard()
        self._names: Names | None = None

    def sees(self, watch: Watch) -> None:
        self._names = Names(watch)

    def took(self, step: Option) -> None:
        super().took(step)
        told = filter(None, (self._said(step), *self.journal.heard))
        self.steps[-1] = step._replace(label="; ".join(told))

    def _said(self, step: Option) -> str:
        place = _WORD.fullmatch(step.label)
        if place is not None and self._names is not None:
            return f"{place[1]} {self._names.of_word(place[2], int(place[3]))}"
        is_dull = is_within(step.actor) or step.label.startswith(_UNSAID)
        return "" if is_dull else step.label


def process_of(actor: str) -> str:
    return actor.partition("<")[0].partition("/")[0]


def diagram(narrator: Narrator) -> str:
    """Of its last run."""
    return draw(rows_of(narrator.steps, narrator.against, process_of, lambda step: step.label))
