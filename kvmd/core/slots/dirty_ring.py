"""The dirty ring of a vCPU: pages it dirtied, in their order, in memory that user space maps.

Models struct kvm_dirty_ring over struct kvm_dirty_gfn {u32 flags, u32 slot, u64 offset}, bit for bit
[KVM dirty_ring.c].  KVM fills an entry and then sets DIRTY; user space reads it and then sets RESET; KVM
takes back, from the oldest on, what has RESET.  A vCPU whose ring is full up to the reserve does not enter
the guest; the reserve is for what one entry of the guest may still push.

User space can write anything into its ring.  What it breaks so is its own log: slot and offset are checked
like an ioctl's arguments before they are used.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from protocol.trace import TRACE, KvmDirtyRingPush

DIRTY_GFN_BYTES = 16
KVM_DIRTY_RING_MAX_ENTRIES = 1 << 16
MAX_RING_BYTES = KVM_DIRTY_RING_MAX_ENTRIES * DIRTY_GFN_BYTES
RESERVED_ENTRIES = 64  # [KVM kvm_dirty_ring.h]
PML_ENTRIES = 512  # what the CPU's page-modification log holds
F_DIRTY, F_RESET = 1, 2

_WORDS = DIRTY_GFN_BYTES // 4


class DirtyGfn(NamedTuple):
    """What an entry says: `slot` with the address space in its high half, a page of that slot."""

    slot: int
    offset: int


def reserved_entries(*, pml: bool) -> int:
    """Entries kept free beyond which the ring counts as full."""
    return RESERVED_ENTRIES + (PML_ENTRIES if pml else 0)


class DirtyRing:
    """`memory` is the mapping of the entries; indices run on and are cut to the ring's size at each use.
    `index` is the ring's own, that of its vCPU.
    """

    def __init__(self, memory: memoryview, reserved: int, index: int = 0) -> None:
        # Four bytes are one store, so a reader sees flags old or new, and x86 keeps the order of stores.
        self._words = memory.cast("I")
        self._entries = len(memory) // DIRTY_GFN_BYTES
        self._soft_limit = self._entries - reserved
        self._dirty_index = 0
        self._reset_index = 0
        self._index = index
        self._due = Counter[DirtyGfn]()  # pushed and not taken back, whatever user space made of its entry
        self.overflowed = False  # for good: a page was told to nobody
        assert self._entries & (self._entries - 1) == 0, "the size of a ring is a power of two"

    @property
    def used(self) -> int:
        return self._dirty_index - self._reset_index

    @property
    def soft_full(self) -> bool:
        return self.used >= self._soft_limit

    def push(self, slot: int, offset: int) -> bool:
        """False: there is no room, because KVM stored for user space and not for the guest."""
        if self.used >= self._entries:
            self.overflowed = True
            return False
        at = self._at(self._dirty_index)
        words = self._words
        words[at + 1], words[at + 2], words[at + 3] = slot, offset & 0xFFFF_FFFF, offset >> 32
        words[at] = F_DIRTY
        self._dirty_index += 1
        self._due[DirtyGfn(slot, offset)] += 1
        if TRACE.on:
            dirty, reset = self._dirty_index, self._reset_index
            TRACE.emit(KvmDirtyRingPush(self._index, dirty, reset, slot, offset, dirty - reset))
        return True

    def take_back(self) -> list[DirtyGfn]:
        """Entries user space has harvested, oldest first; they are free again [KVM kvm_dirty_ring_reset]."""
        taken = []
        while self.used:
            at = self._at(self._reset_index)
            flags, slot, low, high = self._words[at : at + _WORDS]
            if not flags & F_RESET:
                break
            entry = DirtyGfn(slot, low | high << 32)
            taken.append(entry)
            self._due[entry] -= 1
            if self._due[entry] <= 0:
                del self._due[entry]
            self._words[at] = 0
            self._reset_index += 1
        return taken

    def tells(self, slot: int, offset: int) -> bool:
        """Is an entry of that page still to be given back, or was it written over by user space?"""
        return DirtyGfn(slot, offset) in self._due

    def _at(self, index: int) -> int:
        return (index & (self._entries - 1)) * _WORDS
