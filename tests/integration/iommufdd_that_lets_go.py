"""iommufdd that takes a time-out for an ack, and leaves the device where it is: a program for a test to
start.
"""

from __future__ import annotations

import sys

from iommufdd.__main__ import main
from iommufdd.core.intel_iommu import IntelIommu
from protocol.flow import done


async def leave_it(self: IntelIommu, rid: int) -> None:
    """Planted: whoever waits is told, and the function still reaches what it was to forget."""
    self._taken_off[rid] = done(None)


if __name__ == "__main__":
    IntelIommu._take_off = leave_it  # type: ignore[method-assign]
    sys.exit(main())
