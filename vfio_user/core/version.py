"""The first message: which version, and with which capabilities [vfio-user VFIO_USER_VERSION].

The server answers with the major version that was proposed, a minor version not above it, and of its
capabilities those the client named too.  One it does not know is no error: it is left out of the answer.
Whoever proposes something malformed, or a major version that is not ours, is hung up on.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Final

from protocol.errors import PeerError, shown
from vfio_user.core.limits import (
    DMA_PAGE_BYTES,
    MAX_DATA_XFER_BYTES,
    MAX_DMA_WINDOWS,
    MAX_MSG_FDS,
    MAX_VERSION_BYTES,
)

_VERSION: Final = struct.Struct("<HH")
MAJOR: Final = 0
MINOR: Final = 0  # QEMU takes no other [QEMU hw/vfio-user/proxy.c]

# What the server can do.  The numbers are its own limits: each end says what it takes, and this one sends
# neither fds nor data that nobody asked for.
SERVED: Final = {
    "max_msg_fds": MAX_MSG_FDS,
    "max_data_xfer_size": MAX_DATA_XFER_BYTES,
    "max_dma_maps": MAX_DMA_WINDOWS,
    "pgsizes": DMA_PAGE_BYTES,
    "write_multiple": True,
}


@dataclass(frozen=True, slots=True)
class Negotiated:
    """`answer`: the body of the reply."""

    write_multiple: bool
    answer: bytes


def negotiate(body: bytes) -> Negotiated:
    """PeerError: no agreement."""
    if len(body) < _VERSION.size:
        raise PeerError(f"a version of {len(body)} bytes, {_VERSION.size} is the least")
    major, minor = _VERSION.unpack_from(body)
    if major != MAJOR:
        raise PeerError(f"version {major}.{minor} was proposed, the server speaks {MAJOR}.{MINOR}")
    proposed = _capabilities(body[_VERSION.size :])
    write_multiple = proposed.get("write_multiple", False)
    if not isinstance(write_multiple, bool):
        raise PeerError(f"write_multiple: {shown(write_multiple)}")
    agreed = {
        name: value
        for name, value in SERVED.items()
        if name in proposed and (name != "write_multiple" or write_multiple)
    }
    text = json.dumps({"capabilities": agreed}, separators=(",", ":"))
    return Negotiated(
        write_multiple,
        _VERSION.pack(MAJOR, MINOR) + text.encode() + b"\0",
    )


def _capabilities(raw: bytes) -> dict[str, object]:
    if not raw:
        return {}
    if len(raw) > MAX_VERSION_BYTES:
        raise PeerError(f"{len(raw)} bytes of version data, at most {MAX_VERSION_BYTES}")
    if not raw.endswith(b"\0"):
        raise PeerError("version data does not end with NUL")
    try:
        data = json.loads(raw[:-1])
    except (ValueError, RecursionError) as error:
        raise PeerError(f"version data is no JSON: {error}") from None
    capabilities = data.get("capabilities", {}) if isinstance(data, dict) else None
    if not isinstance(capabilities, dict):
        raise PeerError(f"version data: {shown(data)}")
    return capabilities
