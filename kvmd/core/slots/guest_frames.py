"""What is behind the guest frames of one VM, side by side for whoever maps one.

Models the part of struct kvm that a fault looks at [KVM kvm_host.h]: a gfn's slot, the process whose memory
backs it, what the host changes there just now, whether it is private, tracked or pinned.  Attributes alone:
each says for itself what may be asked of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.core.mm.mm import Mm
from kvmd.core.slots.host_changes import HostChanges
from kvmd.core.slots.memslot import Memslots
from kvmd.core.slots.page_track import PageTrack
from kvmd.core.slots.pinned import PinnedGfns
from kvmd.core.slots.private_memory import PrivateMemory


@dataclass(slots=True, eq=False)
class GuestFrames:
    slots: Memslots
    mm: Mm
    host_changes: HostChanges
    private: PrivateMemory
    page_track: PageTrack
    pinned: PinnedGfns
