"""By which invariants a planted bug may be found: its own, the races it is, and what holds these.

Of some docs/invariants.md says that they are held, or checked, `as` another is: the checker is that one's,
and whoever finds them finds them by its number, or by their own where the ghost says that.  Any other number
is a find by accident, and counts as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulator.planted.plant import Plant

HELD_AS: Mapping[str, frozenset[str]] = {
    "I5": frozenset({"I11"}),
    "I11": frozenset({"I5"}),
    "I28": frozenset({"I5", "I11"}),
    "R1": frozenset({"I5"}),
    "R4": frozenset({"I6", "I11", "I21"}),
    "R5": frozenset({"I7"}),
    "R7": frozenset({"I9"}),
    "R8": frozenset({"I6", "I9", "I11"}),
    "R11": frozenset({"I8"}),
    "R14": frozenset({"I4", "I29"}),
    "R18": frozenset({"I9"}),
    "R19": frozenset({"I20", "I25"}),
    "R22": frozenset({"I11", "I21"}),
    "R24": frozenset({"I27"}),
    "R25": frozenset({"I9"}),
    "R26": frozenset({"I15"}),
}


def invariants_of(plant: Plant) -> frozenset[str]:
    """Those by which it is found as what it is."""
    cases = {plant.invariant, *(race for race in plant.races if race.startswith("R"))}
    return frozenset(cases).union(*(HELD_AS.get(case, frozenset()) for case in cases))
