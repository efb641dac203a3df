"""Bytes of which some can be written: config space, an MSI-X table, a permission table [PCIe 7.4].

Models registers as the manual gives them: each bit is read-only (RO), read-write (RW), cleared by writing a
one (RW1C), or reads zero and acts when a one is written.  A write of any length at any offset does to each
byte what a byte write would, as byte enables have it.  Must hold:
  - no write changes a bit that is RO;
  - two registers do not overlap, and a bit has one kind (asserted when the registers are made);
  - after `reset` every byte is what it was at first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class RegisterRow(NamedTuple):
    """`size` bytes at `at`; `rw`, `rw1c`, `acts`: masks of its bits, all others are RO."""

    name: str
    at: int
    size: int
    reset: int
    rw: int = 0
    rw1c: int = 0
    acts: int = 0

    @property
    def end(self) -> int:
        return self.at + self.size


class RegisterFile:
    """`size` bytes; where no register is they read zero, and what is written is dropped."""

    def __init__(self, size: int, registers: Iterable[RegisterRow]) -> None:
        self.size = size
        self.by_name = {register.name: register for register in registers}
        self._reset = bytearray(size)
        self._rw, self._rw1c, self._acts = bytearray(size), bytearray(size), bytearray(size)
        self._acting = [register for register in self.by_name.values() if register.acts]
        self._lay_out()
        self._bytes = bytearray(self._reset)

    def _lay_out(self) -> None:
        end = 0
        for name, at, size, reset, rw, rw1c, acts in sorted(self.by_name.values(), key=lambda each: each.at):
            assert end <= at, f"{name} at {at:#x} overlaps the register before it"
            end = at + size
            assert end <= self.size, f"{name} ends at {end:#x} of {self.size:#x}"
            kinds = (rw, rw1c, acts)
            assert sum(kinds) == rw | rw1c | acts, f"{name}: a bit of two kinds"
            assert not reset & acts, f"{name}: a bit that acts reads zero"
            masks = ((self._reset, reset), (self._rw, rw), (self._rw1c, rw1c), (self._acts, acts))
            for place, value in masks:
                place[at:end] = value.to_bytes(size, "little")

    def read(self, offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= self.size, f"{count} bytes at {offset:#x} of {self.size:#x}"
        return bytes(self._bytes[offset : offset + count])

    def write(self, offset: int, data: bytes) -> dict[str, int]:
        """The bits that act and were written one, by the names of their registers."""
        assert offset + len(data) <= self.size, f"{len(data)} bytes at {offset:#x} of {self.size:#x}"
        fired = bytearray(self.size) if self._acting else bytearray()
        for at, byte in enumerate(data, offset):
            rw = self._rw[at]
            self._bytes[at] = (self._bytes[at] & ~rw | byte & rw) & ~(byte & self._rw1c[at])
            if self._acts[at]:
                fired[at] = byte & self._acts[at]
        found = {each.name: int.from_bytes(fired[each.at : each.end], "little") for each in self._acting}
        return {name: bits for name, bits in found.items() if bits}

    def value(self, name: str) -> int:
        """What the register reads."""
        register = self.by_name[name]
        return int.from_bytes(self._bytes[register.at : register.end], "little")

    def store(self, name: str, value: int) -> None:
        """What the function itself puts there, RO or not."""
        register = self.by_name[name]
        self._bytes[register.at : register.end] = value.to_bytes(register.size, "little")

    def reset(self) -> None:
        self._bytes[:] = self._reset
