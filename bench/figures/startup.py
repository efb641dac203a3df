"""From starting the client until its machine is up: three daemons ready, connected, a device attached.

Not pinned: the daemons start side by side, as they do for a user.
"""

from __future__ import annotations

from bench.contenders import Given, Program
from bench.harness import AtMost, Figure, Row

STARTS = 3  # in one round: about a second each

OURS = Program(
    "four processes ready", module="bench.ours.startup", args=lambda bench: (str(STARTS),), pinned=False
)

STARTUP = Figure("startup", "started to ready", (Row(OURS, Given("limit: 1 s", 1e9), AtMost(1)),))
