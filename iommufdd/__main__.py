"""`iommufdd --socket PATH --kvmd PATH --device PATH`: run IOMMUFD and the VT-d driver."""

from __future__ import annotations

import sys

from iommufdd import config
from iommufdd.service.door import Iommufdd
from protocol.daemon import run


def main(argv: list[str] | None = None) -> int:
    options, settings = config.parse(argv)
    return run("iommufdd", options, lambda loop: Iommufdd(loop, settings))


if __name__ == "__main__":
    sys.exit(main())
