"""`kvmd --socket PATH`: run the KVM side."""

from __future__ import annotations

import sys

from kvmd import config


def main(argv: list[str] | None = None) -> int:
    options, settings = config.parse(argv)
    from kvmd.service.door import Kvmd  # `--help` waits for none of it
    from protocol.daemon import run

    return run("kvmd", options, lambda loop: Kvmd(loop, settings))


if __name__ == "__main__":
    sys.exit(main())
