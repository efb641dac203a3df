"""A run retold: its steps as people call them, each with the messages that went in it, and what tracepoints
said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.trace import TRACE
from simulator.faults.plan import FAULT
from simulator.ghost.probes.watch import Watch
from simulator.names import Messages, Names
from simulator.search.diagram import draw, rows_of
from simulator.search.option import Option, Strategy, is_within, process_of
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
    """What went over channels in the step under way, what failed, and the tracepoints it met."""

    def __init__(self) -> None:
        super().__init__()
        self._messages = Messages()
        self.heard: list[str] = []
        self.events: list[str] = []  # `heard` and tracepoints, in their order

    def add(self, line: str, data: bytes | bytearray | memoryview = b"") -> None:
        super().add(line, data)
        if ": " in line:  # a step begins
            self.heard, self.events = [], []
        if line.startswith(FAULT) or line.endswith(_FATES):
            self._hear(line)
        words = line.split()
        if data and len(words) == 3 and words[1] in _VERBS:
            _, done, end = words
            for name in self._messages.named(done, end, bytes(data)):
                self._hear(f"{_VERBS[done]} {name}")

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        self.events.append(what)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Tracepoints are events: TRACE has those of all processes here, and each step is one's."""
        TRACE.start(lambda line: self.events.append(line))
        try:
            yield
        finally:
            TRACE.stop()


class Narrator(Recorded):
    """Strategy: another one, whose machine it looks on at; of its `steps` the labels are as people read
    them.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy, steps=True)
        self.journal = Overheard()
        self.events: list[str] = []  # of all steps, those that race with nobody's as well
        self._names: Names | None = None

    def sees(self, watch: Watch) -> None:
        self._names = Names(watch)

    def took(self, step: Option) -> None:
        super().took(step)
        said, journal = self._said(step), self.journal
        self.steps[-1] = step._replace(label="; ".join(filter(None, (said, *journal.heard))))
        process = process_of(step.actor)
        self.events += [f"{process}: {event}" for event in (said, *journal.events) if event]

    def _said(self, step: Option) -> str:
        place = _WORD.fullmatch(step.label)
        if place is not None and self._names is not None:
            return f"{place[1]} {self._names.of_word(place[2], int(place[3]))}"
        is_dull = is_within(step.actor) or step.label.startswith(_UNSAID)
        return "" if is_dull else step.label


def diagram(narrator: Narrator) -> str:
    """Of its last run."""
    return draw(rows_of(narrator.steps, narrator.against, process_of, lambda step: step.label))
