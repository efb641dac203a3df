"""What sweeps came to, as numbers that documents are held to: docs/results/torture.json.

Of several records, of one state of the code after the other, each blow counts once, as it went last.  What
failed in a state that is not the last was mended meanwhile, or has to be struck again: it counts as nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.torture.blow import Aftermath, Blow, How
from tests.torture.calls import SINKS
from tests.torture.record import read
from tests.torture.sweep import Sweep


def summary(records: Sequence[Path]) -> dict[str, Any]:
    tried: dict[Blow, Aftermath] = {}
    codes = []
    for path in records:
        code, outcomes = read(path)
        codes.append(code)
        tried = {blow: outcome for blow, outcome in tried.items() if outcome.how is not How.FAILED} | outcomes
    met = {blow: outcome for blow, outcome in tried.items() if outcome.call or outcome.how is How.FAILED}
    failed = [blow for blow, outcome in met.items() if outcome.how is How.FAILED]
    ends = swept_to_the_end(tried)
    return {
        "states_of_the_code": codes,
        "blows": len(met),
        "outcomes": _counted(outcome.how.value for outcome in met.values()),
        "by_kind": _counted(blow.fault.kind for blow in met),
        "by_process": _counted(blow.victim for blow in met),
        "by_story": _counted(blow.story for blow in met),
        "by_call": _counted(outcome.call or "none" for outcome in met.values()),
        "sweeps": len({Sweep(blow.story, blow.victim, blow.fault) for blow in met}),
        "swept_to_the_end": len(ends),
        "stories_swept_to_the_end": _whole_stories(met, ends),
        "failed": [f"{blow.story} {blow.victim} {blow.fault.kind} {blow.at}" for blow in failed],
    }


def swept_to_the_end(tried: dict[Blow, Aftermath]) -> set[Sweep]:
    """From the first call on, none left out, until a run met nothing."""
    calls: dict[Sweep, set[int]] = {}
    ends: dict[Sweep, int] = {}
    for blow, outcome in tried.items():
        sweep = Sweep(blow.story, blow.victim, blow.fault)
        if outcome.call is None:
            ends[sweep] = min(blow.at, ends.get(sweep, blow.at))
        else:
            calls.setdefault(sweep, set()).add(blow.at)
        if blow.fault in SINKS:  # there from the start on: once is all
            ends[sweep] = blow.at
    return {sweep for sweep, end in ends.items() if calls.get(sweep, set()) >= set(range(1, end))}


def _whole_stories(met: Iterable[Blow], ends: set[Sweep]) -> dict[str, list[str]]:
    """Of each story the processes all of whose sweeps ended."""
    whole: dict[str, list[str]] = {}
    for story, victim in sorted({(blow.story, blow.victim) for blow in met}):
        begun = {Sweep(b.story, b.victim, b.fault) for b in met if (b.story, b.victim) == (story, victim)}
        if begun <= ends:
            whole.setdefault(story, []).append(victim)
    return whole


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
