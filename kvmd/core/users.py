"""Who keeps a VM.

Models kvm->users_count [KVM kvm_main.c, kvm_get_kvm, kvm_put_kvm]: a VM lives while any fd that belongs to
it does, its own, a vCPU's, a guest_memfd's, a TDP FD's, wherever the last copy is held [RFC 04/42]; and a
request in progress keeps it, as an ioctl keeps its file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from protocol.flow import Flow

T = TypeVar("T")


class VmUsers:
    """Of one VM; whoever makes it is the first.  `last` is called when the last has gone."""

    def __init__(self, last: Callable[[], None]) -> None:
        self.count = 1
        self._last = last

    def get(self) -> None:
        assert self.count, "nobody keeps this VM any more"
        self.count += 1

    def put(self) -> None:
        assert self.count, "a VM put more often than it was got"
        self.count -= 1
        if not self.count:
            self._last()

    async def holding(self, flow: Flow[T]) -> T:
        """A request in progress may outlive the fd it came over."""
        self.get()
        try:
            return await flow
        finally:
            self.put()

    async def put_after(self, closing: Flow[None]) -> None:
        """The last close of a file that keeps the VM: what that takes, then its reference."""
        await closing
        self.put()
