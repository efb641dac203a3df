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
from dataclasses import field as member
from enum import Flag
from functools import cached_property
from typing import Any, Final, NewType

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
    `get(word)` reads the value, `put(value)` is the word that holds it: made for the field once, since
    every record that travels goes through them.
    """

    parts: tuple[tuple[int, int], ...]
    kind: Callable[[int], int] = int
    shift: int = 0
    bias: int = 0
    mask: int = member(init=False, repr=False, compare=False)
    get: Callable[[int], int] = member(init=False, repr=False, compare=False)
    put: Callable[[int], int] = member(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_once = object.__setattr__
        set_once(self, "mask", sum(bits(high, low) for high, low in self.parts))
        set_once(self, "get", _getter(self))
        set_once(self, "put", _putter(self))

    @property
    def width(self) -> int:
        return sum(high - low + 1 for high, low in self.parts)

    def __str__(self) -> str:
        return "+".join(f"{high}:{low}" for high, low in self.parts)


def _getter(field: Field) -> Callable[[int], int]:
    mask, low, shift, bias, kind = field.mask, field.parts[0][1], field.shift, field.bias, field.kind
    if len(field.parts) == 1 and not bias:
        if kind is bool:
            return lambda word: word & mask != 0
        if kind is int or isinstance(kind, NewType):  # a NewType gives back what it gets, slowly
            if shift > low:
                return lambda word: (word & mask) << shift - low
            return lambda word: (word & mask) >> low - shift
    pieces = _pieces(field)

    def get(word: int) -> int:
        value = 0
        for piece, low, position in pieces:
            value |= (word & piece) >> low << position
        try:
            return kind((value << shift) + bias)
        except ValueError as e:
            raise FormatError(f"bits {field}: {value:#x} means nothing") from e

    return get


def _putter(field: Field) -> Callable[[int], int]:
    shift, bias, limit, first = field.shift, field.bias, 1 << field.width, field.parts[0][1]
    unaligned = (1 << shift) - 1
    pieces = _pieces(field)
    whole = len(pieces) == 1

    def put(value: int) -> int:
        stored = value - bias
        assert stored & unaligned == 0, f"bits {field}: {value:#x} is not aligned"
        stored >>= shift
        assert 0 <= stored < limit, f"bits {field}: {value:#x} does not fit"
        if whole:
            return stored << first
        word = 0
        for piece, low, position in pieces:
            word |= stored >> position << low & piece
        return word

    return put


def _pieces(field: Field) -> list[tuple[int, int, int]]:
    """(mask in the word, lowest bit in the word, lowest bit in the value) of each piece."""
    pieces, position = [], 0
    for high, low in field.parts:
        pieces.append((bits(high, low), low, position))
        position += high - low + 1
    return pieces


class Layout(dict[str, Field]):
    """The fields of one record by the names of its dataclass.

    `pack(record)` is the word of a record of ours, `unpack(word)` the arguments of its constructor;
    FormatError where a value has no meaning.  Both are made when first used, field by field: a record is
    packed by whoever sends it and unpacked by whoever gets it, many times in every fault.
    """

    @cached_property
    def pack(self) -> Callable[[object], int]:
        made: Callable[[object], int] = _made("pack", "record", _packed(self), self)
        return made

    @cached_property
    def unpack(self) -> Callable[[int], dict[str, Any]]:
        made: Callable[[int], dict[str, Any]] = _made("unpack", "word", _unpacked(self), self)
        return made


def _packed(layout: Layout) -> str:
    """What is in order is shifted into place right there; all else is the field's `put`."""
    terms = []
    for name, field in layout.items():
        low, value = field.parts[0][1], f"record.{name}"
        if len(field.parts) > 1 or field.bias or not _is_plain(field.kind):
            terms.append(f"put_{name}({value})")
            continue
        outside = ~(field.mask >> low << field.shift)
        terms.append(
            f"({_shift(value, low - field.shift)} if not {value} & {outside} else put_{name}({value}))"
        )
    return " | ".join(terms) or "0"


def _unpacked(layout: Layout) -> str:
    pairs = []
    for name, field in layout.items():
        value = f"get_{name}(word)"
        if len(field.parts) == 1 and not field.bias:
            if field.kind is bool:
                value = f"word & {field.mask} != 0"
            elif field.kind is int or isinstance(field.kind, NewType):
                value = _shift(f"(word & {field.mask})", field.shift - field.parts[0][1])
        pairs.append(f"{name!r}: {value}")
    return "{" + ", ".join(pairs) + "}"


def _is_plain(kind: Callable[[int], int]) -> bool:
    """Of these `&` and `<<` give an int at once; those of an IntFlag are Python."""
    return isinstance(kind, NewType) or (isinstance(kind, type) and not issubclass(kind, Flag))


def _shift(value: str, left: int) -> str:
    return f"{value} << {left}" if left >= 0 else f"{value} >> {-left}"


def _made(name: str, argument: str, result: str, layout: Layout) -> Any:
    """The function of that name, as `dataclasses` makes its methods: from source."""
    known: dict[str, Any] = {f"put_{field}": of.put for field, of in layout.items()}
    known |= {f"get_{field}": of.get for field, of in layout.items()}
    exec(f"def {name}({argument}):\n    return {result}", known)
    return known[name]


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


def covered(layout: Mapping[str, Field]) -> int:
    """The bits a layout gives a meaning to; the rest of the record is reserved."""
    mask = 0
    for name, field in layout.items():
        assert mask & field.mask == 0, f"{name} at {field} overlaps another field"
        mask |= field.mask
    return mask


def load(raw: bytes, size: int, what: str) -> int:
    if len(raw) != size:
        raise FormatError(f"{what}: {len(raw)} bytes, not {size}")
    return int.from_bytes(raw, "little")


def store(word: int, size: int) -> bytes:
    return word.to_bytes(size, "little")


def require_zero(word: int, reserved: int, what: str) -> None:
    if word & reserved:
        raise FormatError(f"{what}: reserved bits {word & reserved:#x} are set")
