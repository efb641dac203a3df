"""What the guest executes: a list of instructions, against memory as its privilege sees it.

Models a guest's code as far as memory sees it: each instruction is a tuple, its name first, with the
operands `protocol/uapi/vcpu.py` gives it.  An access of up to 16 bytes happens as a whole or not at
all, even across pages; a longer `r` or `w` stands for a loop and proceeds page by page, as string
instructions and loops do by their own element, so that what is done before a stop stays done.

Between instructions a vCPU enters the guest anew: it leaves first if its dirty ring is full, or if it was
told not to run at all [KVM x86.c].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvmd.core.cpu.guest_ram import pages_of
from kvmd.core.cpu.vcpu_arch import VcpuArch
from protocol.units import Gpa

Instruction = tuple[Any, ...]
Modification = Callable[[bytes], bytes]

WHOLE_BYTES = 16  # the largest access of one instruction
ACCESS_BYTES = 8  # what loops and polls access
STEP_BATCH = 512  # steps of a loop before others get a turn


class GuestAccess(Protocol):
    """Guest memory; whatever stands in the way of an access is waited for, or left to user space, inside."""

    async def load(self, gpa: Gpa, size: int) -> bytes: ...
    async def store(self, gpa: Gpa, data: bytes) -> None: ...
    async def modify(self, gpa: Gpa, size: int, change: Modification, *, locked: bool) -> None:
        """A read-modify-write: always a write cycle; `locked`: with a LOCK prefix, or one implied."""

    async def fetch(self, gpa: Gpa) -> None: ...
    def prefetch(self, gpa: Gpa) -> None: ...
    async def copy(self, dst: Gpa, src: Gpa, size: int) -> int:
        """As much of a string move as goes in one piece: how many bytes that was."""

    async def fill(self, gpa: Gpa, byte: int, size: int) -> int:
        """The same for a string store."""


class Program:
    """Guest code in execution: how far it is, and what it read."""

    def __init__(self, vcpu: VcpuArch, memory: GuestAccess, code: Sequence[Instruction]) -> None:
        self.finished = 0
        self.reads: list[bytes] = []
        self._vcpu = vcpu
        self._memory = memory
        self._code = code
        self._steps = 0

    # awaits: each name, name, operands: cannot change: the code, given once
    async def execute(self) -> None:
        vcpu = self._vcpu
        for name, *operands in self._code:
            if vcpu.must_leave or vcpu.immediate_exit:
                await vcpu.enter()
            await _EXECUTE[name](self, *operands)
            self.finished += 1
        if vcpu.immediate_exit:  # the OUT that ends the code is an instruction too
            await vcpu.enter()

    async def _r(self, gpa: Gpa, size: int) -> None:
        if size <= WHOLE_BYTES:
            self.reads.append(await self._memory.load(gpa, size))
        else:
            self.reads.append(b"".join([await self._memory.load(*piece) for piece in pages_of(gpa, size)]))

    async def _w(self, gpa: Gpa, data: bytes) -> None:
        if len(data) <= WHOLE_BYTES:
            await self._memory.store(gpa, data)
            return
        for at, count in pages_of(gpa, len(data)):
            await self._memory.store(at, data[at - gpa : at - gpa + count])

    async def _cmpxchg(self, gpa: Gpa, size: int, expect: int, new: int) -> None:
        expected, replacement = _bytes(expect, size), _bytes(new, size)
        await self._memory.modify(gpa, size, lambda old: replacement if old == expected else old, locked=True)

    async def _xchg(self, gpa: Gpa, data: bytes) -> None:
        await self._memory.modify(gpa, len(data), lambda _: data, locked=True)

    async def _add(self, gpa: Gpa, size: int, value: int) -> None:
        def add(old: bytes) -> bytes:
            return _bytes(int.from_bytes(old, "little") + value, size)

        await self._memory.modify(gpa, size, add, locked=True)

    async def _or(self, gpa: Gpa, size: int, value: int) -> None:
        def or_(old: bytes) -> bytes:
            return _bytes(int.from_bytes(old, "little") | value, size)

        await self._memory.modify(gpa, size, or_, locked=False)

    # awaits: at: cannot change: how far this instruction is
    async def _movs(self, dst: Gpa, src: Gpa, size: int) -> None:
        at = 0
        while at < size:
            at += await self._memory.copy(Gpa(dst + at), Gpa(src + at), size - at)
            await self._step(new_instruction=False)

    async def _stos(self, gpa: Gpa, byte: int, size: int) -> None:
        at = 0
        while at < size:
            at += await self._memory.fill(Gpa(gpa + at), byte, size - at)
            await self._step(new_instruction=False)

    async def _exec(self, gpa: Gpa) -> None:
        await self._memory.fetch(gpa)

    async def _prefetch(self, gpa: Gpa) -> None:
        self._memory.prefetch(gpa)

    async def _wloop(self, gpa: Gpa, count: int, stride: int, value: int) -> None:
        word = _bytes(value, ACCESS_BYTES)
        for i in range(count):
            await self._memory.store(Gpa(gpa + i * stride), word)
            await self._step()

    async def _rloop(self, gpa: Gpa, count: int, stride: int) -> None:
        for i in range(count):
            await self._memory.load(Gpa(gpa + i * stride), ACCESS_BYTES)
            await self._step()

    async def _spin_until_zero(self, gpa: Gpa) -> None:
        while any(await self._memory.load(gpa, ACCESS_BYTES)):
            await self._vcpu.pause()

    async def _spin_until_ne(self, gpa: Gpa, value: int) -> None:
        word = _bytes(value, ACCESS_BYTES)
        while await self._memory.load(gpa, ACCESS_BYTES) == word:
            await self._vcpu.pause()

    async def _step(self, *, new_instruction: bool = True) -> None:
        if self._vcpu.must_leave or (new_instruction and self._vcpu.immediate_exit):
            await self._vcpu.enter()
        self._steps += 1
        if self._steps % STEP_BATCH == 0:
            await self._vcpu.pause()


def _bytes(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


_EXECUTE: dict[str, Callable[..., Any]] = {
    "r": Program._r,
    "w": Program._w,
    "cmpxchg": Program._cmpxchg,
    "xchg": Program._xchg,
    "add": Program._add,
    "or": Program._or,
    "movs": Program._movs,
    "stos": Program._stos,
    "exec": Program._exec,
    "prefetch": Program._prefetch,
    "wloop": Program._wloop,
    "rloop": Program._rloop,
    "spin_until_zero": Program._spin_until_zero,
    "spin_until_ne": Program._spin_until_ne,
}
