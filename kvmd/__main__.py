"""`kvmd --socket PATH`: run the KVM side."""

from __future__ import annotations

import sys

from kvmd import config
from kvmd.service.door import Kvmd
from protocol.daemon import run


def main(argv: list[str] | None = None) -> int:
    options, settings = config.parse(argv)
    return run("kvmd", options, lambda loop: Kvmd(loop, settings))


if __name__ == "__main__":
    sys.exit(main())
