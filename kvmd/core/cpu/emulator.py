"""KVM's instruction emulator: the guest's loads and stores when its CPU does not make them.

Models emulator_read_write [KVM x86.c].  An access is cut at page bounds.  What is RAM is read or written
at once, through the slot's host address; what is not becomes fragments of at most 8 bytes, each an exit
to user space, in order, after the RAM part is done.  A read-modify-write is a load and a store; with a LOCK
prefix the store is at once or not at all.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from kvmd.core.cpu.exits import Exit, Mmio
from kvmd.core.cpu.guest_ram import CmpxchgResult, GuestRam, pages_of
from kvmd.core.cpu.program import Modification
from protocol.errors import UapiError
from protocol.kvm_run import INTERNAL_ERROR_EMULATION, MMIO_BYTES, ExitReason
from protocol.units import Gpa, gfn_of


class Emulator:
    """Guest memory at privilege 0, and wherever the CPU needs help."""

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram

    # awaits: at, count, missing, each at: cannot change: worked out of the operands; each page is looked for
    # by itself
    async def load(self, gpa: Gpa, size: int) -> bytes:
        value = bytearray(size)
        missing: list[tuple[Gpa, int]] = []
        for at, count in pages_of(gpa, size):
            data = await self._ram.load(at, count)
            if data is None:
                missing += _fragments(at, count)
            else:
                value[at - gpa : at - gpa + count] = data
        for at, count in missing:
            data = await Exit(ExitReason.MMIO, mmio=Mmio(at, count, False, b""))
            value[at - gpa : at - gpa + count] = data[:count].ljust(count, b"\0")
        return bytes(value)

    # awaits: at, count, missing, each at: cannot change: worked out of the operands; each page is looked for
    # by itself
    async def store(self, gpa: Gpa, data: bytes) -> None:
        missing: list[tuple[Gpa, int]] = []
        for at, count in pages_of(gpa, len(data)):
            if not await self._ram.store(at, data[at - gpa : at - gpa + count]):
                missing += _fragments(at, count)
        for at, count in missing:
            piece = data[at - gpa : at - gpa + count]
            await Exit(ExitReason.MMIO, mmio=Mmio(at, count, True, piece))

    # awaits: change: cannot change: what the instruction does | new: cannot change: made of `old`; a locked
    # one is stored only where `old` still is
    async def modify(self, gpa: Gpa, size: int, change: Modification, *, locked: bool) -> None:
        """A locked one within a page is a compare-and-exchange at the host's address, where there is one.  If
        that faults it cannot be emulated; if the value is another by now the instruction starts again
        [emulator_cmpxchg_emulated].
        """
        while True:
            old = await self.load(gpa, size)
            new = change(old)
            if not locked or gfn_of(gpa) != gfn_of(Gpa(gpa + size - 1)):
                return await self.store(gpa, new)
            match await self._ram.compare_exchange(gpa, old, new):
                case CmpxchgResult.NO_ADDRESS:
                    return await self.store(gpa, new)
                case CmpxchgResult.STORED:
                    return None
                case CmpxchgResult.FAULT:
                    await _failure(f"locked access at gpa {gpa:#x}: no memory there that may be written")
                case CmpxchgResult.OTHER_VALUE:
                    pass

    async def fetch(self, gpa: Gpa) -> None:
        """Code where no memory is cannot be emulated: user space is told, and it is tried again."""
        while await self._ram.load(gpa, 1) is None:
            await _failure(f"fetch from gpa {gpa:#x}: no memory there")

    def prefetch(self, gpa: Gpa) -> None:
        pass

    async def copy(self, dst: Gpa, src: Gpa, size: int) -> int:
        """REP MOVSB goes byte by byte."""
        await self.store(dst, await self.load(src, 1))
        return 1

    async def fill(self, gpa: Gpa, byte: int, size: int) -> int:
        await self.store(gpa, bytes([byte]))
        return 1


def _failure(why: str) -> Exit:
    return Exit(ExitReason.INTERNAL_ERROR, why=why, suberror=INTERNAL_ERROR_EMULATION)


def _fragments(gpa: Gpa, size: int) -> Iterator[tuple[Gpa, int]]:
    if gpa + size > 1 << 64:
        raise UapiError(errno.EINVAL, f"the guest's access runs past the last gpa: {gpa:#x}+{size:#x}")
    for at in range(0, size, MMIO_BYTES):
        yield Gpa(gpa + at), min(MMIO_BYTES, size - at)
