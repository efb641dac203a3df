"""What sweeps came to, a row each, that documents are held to and a later run goes on from:
docs/results/torture.json.

A record is of one state of the code, and a sweep of hundreds takes hours: what one state ended, the next need
not begin (`--known`).  A newer row takes an older one's place unless that came further; what failed is
struck again, whatever else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.torture.blow import Aftermath, How
from tests.torture.calls import FAULTS, SINKS
from tests.torture.record import read
from tests.torture.sweep import Sweep, sweeps


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One sweep on one state of the code.  `ended`: from the first call on, none left out, until a run met
    nothing; `failed`: at which calls; `calls`: how many blows at which.
    """

    story: str
    process: str
    kind: str
    code: str
    ended: bool
    survived: int
    refused: int
    failed: list[int]
    calls: dict[str, int]

    @property
    def sweep(self) -> Sweep:
        return Sweep(self.story, self.process, FAULTS[self.kind])

    @property
    def blows(self) -> int:
        return self.survived + self.refused + len(self.failed)

    def replaces(self, older: SweepRow) -> bool:
        if self.failed or older.failed:
            return True
        return (self.ended, self.blows) >= (older.ended, older.blows)


def summary(records: Sequence[Path], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`records`: oldest first, all behind `known`, another summary."""
    rows = {row.sweep: row for row in rows_of(known)} if known else {}
    for path in records:
        for row in _rows(path):
            if row.sweep not in rows or row.replaces(rows[row.sweep]):
                rows[row.sweep] = row
    there_are = list(sweeps((), (), ()))
    return {"sweeps_there_are": len(there_are), "sweeps": [asdict(rows[s]) for s in there_are if s in rows]}


def rows_of(written: Mapping[str, Any]) -> list[SweepRow]:
    return [SweepRow(**row) for row in written["sweeps"]]


def ended_of(written: Mapping[str, Any]) -> set[Sweep]:
    """Those that need not be begun again."""
    return {row.sweep for row in rows_of(written) if row.ended and not row.failed}


def _rows(path: Path) -> list[SweepRow]:
    code, tried = read(path)
    of_sweep: dict[Sweep, dict[tuple[int, int], Aftermath]] = {}
    for blow, outcome in tried.items():
        of_sweep.setdefault(Sweep(blow.story, blow.victim, blow.fault), {})[blow.at, blow.errno_index] = (
            outcome
        )
    return [_row(code, sweep, outcomes) for sweep, outcomes in of_sweep.items()]


def _row(code: str, sweep: Sweep, outcomes: Mapping[tuple[int, int], Aftermath]) -> SweepRow:
    met = {at: outcome for at, outcome in outcomes.items() if outcome.call or outcome.how is How.FAILED}
    how = Counter(outcome.how for outcome in met.values())
    calls = Counter(outcome.call or "none" for outcome in met.values())
    return SweepRow(
        *(sweep.story, sweep.victim, sweep.fault.kind, code, _has_ended(sweep, outcomes)),
        *(how[How.SURVIVED], how[How.REFUSED]),
        sorted({at for (at, _), outcome in met.items() if outcome.how is How.FAILED}),
        dict(sorted(calls.items())),
    )


def _has_ended(sweep: Sweep, outcomes: Mapping[tuple[int, int], Aftermath]) -> bool:
    if sweep.fault in SINKS:  # there from the start on: once is all
        return True
    end = min((at for (at, _), outcome in outcomes.items() if outcome.call is None), default=None)
    return end is not None and {at for at, _ in outcomes} >= set(range(1, end))
