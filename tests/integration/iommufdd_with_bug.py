"""iommufdd with a bug of ours in the middle of a page request group: a program for a test to start."""

from __future__ import annotations

import sys

from iommufdd.__main__ import main
from iommufdd.core.hwpt_kvm import HwptKvm
from protocol.errors import ModelBug
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode

BUG_AT_GFN = 0x8123

_fault = HwptKvm.fault


async def fault(self: HwptKvm, request: PageRequest) -> ResponseCode:
    if request.addr >> 12 == BUG_AT_GFN:
        raise ModelBug("I8 planted")
    return await _fault(self, request)


if __name__ == "__main__":
    HwptKvm.fault = fault  # type: ignore[method-assign]
    sys.exit(main())
