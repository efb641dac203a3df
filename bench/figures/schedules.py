"""One schedule of a small story in the simulator, judged at each step: in a machine that stands, and from
nothing.  At memory granularity: each 8-byte load and store of a table, ring or PASID entry is a point.
"""

from __future__ import annotations

from bench.contenders import Given, Program
from bench.harness import AtMost, Figure, Row

MACHINES, ROUNDS = 3, 500  # what bringing a machine up takes is a fiftieth of all then
LIVING = Program(
    "a schedule, machine standing",
    module="bench.ours.schedules",
    args=lambda _: (str(MACHINES), str(ROUNDS)),
)
ALONE = Program("a schedule from nothing", module="bench.ours.schedules", args=lambda _: ("20", "1"))

SCHEDULES = Figure(
    "schedules",
    "one fault and one invalidation under a random schedule",
    (
        Row(LIVING, Given("limit: 400/s", 1e9 / 400), AtMost(1)),
        Row(ALONE, Given("limit: 60/s", 1e9 / 60), AtMost(1)),
    ),
)
