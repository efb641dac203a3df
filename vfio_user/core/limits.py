"""What one client may have and ask: each limit of the server by name, told to the client where the protocol
has a word for it [vfio-user Version].

A client that says nothing may count on the protocol's defaults, so no limit here is below the default of what
it limits, but for the windows: real machines have some twenty.
"""

from __future__ import annotations

from typing import Final

from protocol.units import PAGE_SIZE

MAX_MSG_FDS: Final = 16  # with one message; what QEMU sends at most [QEMU hw/vfio-user/proxy.h]
MAX_DATA_XFER_BYTES: Final = 1 << 20  # in one read or write of a region
MAX_MESSAGE_BODY_BYTES: Final = MAX_DATA_XFER_BYTES + 16  # with the fields before the data
MAX_VERSION_BYTES: Final = 4096  # of JSON
MAX_WRITES: Final = 200  # in one REGION_WRITE_MULTI [QEMU hw/vfio-user/protocol.h]
MAX_DMA_WINDOWS: Final = 1024
DMA_PAGE_BYTES: Final = PAGE_SIZE
