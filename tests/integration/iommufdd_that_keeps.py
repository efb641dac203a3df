"""iommufdd that keeps entries of pages it has given back, with every cache clean: a program for a test."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from iommufdd.__main__ import main
from iommufdd.core.area import Span
from iommufdd.core.hwpt_mirror import HwptMirror
from iommufdd.core.mirror_pins import MirrorPins
from protocol.units import Iova

_take_unpinned, _unpin = HwptMirror.take_unpinned, MirrorPins.unpin


def take_unpinned(self: HwptMirror, spans: Iterable[Span[Iova]]) -> None:
    """Taken out, to be flushed, and put back."""
    spans = list(spans)
    leaves = [leaf for start, end in spans for leaf in self.table.leaves_in(start, end - start)]
    _take_unpinned(self, spans)
    for leaf in leaves:
        self.put_run(leaf.iova, [leaf.hpa], leaf.level, writable=leaf.writable)


async def unpin(self: MirrorPins, name: int) -> None:
    leaves = [leaf for pin in self for leaf in self._hwpt.table.leaves_in(pin.start, pin.end - pin.start)]
    await _unpin(self, name)
    for leaf in leaves:
        self._hwpt.put_run(leaf.iova, [leaf.hpa], leaf.level, writable=leaf.writable)


if __name__ == "__main__":
    HwptMirror.take_unpinned = take_unpinned  # type: ignore[method-assign]
    MirrorPins.unpin = unpin  # type: ignore[method-assign]
    sys.exit(main())
