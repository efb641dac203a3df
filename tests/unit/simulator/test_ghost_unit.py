"""What the ghost says of a remapping unit and of the functions behind it."""

from __future__ import annotations

from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import watching
from simulator.ghost.violation import Verdicts
from tests.kit.silicon import Silicon


def heard(ghost: Ghost) -> list[str]:
    return [violation.invariant for violation in ghost.verdicts.found]


def test_a_walk_that_loads_from_a_table_page_that_was_given_up_is_seen() -> None:
    ghost = Ghost(Verdicts())
    with watching(ghost):
        silicon = Silicon()
        silicon.attach()
        root = silicon.tables.root
        ghost.table_taken(root, "kvmd")
        silicon.translate(7)
        assert heard(ghost) == []
        ghost.table_given_up(root)
        silicon.translate(7)
    assert heard(ghost) == ["I7"]
