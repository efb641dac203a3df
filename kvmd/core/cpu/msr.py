"""Model-specific registers of KVM's own: those by which the guest asks KVM to store into its memory.

Models kvm_write_wall_clock [KVM x86.c]: the guest names a gpa, KVM writes struct pvclock_wall_clock there,
once, with an odd version while it is at it.  These are stores like any other: logged, and lost where no
RAM is.
"""

from __future__ import annotations

import struct

from kvmd.core.cpu.guest_ram import GuestRam, pages_of
from protocol.units import Gpa

MSR_KVM_WALL_CLOCK_NEW = 0x4B56_4D00
_VERSION = struct.Struct("<I")
_WALL_CLOCK = struct.Struct("<III")  # version, seconds, nanoseconds
NS = 1_000_000_000
U32_MASK = (1 << 32) - 1


async def set_msr(ram: GuestRam, epoch_ns: int, index: int, value: int) -> bool:
    """KVM_SET_MSRS, one of them, in a guest whose clock read zero at `epoch_ns` since 1970.  False: there is
    no such register."""
    if index != MSR_KVM_WALL_CLOCK_NEW:
        return False
    if value:
        await _write_wall_clock(ram, Gpa(value), epoch_ns)
    return True


# awaits: ram, each data: cannot change: names a VM and bytes; each access looks its slot up
async def _write_wall_clock(ram: GuestRam, gpa: Gpa, epoch_ns: int) -> None:
    old = await _read(ram, gpa, _VERSION.size)
    if old is None:
        return
    (version,) = _VERSION.unpack(old)
    busy = version + (2 if version & 1 else 1) & U32_MASK
    for data in (
        _VERSION.pack(busy),
        _WALL_CLOCK.pack(busy, epoch_ns // NS & U32_MASK, epoch_ns % NS),
        _VERSION.pack(busy + 1 & U32_MASK),
    ):
        if not await _write(ram, gpa, data):
            return


async def _read(ram: GuestRam, gpa: Gpa, size: int) -> bytes | None:
    parts = [await ram.load(at, count) for at, count in pages_of(gpa, size)]
    return None if None in parts else b"".join(part for part in parts if part is not None)


# awaits: ram: cannot change: names a VM; each access looks its slot up
async def _write(ram: GuestRam, gpa: Gpa, data: bytes) -> bool:
    for at, count in pages_of(gpa, len(data)):
        if not await ram.store(at, data[at - gpa : at - gpa + count]):
            return False
    return True
