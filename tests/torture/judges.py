"""What must be true after each blow, whoever it befell.

  - who lives answers, and keeps its invariants (STATS, CHECK);
  - no memory of a dead process is mapped by the unit;
  - nothing is left of the story: no VM, frame, table page, HWPT, pinned page, page request, and no process
    has more fds or mappings than before;
  - no device touched a frame that was given up;
  - nobody met a bug of its own;
  - no user is told an errno alone: each says what was asked.

Each finds its mistake when it is planted (tests/torture/test_torture.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import trio

from tests.patience import PATIENCE_S
from tests.torture.daemons import StruckDaemons
from tests.torture.doors import Doors, Silent, doors_of
from tests.torture.holdings import Holdings, all_holdings, holdings, memory_of_the_dead, not_zero

LOOK_S = 0.02
ERRNO = re.compile(r"\[Errno (\d+)\] (?=(.*))")
SIGN_OF_A_BUG = re.compile(r"Traceback|event='bug'|AssertionError")


async def judged(daemons: StruckDaemons, before: Mapping[str, Holdings]) -> list[str]:
    """What is wrong, a sentence each; gives those that live the time to come to rest."""
    said = {name: daemons.new_log(name) for name in daemons.orders}
    found = [f"{name}: {line}" for name, log in said.items() for line in (*bugs(log), *bare_errors(log))]
    try:
        async with doors_of(daemons, daemons.alive) as doors:
            found += [f"does not hold: {line}" for line in await doors.violations()]
            deadline = trio.current_time() + PATIENCE_S
            while True:
                left = await what_is_left(doors, daemons, before)
                if not left or trio.current_time() > deadline:
                    break
                await trio.sleep(LOOK_S)
            found += left
            found += await stale_accesses(doors)
    except Silent as error:
        found.append(f"a survivor does not serve: {error}")
    return found


def bugs(log: str) -> list[str]:
    """Signs of one in what a process said."""
    lines = log.splitlines()
    first = next((n for n, line in enumerate(lines) if SIGN_OF_A_BUG.search(line)), None)
    if first is None:
        return []
    last = next((line for line in reversed(lines) if "Error" in line), lines[first])
    return [f"met a bug: {last.strip()[:300]}"]


def bare_errors(said: str) -> list[str]:
    """An errno behind which comes the C library's sentence for it: nobody said what was asked, nor what to do
    (protocol/kernel/asked.py).
    """
    found = [line for line in said.splitlines() if any(map(_is_bare, ERRNO.finditer(line)))]
    return [f"tells nobody what was asked: {line.strip()[:300]}" for line in found]


def _is_bare(match: re.Match[str]) -> bool:
    return match[2].startswith(os.strerror(int(match[1])))


async def what_is_left(doors: Doors, daemons: StruckDaemons, before: Mapping[str, Holdings]) -> list[str]:
    stats = await doors.stats()
    found = [f"{name} still has {left}" for name in stats if (left := not_zero(name, stats[name]))]
    held = all_holdings(daemons)
    held["the VMM"] = holdings(os.getpid())
    found += memory_of_the_dead(held)
    for name in held:
        more = held[name].beyond(before[name]) if name in before else {}
        if more:
            found.append(f"{name} leaks {more}")
    return found


async def stale_accesses(doors: Doors) -> list[str]:
    devices = (await doors.ask("device_sim", "STATS"))["devices"] if "device_sim" in doors.names else {}
    return [f"{name}: {note}" for name, of in devices.items() for note in of["stale_notes"]]
