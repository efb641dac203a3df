"""A lent table that a device filled, and work that yields: each turn is given by hand, as each ack is."""

from __future__ import annotations

import pytest

from kvmd.core.faults.page_fault import FaultResult
from protocol.flow import Wait
from tests.kit.lent import Lent

FIRST, PAGES, OTHER = 0x100, 16, 0x200
BATCH = 4  # leaves a turn


class InTurns(Lent):
    """16 pages at gfn 0x100 and one of another slot, mapped by a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(FIRST, PAGES)
        monkeypatch.setattr(self.vm.tdp.zapper, "batch", BATCH)
        self.set_slot(1, OTHER, 1, self.map(1))
        for gfn in (*range(FIRST, FIRST + PAGES), OTHER):
            assert self.io_fault(self.exported, gfn) is FaultResult.FIXED
        self.turns: list[Wait[None]] = []
        self.host.cond_resched = self._cond_resched

    def _cond_resched(self) -> Wait[None]:
        self.turns.append(Wait())
        return self.turns[-1]

    def next_turn(self) -> None:
        self.turns[-1].set(None)
        self.flows.run_ready()

    def go_on(self) -> None:
        """The next ack, or the next turn."""
        if self.importer.pending:
            self.ack(self.importer)
        else:
            self.next_turn()
