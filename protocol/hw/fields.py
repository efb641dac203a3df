"""Bit fields of hardware records: where a field lies, written once and used in both directions.

Models: nothing by itself.  A record is one little-endian integer of 128 to 512 bits, and a Field
names bits high:low of it by absolute position, as the manuals' tables do.  A layout maps the names of
a dataclass to fields; whatever a layout does not cover is reserved.  Must hold:
  - the fields of one layout do not overlap (asserted when the record's module is imported);
  - unpack(pack(record)) gives the record back;
  - values of ours that do not fit are an assertion, bytes of others that do not parse a FormatError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from protocol.units import PAGE_SHIFT, Hpa, Iova, Pasid, bits

# What a record holds where it says nothing.
NO_IOVA: Final = Iova(0)
NO_PASID: Final = Pasid(0)
NO_HPA: Final = Hpa(0)


class FormatError(ValueError):
    """Bytes written by somebody else are not a record of this kind."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field in one or more pieces `(high, low)`, least significant piece first.

    `shift` low bits of the value are zero and not stored (addresses); `bias` is what the register
    leaves out of a count ("MGAW - 1").  `kind` turns the number read into the type of the record.
    """

    parts: tuple[tuple[int, int], ...]
    kind: Callable[[int], int] = int
    shift: int = 0
    bias: int = 0

    @property
    def mask(self) -> int:
        return sum(bits(high, low) for high, low in self.parts)

    @property
    def width(self) -> int:
        return sum(high - low + 1 for high, low in self.parts)

    def get(self, word: int) -> int:
        value, position = 0, 0
        for high, low in self.parts:
            value |= ((word & bits(high, low)) >> low) << position
            position += high - low + 1
        try:
            return self.kind((value << self.shift) + self.bias)
        except ValueError as e:
            raise FormatError(f"bits {self}: {value:#x} means nothing") from e

    def put(self, value: int) -> int:
        stored = value - self.bias
        assert stored & ((1 << self.shift) - 1) == 0, f"bits {self}: {value:#x} is not aligned"
        stored >>= self.shift
        assert 0 <= stored < 1 << self.width, f"bits {self}: {value:#x} does not fit"
        word = 0
        for high, low in self.parts:
            word |= (stored << low) & bits(high, low)
            stored >>= high - low + 1
        return word

    def __str__(self) -> str:
        return "+".join(f"{high}:{low}" for high, low in self.parts)


Layout = Mapping[str, Field]


def at(high: int, low: int, kind: Callable[[int], int] = int, *, shift: int = 0, bias: int = 0) -> Field:
    return Field(((high, low),), kind, shift, bias)


def flag(n: int) -> Field:
    return Field(((n, n),), bool)


def byte_at(offset: int, nbytes: int, kind: Callable[[int], int] = int) -> Field:
    """The field of `nbytes` bytes at byte `offset`, as device manuals give their records."""
    return at(8 * (offset + nbytes) - 1, 8 * offset, kind)


def page_at(high: int, low: int, kind: Callable[[int], int] = int) -> Field:
    """An address whose bits 63:12 (or fewer) lie at high:low."""
    return at(high, low, kind, shift=PAGE_SHIFT)


def covered(layout: Layout) -> int:
    """The bits a layout gives a meaning to; the rest of the record is reserved."""
    mask = 0
    for name, field in layout.items():
        assert mask & field.mask == 0, f"{name} at {field} overlaps another field"
        mask |= field.mask
    return mask


def pack(record: object, layout: Layout) -> int:
    word = 0
    for name, field in layout.items():
        word |= field.put(getattr(record, name))
    return word


def unpack(word: int, layout: Layout) -> dict[str, Any]:
    """The arguments of the record's constructor; FormatError where a value has no meaning."""
    return {name: field.get(word) for name, field in layout.items()}


def load(raw: bytes, size: int, what: str) -> int:
    if len(raw) != size:
        raise FormatError(f"{what}: {len(raw)} bytes, not {size}")
    return int.from_bytes(raw, "little")


def store(word: int, size: int) -> bytes:
    return word.to_bytes(size, "little")


def require_zero(word: int, reserved: int, what: str) -> None:
    if word & reserved:
        raise FormatError(f"{what}: reserved bits {word & reserved:#x} are set")
