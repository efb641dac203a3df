"""The compiled code for ranges of leaves, which is loaded when a table is large enough to be worth it.

Models nothing of the kernel's, which is compiled.  Loading costs half a second of a core and memory, more
than a range of a small VM ever does; so it is asked for by a table that grows, and until it has come the loop
over runs does the work, as in a process that never gets any (docs/decisions/0029).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from protocol.pt.leaf_edit import RangeKernels
from protocol.pt.mem import TableWriter

WORTH_TABLES = 32  # of small leaves: 64 MiB of memory, a range of which takes some 10 ms run by run
_MODULE = "protocol.pt.kernels"

Load = Callable[[str, Callable[[ModuleType], None]], None]
"""`load(module, ready)` imports it and calls `ready` with it, from whatever thread, or never."""


class Compiled:
    """Of one window of tables; without `load` there is none."""

    def __init__(self, writer: TableWriter, load: Load | None = None) -> None:
        self.kernels: RangeKernels | None = None
        self._writer = writer
        self._load = load

    def is_wanted(self) -> None:
        """Somebody would gain by it from now on."""
        load, self._load = self._load, None
        if load is not None:
            load(_MODULE, self._has_come)

    def _has_come(self, module: ModuleType) -> None:
        self.kernels = module.Kernels(self._writer)
