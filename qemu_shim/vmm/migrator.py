"""The source's side of a live migration of one memslot: what KVM reports as dirty, and what was sent.

It knows what KVM tells user space and nothing else.  A vCPU's stores may come by a dirty ring, a device's
come by the bitmap, because no vCPU makes them.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol.uapi import names
from protocol.units import PAGE_SIZE, align_up
from qemu_shim.vmm.designs import RamSlot
from qemu_shim.vmm.machine import Machine

MANUAL_PROTECT = 1


class Migrator:
    """`copy` is the target's memory."""

    def __init__(self, guest: Machine, slot: RamSlot, bitmap: int) -> None:
        self.pages = slot.size // PAGE_SIZE
        self.copy = bytearray(slot.size)
        self.sent = 0
        self._guest = guest
        self._slot = slot
        self._bitmap = bitmap  # the address where KVM_GET_DIRTY_LOG puts its bits

    @classmethod
    async def start(cls, guest: Machine, slot: RamSlot) -> Migrator:
        """Log from here on, into the rings of its vCPUs if they have any."""
        bitmap = await guest.process.mmap(align_up(slot.size // PAGE_SIZE // 8, PAGE_SIZE))
        await guest.vm.enable_cap(names.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT)
        flags = names.KVM_MEM_LOG_DIRTY_PAGES
        await guest.vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, flags)
        return cls(guest, slot, bitmap)

    async def dirty(self) -> set[int]:
        """The pages KVM reports, logged anew from here on; all, if nobody can tell what the device wrote."""
        vm, found = self._guest.vm, set()
        for ring in self._guest.rings:
            found |= {page for slot, page in ring.harvest() if slot == self._slot.slot}
        if self._guest.rings:
            await vm.reset_dirty_rings()
        await vm.get_dirty_log(self._slot.slot, self._bitmap)
        bits = await self._guest.process.read(self._bitmap, (self.pages + 7) // 8)
        await vm.clear_dirty_log(self._slot.slot, 0, self.pages, self._bitmap)
        if self._guest.config.design.whole_dirty:
            found |= set(range(self.pages))
        return found | {page for page in range(self.pages) if bits[page // 8] >> page % 8 & 1}

    async def send(self, pages: Iterable[int]) -> None:
        """As the source's process sees them now."""
        for page in pages:
            at = page * PAGE_SIZE
            self.copy[at : at + PAGE_SIZE] = await self._guest.process.read(self._slot.hva + at, PAGE_SIZE)
            self.sent += 1

    async def differences(self) -> list[int]:
        """The pages that are not at the target as they are here."""
        process, size = self._guest.process, PAGE_SIZE
        return [
            page
            for page in range(self.pages)
            if await process.read(self._slot.hva + page * size, size) != self.copy[page * size :][:size]
        ]
