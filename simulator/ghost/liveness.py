"""What must end: invalidations, page requests, faults, requests between daemons; within a bound of virtual
time, which is longer than whatever is made to fail, to stop or to be late.
"""

from __future__ import annotations

from collections.abc import Hashable

from simulator.ghost.violation import Verdicts

# What an outstanding thing of each kind is a case of; first what others wait for.
CASE_OF = {
    "loan of who hung up": "R28",
    "table of a dead KVM": "R28",
    "link of a dead driver": "R28",
    "request": "R27",
    "fault": "R2",
    "page request group": "R9",
    "overflow": "R9",
    "group without credits": "I8",
    "invalidation": "R18",
}


class Liveness:
    """`bound`: nanoseconds of virtual time."""

    def __init__(self, verdicts: Verdicts, bound: int) -> None:
        self._verdicts = verdicts
        self._bound = bound
        self._began: dict[tuple[str, Hashable], int] = {}

    def begins(self, now: int, kind: str, name: Hashable) -> None:
        assert kind in CASE_OF, kind
        self._began.setdefault((kind, name), now)

    def ends(self, now: int, kind: str, name: Hashable) -> None:
        """Whether or not in time."""
        self.look(now)
        self._began.pop((kind, name), None)

    def forget(self, *kinds: str) -> None:
        """Who would end these is gone."""
        for key in [key for key in self._began if key[0] in kinds]:
            del self._began[key]

    def look(self, now: int) -> None:
        """At any time."""
        for (kind, name), began in self._began.items():
            if now - began > self._bound:
                self._verdicts.say(CASE_OF[kind], f"{kind} {name} has not ended after {self._bound} ns")

    def stuck(self) -> None:
        """Nothing can run any more, and no time-out is set: what has not ended will not.  What one
        daemon waits for of another comes first: what either has begun waits for that.
        """
        causes = list(CASE_OF)
        for kind, name in sorted(self._began, key=lambda began: causes.index(began[0])):
            self._verdicts.say(CASE_OF[kind], f"{kind} {name} will never end: nothing can run any more")
