"""`device-sim --socket PATH`: run the silicon."""

from __future__ import annotations

import sys

from device_sim import config


def main(argv: list[str] | None = None) -> int:
    options, settings = config.parse(argv)
    from device_sim.service import DeviceSim  # `--help` waits for none of it
    from protocol.daemon import run

    return run("device_sim", options, lambda loop: DeviceSim(loop, settings))


if __name__ == "__main__":
    sys.exit(main())
