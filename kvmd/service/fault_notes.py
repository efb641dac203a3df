"""The channel of a VM's fault notes: KVM_FAULTED_IN goes out, nothing comes in.

It holds no reference on the VM, and ends with it.  A subscriber that does not read loses notes, not its
channel: it asked for hints, and one that is missing only costs it a fault.
"""

from __future__ import annotations

from kvmd.core.faults.fault_notes import FaultNotes
from protocol.rpc.channel import Channel
from protocol.rpc.service import Service
from protocol.units import Gfn

MAX_UNREAD_BYTES = 4 << 20  # some 80,000 notes


class NotesFile:
    """A `Subscriber` over a channel."""

    def __init__(self, notes: FaultNotes) -> None:
        self.channel: Channel | None = None
        self._notes = notes
        notes.subscribe(self)

    def post(self, gfn: Gfn, npages: int, *, writable: bool) -> bool:
        if self.channel is None or self.channel.unsent_bytes >= MAX_UNREAD_BYTES:
            return False
        self.channel.notify("KVM_FAULTED_IN", {"gfn": gfn, "npages": npages, "writable": writable})
        return True

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()

    def closed(self) -> None:
        self._notes.unsubscribe(self)


FAULT_NOTES: Service[NotesFile] = Service("kvm-fault-notes", {})
