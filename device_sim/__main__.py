"""`device-sim --socket PATH`: run the silicon."""

from __future__ import annotations

import sys

from device_sim import config
from device_sim.service import DeviceSim
from protocol.daemon import run


def main(argv: list[str] | None = None) -> int:
    options, settings = config.parse(argv)
    return run("device_sim", options, lambda loop: DeviceSim(loop, settings))


if __name__ == "__main__":
    sys.exit(main())
