"""Which guest frames a root should translate, kept beside its table and never read from it.

Models nothing of the kernel's: KVM keeps no such record, a dump for other tools needs one.  The probes of
a dump say what a walk must find, so they may not come from a walk.  A root's record is written from what
the writer was *asked* (map this page, zap that span), not from entries; whether the page is there, and
at which frame, the host's page map says (docs/decisions/0010).
Every frame has a state of one byte, an eighth of its entry; 512 of them, what a table of level 1 maps, are
one bytes object, shared by all regions that a huge leaf maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from protocol.pt.geometry import INDEX_BITS, entry_start
from protocol.units import LEVEL_4K, Gfn, GfnSpan, Level, pages_of_level

REGION = 1 << INDEX_BITS

NEVER, READ_ONLY, WRITABLE, ZAPPED = range(4)
MAPPED = (READ_ONLY, WRITABLE)

_WHOLE = tuple(bytes([state]) * REGION for state in range(4))
_ZAP = bytes.maketrans(bytes(MAPPED), bytes([ZAPPED, ZAPPED]))
_PROTECT = bytes.maketrans(bytes([WRITABLE]), bytes([READ_ONLY]))


class MapRecord:
    """Told of every request to the writer that maps a frame, takes it away, or takes its W away."""

    __slots__ = ("_regions",)

    def __init__(self) -> None:
        self._regions: dict[int, bytes | bytearray] = {}

    def map(self, gfn: Gfn, level: Level, *, writable: bool) -> None:
        """The entry of `level` that covers `gfn` is stored, or has its rights changed."""
        state = WRITABLE if writable else READ_ONLY
        if level == LEVEL_4K:
            self._own(gfn >> INDEX_BITS)[gfn & REGION - 1] = state
        else:
            first = entry_start(gfn, level) >> INDEX_BITS
            regions = range(first, first + pages_of_level(Level(level - 1)))
            self._regions.update(dict.fromkeys(regions, _WHOLE[state]))

    def zap(self, span: GfnSpan) -> None:
        self._change(span, _ZAP)

    def write_protect(self, span: GfnSpan) -> None:
        self._change(span, _PROTECT)

    def state(self, gfn: Gfn) -> int:
        region = self._regions.get(gfn >> INDEX_BITS)
        return NEVER if region is None else region[gfn & REGION - 1]

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
        """The region's states, to be changed one by one."""
        states = self._regions.get(region)
        if type(states) is not bytearray:
            states = self._regions[region] = bytearray(states or REGION)
        return states

    def _change(self, span: GfnSpan, change: bytes) -> None:
        first, last = span.start >> INDEX_BITS, span.end - 1 >> INDEX_BITS
        within: Iterable[int] = range(first, last + 1)
        if last - first >= len(self._regions):
            within = [region for region in self._regions if first <= region <= last]
        for region in within:
            states = self._regions.get(region)
            if states is None:
                continue
            base = region << INDEX_BITS
            low, high = max(span.start - base, 0), min(span.end - base, REGION)
            if high - low == REGION:
                self._regions[region] = states.translate(change)
            else:
                self._own(region)[low:high] = states[low:high].translate(change)
