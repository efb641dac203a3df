"""device_sim whose units walk tables of five levels and no others: a program for a test.

A unit of today that can walk five walks four as well, and then iommufdd fills tables of four.
"""

from __future__ import annotations

import sys
from functools import partial

from device_sim import config
from device_sim.__main__ import main
from device_sim.core.traits import capabilities

if __name__ == "__main__":
    config.capabilities = partial(capabilities, sagaw=0b1000)  # type: ignore[attr-defined]
    sys.exit(main())
