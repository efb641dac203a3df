"""iommufdd with a bug of ours in the middle of a page request group: a program for a test to start."""

from __future__ import annotations

import sys

from iommufdd.__main__ import main
from iommufdd.core.hwpt_kvm import HwptKvm
from protocol.errors import ModelBug
from protocol.hw.prq import PageRequest

BUG_AT_GFN = 0x8123

_fault_in = HwptKvm.fault_in


async def fault_in(self: HwptKvm, request: PageRequest) -> None:
    if request.addr >> 12 == BUG_AT_GFN:
        raise ModelBug("I8 planted")
    await _fault_in(self, request)


if __name__ == "__main__":
    HwptKvm.fault_in = fault_in  # type: ignore[method-assign]
    sys.exit(main())
