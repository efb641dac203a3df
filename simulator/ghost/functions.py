"""Functions: who may master the bus and ask for pages, on an HWPT or on none, and what of it outlives that.

What a driver takes off an HWPT is quiet from then on (R10): it masters nothing, caches nothing, and each
group that it had asked for was answered.  What it asks for after the drain is served by nobody (R12).  One
that was taken off the bus because it completes no invalidation never comes back (R18).  Page requests are on
behind an attachment as they were before it, and while it lasts if pages come when asked for (I8).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from protocol.pt.geometry import address_bits
from protocol.units import Level
from simulator.ghost import heard
from simulator.ghost.leading import LeadingEntries
from simulator.ghost.violation import Verdicts


class Walker(NamedTuple):
    """What a unit can walk: `levels`, bits of addresses, the largest leaf; does it see what lies in CPUs'
    caches, and does it cache what is absent?"""

    levels: Collection[int]
    width: int
    leaf: int
    coherent: bool
    caches_absent: bool


class Walked(NamedTuple):
    """A table; `in_cpu_caches`: nobody writes its lines back."""

    levels: int
    leaf: int
    in_cpu_caches: bool


class Functions:
    def __init__(self, verdicts: Verdicts, hearing: heard.Heard) -> None:
        self.leading = LeadingEntries(verdicts, hearing)
        self._verdicts = verdicts
        self._hearing = hearing
        self._masters: set[int] = set()
        self._asks: set[int] = set()
        self._asked_before: dict[int, bool | None] = {}  # of those that are on an HWPT; None: it lost them
        self._drained: set[int] = set()  # and on no HWPT since
        self._off_bus: set[int] = set()

    def masters(self, rid: int, *, on: bool) -> None:
        """The bus, from now on, or no more."""
        self._hearing.also(heard.CHANGES_FUNCTION)
        (self._masters.add if on else self._masters.discard)(rid)

    def asks(self, rid: int, *, on: bool) -> None:
        """For pages."""
        self._hearing.also(heard.CHANGES_FUNCTION)
        (self._asks.add if on else self._asks.discard)(rid)

    def failed(self, rid: int) -> None:
        """It was answered Response Failure, which ends its page requests [PCIe 10.4]."""
        self._hearing.also(heard.CHANGES_FUNCTION)
        if rid in self._asked_before:
            self._asked_before[rid] = None

    def comes(self, rid: int) -> None:
        """Onto an HWPT."""
        self._hearing.also(heard.CHANGES_FUNCTION)
        self._asked_before[rid] = rid in self._asks
        self._drained.discard(rid)

    def came(self, rid: int, *, on_demand: bool) -> None:
        """`on_demand`: pages are there when they are asked for, and it can ask."""
        self._hearing.also(heard.LOOKS_AT_FUNCTION)
        if rid in self._off_bus:
            self._verdicts.say("R18", f"function {rid:#x} was taken off the bus, and is attached")
        if on_demand and rid not in self._asks and self._asked_before.get(rid) is not None:
            self._verdicts.say("I8", f"function {rid:#x} is where pages come when asked for, and cannot ask")

    def walks(self, rid: int, unit: Walker, table: Walked) -> None:
        """It is given a table, which the unit before it walks (R15, R16)."""
        width = address_bits(Level(table.levels))
        wrong = {
            ("R16", f"{table.levels} levels"): table.levels not in unit.levels,
            ("R16", f"{width} bits of addresses"): width > unit.width,
            ("R16", f"leaves of level {table.leaf}"): table.leaf > unit.leaf,
            ("R16", "entries that come and are not flushed"): unit.caches_absent,
            ("R15", "lines that nobody flushes"): table.in_cpu_caches and not unit.coherent,
        }
        for (invariant, what), is_so in wrong.items():
            if is_so:
                said = f"function {rid:#x} is given a table with {what}, which its unit cannot walk"
                self._verdicts.say(invariant, said)

    def drained(self, rid: int, *, unread: list[int]) -> None:
        """What it asks for from now on comes too late; `unread`: groups that it asked for before."""
        self._hearing.also(heard.CHANGES_FUNCTION)
        self._drained.add(rid)
        if unread:
            self._verdicts.say("R10", f"function {rid:#x} is drained, its groups {unread} lie in the queue")

    def served(self, rid: int) -> None:
        """Pages of its are about to be looked for."""
        self._hearing.also(heard.LOOKS_AT_FUNCTION)
        if rid in self._drained:
            self._verdicts.say("R12", f"function {rid:#x} was drained, and is served")

    def left(self, rid: int, *, unanswered: list[int], cached: int) -> None:
        """Off its HWPT.  `unanswered`: groups that it asked for there; `cached`: translations it has."""
        self._hearing.also(heard.LEAVES_HWPT)
        if rid not in self._asked_before:
            return  # its unit went meanwhile
        before, asks = self._asked_before.pop(rid), rid in self._asks
        wrong = {
            "masters the bus": rid in self._masters,
            f"is not answered groups {unanswered}": bool(unanswered),
            f"has {cached} translations": cached > 0,
            f"can{'' if asks else 'not'} ask for pages, other than before": before not in (None, asks),
        }
        for what, is_so in wrong.items():
            if is_so:
                self._verdicts.say("R10", f"function {rid:#x} is detached, and {what}")

    def switched_off(self, rid: int, *, waiting: int) -> None:
        """Its page requests are: so many accesses are not told, and wait for ever."""
        if waiting:
            self._verdicts.say("R10", f"function {rid:#x} is to ask no more, and {waiting} accesses wait")

    def taken_off(self, rid: int) -> None:
        """The bus, for good."""
        self._hearing.also(heard.CHANGES_FUNCTION)
        self._off_bus.add(rid)
        if rid in self._masters:
            self._verdicts.say("R18", f"function {rid:#x} is taken off the bus, and masters it")

    def unlinked(self) -> None:
        """Units and driver have lost each other.  What functions may do they say themselves."""
        self._hearing.also(heard.CHANGES_FUNCTION)
        self.leading.forget_all()
        self._asked_before.clear()
        self._drained.clear()
        self._off_bus.clear()

    def forget_all(self) -> None:
        """The units are gone."""
        self.unlinked()
        self._masters.clear()
        self._asks.clear()
