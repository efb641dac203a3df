"""From starting the processes until all are ready: three daemons up and qemu_shim connected.

Not pinned: the daemons start side by side, as they do for a user.
"""

from __future__ import annotations

from bench.contenders import Given, Unwritten
from bench.harness import AtMost, Figure, Row

OURS = Unwritten("four processes ready", waits_for="qemu_shim/supervisor.py")

STARTUP = Figure("startup", "started to ready", (Row(OURS, Given("limit: 1 s", 1e9), AtMost(1)),))
