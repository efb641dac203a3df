"""Which guest frames a root should translate, kept beside its table and never read from it.

Models nothing of the kernel's: KVM keeps no such record, a dump for other tools needs one.  The probes of
a dump say what a walk must find, so they may not come from a walk.  A root's record is written from what
the writer means to store, under the gfn it means it for, never from what is read back; whether the
page is there, and at which frame, the host's page map says (docs/decisions/0010).
Every frame has a state of one byte, an eighth of its entry; 512 of them, what a table of level 1 maps, are
one bytes object, shared by all regions that a huge leaf maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from protocol.pt import bits
from protocol.pt.entry import is_leaf
from protocol.pt.geometry import INDEX_BITS, entry_start
from protocol.pt.leaf_edit import LeafEdit, SomePages
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Level, pages_of_level

REGION = 1 << INDEX_BITS

NEVER_MAPPED, READ_ONLY, WRITABLE, ZAPPED = range(4)
MAPPED = (READ_ONLY, WRITABLE)

_WHOLE = tuple(bytes([state]) * REGION for state in range(4))
_ZAP = bytes.maketrans(bytes(MAPPED), bytes([ZAPPED, ZAPPED]))
_PROTECT = bytes.maketrans(bytes([WRITABLE]), bytes([READ_ONLY]))


class MapRecord:
    """Told of every entry that is stored in a root's table."""

    __slots__ = ("_regions",)

    def __init__(self) -> None:
        self._regions: dict[int, bytes | bytearray] = {}

    def store(self, gfn: Gfn, level: Level, entry: int) -> None:
        """`entry` becomes the one of `level` that covers `gfn`; a table linked there translates as before."""
        if level == LEVEL_4K:
            states, index = self._regions.get(gfn >> INDEX_BITS), gfn & REGION - 1
            if type(states) is not bytearray:
                states = self._own(gfn >> INDEX_BITS)
            if entry & bits.READ:
                states[index] = WRITABLE if entry & bits.WRITE else READ_ONLY
            elif states[index] in MAPPED:
                states[index] = ZAPPED
        elif not entry & bits.READ:
            self._zap(gfn, level)
        elif is_leaf(entry, level):
            whole = _WHOLE[WRITABLE if entry & bits.WRITE else READ_ONLY]
            self._regions.update(dict.fromkeys(_regions_of(gfn, level), whole))

    def store_run(self, gfn: Gfn, level: Level, old: list[int], new: list[int]) -> None:
        """`new` are the entries of `level` from `gfn` on, `old` were; none of them leads to a table."""
        if level > LEVEL_4K:
            for index, (was, now) in enumerate(zip(old, new, strict=True)):
                if was != now:
                    self.store(Gfn(gfn + (index << INDEX_BITS * (level - 1))), level, now)
            return
        states, first = self._own(gfn >> INDEX_BITS), gfn & REGION - 1
        mapped = states[first : first + len(new)].translate(_ZAP)
        for index, entry in enumerate(new):
            if entry & bits.READ:
                mapped[index] = WRITABLE if entry & bits.WRITE else READ_ONLY
        states[first : first + len(new)] = mapped

    def edit(self, span: GfnSpan, edit: LeafEdit, wanted: SomePages | None) -> None:
        """That became of the small leaves in `span`, if they are `wanted`; nothing huge maps any of it."""
        if not edit.clear & (bits.READ | bits.WRITE):
            return
        becomes = _ZAP if edit.clear & bits.READ else _PROTECT
        regions = self._regions
        whole = range(-(-span.start // REGION), span.end // REGION if wanted is None else 0)
        for number in self._having(range(span.start // REGION, -(-span.end // REGION))):
            if number in whole:
                regions[number] = regions[number].translate(becomes)
                continue
            begin, own = number * REGION, self._own(number)
            start, end = max(span.start, begin), min(span.end, begin + REGION)
            if wanted is None or wanted.all_in(start, end):
                part = slice(start - begin, end - begin)
                own[part] = own[part].translate(becomes)
            else:
                for frame in wanted.within(start, end):
                    own[frame - begin] = becomes[own[frame - begin]]

    def state(self, gfn: Gfn) -> int:
        region = self._regions.get(gfn >> INDEX_BITS)
        return NEVER_MAPPED if region is None else region[gfn & REGION - 1]

    def count(self, states: Iterable[int]) -> int:
        """Frames in one of `states`."""
        return sum(region.count(state) for region in self._regions.values() for state in states)

    def spread(self, states: tuple[int, ...], count: int) -> Iterator[Gfn]:
        """About `count` frames in one of `states`, in order, from all over; looks into no more regions."""
        having = sorted(r for r, region in self._regions.items() if any(s in region for s in states))
        each = -(-count // max(len(having), 1))
        for number in having[:: max(len(having) // count, 1)]:
            found = [i for i, state in enumerate(self._regions[number]) if state in states]
            for index in found[:: max(len(found) // each, 1)]:
                yield Gfn((number << INDEX_BITS) + index)

    def _own(self, region: int) -> bytearray:
        """The region's states, from now on to be changed one by one."""
        states = self._regions.get(region)
        if type(states) is not bytearray:
            states = self._regions[region] = bytearray(states or REGION)
        return states

    def _zap(self, gfn: Gfn, level: Level) -> None:
        for region in self._having(_regions_of(gfn, level)):
            self._regions[region] = self._regions[region].translate(_ZAP)

    def _having(self, regions: range) -> list[int]:
        """Those of them that have a state."""
        if len(self._regions) < len(regions):
            return [region for region in self._regions if region in regions]
        return [region for region in regions if region in self._regions]


def _regions_of(gfn: Gfn, level: Level) -> range:
    """Those of a huge entry."""
    first = entry_start(gfn, level) >> INDEX_BITS
    return range(first, first + pages_of_level(Level(level - 1)))
