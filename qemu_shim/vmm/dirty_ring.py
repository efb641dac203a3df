"""The dirty ring of a vCPU, as a VMM harvests it [KVM dirty_ring.c].

The memory is shared with KVM: an entry is read while DIRTY is set and given back by RESET, in ring order;
KVM_RESET_DIRTY_RINGS makes KVM take the given ones back.
"""

from __future__ import annotations

from protocol.kernel.port import Kernel
from protocol.uapi import names

_WORDS = names.KVM_DIRTY_GFN_BYTES // 4
"""Of an entry, as struct kvm_dirty_gfn has them: flags, slot, and both halves of its offset."""


class DirtyRing:
    def __init__(self, kernel: Kernel, fd: int, size: int) -> None:
        """Maps the ring; the fd is ours and no longer needed then."""
        self._mapping = kernel.map_peer(fd, size, writable=True)
        self._words = self._mapping.view.cast("I")
        kernel.close(fd)
        self._entries = size // names.KVM_DIRTY_GFN_BYTES
        self._next = 0

    def harvest(self) -> list[tuple[int, int]]:
        """(slot, page of it) of every entry since the last harvest, each marked as collected."""
        found: list[tuple[int, int]] = []
        while True:
            at = self._next % self._entries * _WORDS
            if not self._words[at] & names.KVM_DIRTY_GFN_F_DIRTY:
                return found
            slot, low, high = self._words[at + 1 : at + _WORDS]
            found.append((slot, high << 32 | low))
            self._words[at] = names.KVM_DIRTY_GFN_F_RESET
            self._next += 1

    def close(self) -> None:
        self._words.release()
        self._mapping.close()
