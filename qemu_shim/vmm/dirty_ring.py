"""The dirty ring of a vCPU, as a VMM harvests it [KVM dirty_ring.c].

The memory is shared with KVM: an entry is read while DIRTY is set and given back by RESET, in ring order;
KVM_RESET_DIRTY_RINGS makes KVM take the given ones back.
"""

from __future__ import annotations

import struct

from protocol.kernel.port import Kernel
from protocol.uapi import names

_ENTRY = struct.Struct("<IIQ")
_FLAGS = struct.Struct("<I")
assert _ENTRY.size == names.KVM_DIRTY_GFN_BYTES


class DirtyRing:
    def __init__(self, kernel: Kernel, fd: int, size: int) -> None:
        """Maps the ring; the fd is ours and no longer needed then."""
        self._mapping = kernel.map_peer(fd, size, writable=True)
        self._memory = self._mapping.view
        kernel.close(fd)
        self._entries = size // _ENTRY.size
        self._next = 0

    def harvest(self) -> list[tuple[int, int]]:
        """(slot, page of it) of every entry since the last harvest, each marked as collected."""
        found: list[tuple[int, int]] = []
        while True:
            at = self._next % self._entries * _ENTRY.size
            flags, slot, offset = _ENTRY.unpack_from(self._memory, at)
            if not flags & names.KVM_DIRTY_GFN_F_DIRTY:
                return found
            found.append((slot, offset))
            self._memory[at : at + _FLAGS.size] = _FLAGS.pack(names.KVM_DIRTY_GFN_F_RESET)
            self._next += 1

    def close(self) -> None:
        self._mapping.close()
