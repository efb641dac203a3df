"""`python -m bench.ours.schedules MACHINES ROUNDS`: machines one after the other, so many schedules in each;
nanoseconds of one, its share of bringing the machine up and down included.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter_ns

from bench.timing import percentiles
from simulator.command import find
from simulator.search.replay import Recorded
from simulator.search.walk import RandomWalk
from simulator.settle import settle
from simulator.world.schedule import Judged

STORY, DESIGN = "fault", "shared"


def main(machines: int, rounds: int) -> None:
    settle()
    player = Judged(find, STORY, DESIGN)(rounds)
    strategy = Recorded(RandomWalk(1))
    took = []
    for _ in range(machines + 1):  # the first makes what an interpreter makes once
        began = perf_counter_ns()
        for _ in range(rounds):
            end = player(strategy)
            assert not end.invariant, end
            strategy.ended(False)
        took.append((perf_counter_ns() - began) / rounds)
    p50, p99 = percentiles(took[1:])
    sys.stdout.write(json.dumps({"p50": p50, "p99": p99}) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
