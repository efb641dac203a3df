"""The figures, one file each.

To add one: a file here with a `Figure`, and its name in FIGURES.  Its contenders come from
`bench.contenders`, or are any object with `name`, `unit`, `pinned`, `prepare` and `measure`; a
contender used by several figures lives in `shared.py` and is measured once per round for all of them.
"""

from __future__ import annotations

from bench.figures.chain import CHAIN
from bench.figures.dma import DMA
from bench.figures.invalidation import INVALIDATION
from bench.figures.io_fault import IO_FAULT
from bench.figures.limits import LIMITS
from bench.figures.memory import MEMORY
from bench.figures.ranges import RANGES
from bench.figures.rpc import RPC
from bench.figures.schedules import SCHEDULES
from bench.figures.slots import SLOTS
from bench.figures.startup import STARTUP
from bench.figures.walk import WALK
from bench.harness import Figure

FIGURES: tuple[Figure, ...] = (
    LIMITS,
    RPC,
    CHAIN,
    IO_FAULT,
    INVALIDATION,
    DMA,
    WALK,
    STARTUP,
    MEMORY,
    SCHEDULES,
    SLOTS,
    RANGES,
)
