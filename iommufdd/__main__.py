"""`iommufdd --socket PATH --kvmd PATH --device PATH`: run IOMMUFD and the VT-d driver."""

from __future__ import annotations

import sys

from iommufdd import config


def main(argv: list[str] | None = None) -> int:
    options, settings = config.parse(argv)
    from iommufdd.service.door import Iommufdd  # `--help` waits for none of it
    from protocol.daemon import run

    return run("iommufdd", options, lambda loop: Iommufdd(loop, settings))


if __name__ == "__main__":
    sys.exit(main())
