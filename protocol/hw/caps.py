"""What a remapping unit says it can do: the capability and extended capability registers.

Models CAP_REG and ECAP_REG [VT-d 10.4].  Both are read by the driver and never written, so a register
is its 64 bits, and every field is an accessor of them: `cap.sagaw`, `ecap.smpwc`.  The device model
builds them with `make_cap(...)` and `make_ecap(...)`; a field not named is stored as zero.  Must hold:
  - bits of no field are kept as read: a newer unit is not an error, its new features are just not used;
  - counts are given as meant, not as stored: `mgaw` is a width, `nfr` and `pss` are numbers, `fro` and
    `iro` are byte offsets.
The names are the manual's: SS/FS where the RFC and older kernels say SL/FL (SLLPS, SLTS, FLTS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol, overload

from protocol.hw.fields import Field, Layout, at, covered, flag
from protocol.units import LEVEL_1G, LEVEL_2M, LEVEL_4K, Level, bit, bits


class _Register(Protocol):
    @property
    def value(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Bits:
    """Descriptor: the number in a field of a register."""

    field: Field

    @overload
    def __get__(self, register: None, owner: type) -> _Bits: ...
    @overload
    def __get__(self, register: _Register, owner: type) -> int: ...
    def __get__(self, register: _Register | None, owner: type) -> _Bits | int:
        return self if register is None else self.field.get(register.value)


@dataclass(frozen=True, slots=True)
class _Flag:
    """Descriptor: one bit of a register."""

    field: Field

    @overload
    def __get__(self, register: None, owner: type) -> _Flag: ...
    @overload
    def __get__(self, register: _Register, owner: type) -> bool: ...
    def __get__(self, register: _Register | None, owner: type) -> _Flag | bool:
        return self if register is None else bool(self.field.get(register.value))


def _bits(high: int, low: int, *, shift: int = 0, bias: int = 0) -> _Bits:
    return _Bits(at(high, low, shift=shift, bias=bias))


def _flag(n: int) -> _Flag:
    return _Flag(flag(n))


@dataclass(frozen=True, slots=True)
class Cap:
    value: int

    nd = _bits(2, 0)  # see domain_ids
    rwbf = _flag(4)  # the write buffer must be flushed
    plmr = _flag(5)
    phmr = _flag(6)
    cm = _flag(7)  # caching mode: absent entries are cached too
    sagaw = _bits(12, 8)  # see levels
    mgaw = _bits(21, 16, bias=1)  # width of the largest guest address
    zlr = _flag(22)
    fro = _bits(33, 24, shift=4)  # offset of the fault-recording registers
    sslps = _bits(37, 34)  # see max_huge_page_level
    psi = _flag(39)  # page-selective invalidation
    nfr = _bits(47, 40, bias=1)
    mamv = _bits(53, 48)  # the largest AM of a page-selective invalidation
    dwd = _flag(54)
    drd = _flag(55)
    fs1gp = _flag(56)
    pi = _flag(59)
    fs5lp = _flag(60)
    ecmds = _flag(61)
    esirtps = _flag(62)
    esrtps = _flag(63)

    @property
    def domain_ids(self) -> int:
        return 1 << (4 + 2 * self.nd)

    @property
    def levels(self) -> frozenset[Level]:
        """Levels a second-stage root may have."""
        return frozenset(Level(n + 2) for n in (1, 2, 3) if self.sagaw & bit(n))

    @property
    def max_huge_page_level(self) -> Level:
        """The largest leaf of the second stage: the highest bit of SSLPS counts, as in the kernel's fls()."""
        if self.sslps & bit(1):
            return LEVEL_1G
        return LEVEL_2M if self.sslps & bit(0) else LEVEL_4K


@dataclass(frozen=True, slots=True)
class Ecap:
    value: int

    c = _flag(0)  # page walks are coherent (outside scalable mode)
    qi = _flag(1)
    dt = _flag(2)  # device TLBs
    ir = _flag(3)
    eim = _flag(4)
    pt = _flag(6)
    sc = _flag(7)  # snoop control: PGSNP may be set
    iro = _bits(17, 8, shift=4)  # offset of the IOTLB registers
    mhmv = _bits(23, 20)
    mts = _flag(25)
    nest = _flag(26)
    prs = _flag(29)  # page requests
    ers = _flag(30)
    srs = _flag(31)
    nwfs = _flag(33)
    eafs = _flag(34)
    pss = _bits(39, 35, bias=1)  # bits of a PASID
    pasid = _flag(40)
    dit = _flag(41)
    pds = _flag(42)  # a wait descriptor may drain page requests
    smts = _flag(43)  # scalable mode
    vcs = _flag(44)
    ssads = _flag(45)
    ssts = _flag(46)  # second stage
    fsts = _flag(47)  # first stage
    smpwc = _flag(48)  # page walks are coherent in scalable mode
    rps = _flag(49)
    pms = _flag(51)
    adms = _flag(52)
    rprivs = _flag(53)


def _layout(register: type) -> Layout:
    fields = vars(register).items()
    return Layout({name: item.field for name, item in fields if isinstance(item, _Bits | _Flag)})


CAP_LAYOUT: Final = _layout(Cap)
ECAP_LAYOUT: Final = _layout(Ecap)

assert bits(63, 0) & covered(CAP_LAYOUT) == covered(CAP_LAYOUT)
assert bits(63, 0) & covered(ECAP_LAYOUT) == covered(ECAP_LAYOUT)


def make_cap(**fields: int) -> Cap:
    """A capability register with these fields, named and valued as the accessors of Cap."""
    return Cap(_make(CAP_LAYOUT, fields))


def make_ecap(**fields: int) -> Ecap:
    """An extended capability register with these fields, named and valued as the accessors of Ecap."""
    return Ecap(_make(ECAP_LAYOUT, fields))


def _make(layout: Layout, fields: dict[str, int]) -> int:
    value = 0
    for name, number in fields.items():
        assert name in layout, f"{name} is no field of this register"
        value |= layout[name].put(number)
    return value
