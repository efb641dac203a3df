"""Host frames: allocation of 4 KiB, 2 MiB and 1 GiB pages, and the proof that none is reused too early.

Models the host's page allocator as far as the shared table needs it: a frame has one owner; one that is
given up is zeroed, and may be handed out again because whoever gives it up has waited for every
importer and vCPU to ack its flush first (invariant I6; the frame's tag lets a device check that from
outside). Blocks of 512 free children join again.  A block that is split costs its children one by one, the
lowest first.

Which free frame is handed out is a policy, `Reuse`.  The kernel's per-CPU lists give out first what was given
up last, so that it is still in a cache [mm page_alloc.c]; so does `SOON`.  It hides mistakes: who took a page
too early often gets the very same one back, and a stale translation is true again.  With `LATE` a frame comes
back when there is no other, and a translation that outlived its page is seen to.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import Enum, auto

from protocol.errors import UapiError
from protocol.frame_tags import FREE, FrameTags, is_free
from protocol.units import LEVEL_1G, LEVEL_2M, LEVEL_4K, PAGE_SIZE, Hpa, Level, Pfn, pages_of_level, pfn_of

_CHILDREN = 512
_ZERO_PAGE = bytes(PAGE_SIZE)


class Reuse(Enum):
    SOON = auto()  # what was given up last comes first
    LATE = auto()  # first what nobody had yet, then what was given up longest ago


class Frames:
    """The frames of one window.  `discard(offset, size)` gives zeroed memory back to the host."""

    def __init__(
        self,
        base: Hpa,
        view: memoryview,
        discard: Callable[[int, int], None],
        tags: FrameTags | None = None,
        reuse: Reuse = Reuse.SOON,
    ) -> None:
        assert base % (pages_of_level(LEVEL_1G) * PAGE_SIZE) == 0, "huge frames must be aligned"
        self.view = view
        self.base = base
        self.in_use = 0  # 4 KiB frames handed out
        self._discard = discard
        self._tags = tags
        self._reuse = reuse
        self._first = pfn_of(base)
        self._end = pfn_of(Hpa(base + len(view)))
        self._next = self._first  # frames from here on were never handed out
        self._free: dict[Level, dict[Pfn, None]] = {LEVEL_4K: {}, LEVEL_2M: {}, LEVEL_1G: {}}  # given up
        self._fresh: dict[
            Level, tuple[Pfn, int]
        ] = {}  # the block split last: its children from n on are free
        self._free_children: dict[tuple[Level, Pfn], int] = {}  # of a block in pieces, by the pieces' level

    @property
    def total(self) -> int:
        """Frames of 4 KiB, handed out or not."""
        return self._end - self._first

    @property
    def free(self) -> int:
        return self.total - self.in_use

    def allocate(self, level: Level, owner: int) -> Pfn:
        """A zeroed block of `level`, aligned to its size.  Raises UapiError(ENOMEM)."""
        pfn = self._take(level)
        pages = pages_of_level(level)
        self.in_use += pages
        if self._tags is not None:
            self._tags.change(pfn, pages, owner)
        return pfn

    def release(self, pfn: Pfn, level: Level) -> None:
        """Give a block back.  The caller has seen every flush of it acked."""
        pages = pages_of_level(level)
        if self._tags is not None:
            self._tags.change(pfn, pages, FREE)
        offset = (pfn - self._first) * PAGE_SIZE
        if level == LEVEL_4K:
            self.view[offset : offset + PAGE_SIZE] = _ZERO_PAGE
        else:
            self._discard(offset, pages * PAGE_SIZE)
        self.in_use -= pages
        self._put(pfn, level)

    def split(self, pfn: Pfn, level: Level) -> None:
        """A block handed out as one may come back in blocks of the next smaller level."""
        self._free_children[Level(level - 1), pfn] = 0

    def is_free(self, pfn: Pfn) -> bool:
        """Nobody has it: it was never handed out, or was given up, so far as tags are kept."""
        if not self._first <= pfn < self._next:
            return True
        return self._tags is not None and is_free(self._tags.read(pfn))

    def offset_of(self, pfn: Pfn) -> int:
        """Where the frame's bytes lie in `view`."""
        return (pfn - self._first) * PAGE_SIZE

    def _take(self, level: Level) -> Pfn:
        free = self._free[level]
        if free and (self._reuse is Reuse.SOON or not self._any_fresh(level)):
            pfn = next(reversed(free) if self._reuse is Reuse.SOON else iter(free))
            del free[pfn]
            self._count_child(pfn, level, -1)
            return pfn
        if level == LEVEL_1G:
            return self._take_new()
        if level not in self._fresh:
            parent = self._take(Level(level + 1))
            self._fresh[level] = parent, 0
            self._free_children[level, parent] = _CHILDREN
        parent, n = self._fresh.pop(level)
        if n + 1 < _CHILDREN:
            self._fresh[level] = parent, n + 1
        pfn = Pfn(parent + n * pages_of_level(level))
        self._count_child(pfn, level, -1)
        return pfn

    def _any_fresh(self, level: Level) -> bool:
        """Is there a block of `level`, or one to split, that nobody had since it was joined or made?"""
        fresh = any(above in self._fresh for above in (LEVEL_4K, LEVEL_2M) if above >= level)
        return fresh or self._next + pages_of_level(LEVEL_1G) <= self._end

    def _take_new(self) -> Pfn:
        pfn = self._next
        if pfn + pages_of_level(LEVEL_1G) > self._end:
            raise UapiError(errno.ENOMEM, f"the host has no free frames ({self.in_use} in use)")
        self._next = Pfn(pfn + pages_of_level(LEVEL_1G))
        return pfn

    def _put(self, pfn: Pfn, level: Level) -> None:
        assert pfn not in self._free[level], f"pfn {pfn:#x} released twice"
        self._free[level][pfn] = None
        if level != LEVEL_1G and self._count_child(pfn, level, +1) == _CHILDREN:
            self._join(self._parent(pfn, level), level)

    def _join(self, parent: Pfn, level: Level) -> None:
        """All its children are free: it is one block again."""
        given_up, pages = _CHILDREN, pages_of_level(level)
        if level in self._fresh and self._fresh[level][0] == parent:
            _, given_up = self._fresh.pop(level)
        for i in range(given_up):
            del self._free[level][Pfn(parent + i * pages)]
        del self._free_children[level, parent]
        self._put(parent, Level(level + 1))

    def _count_child(self, pfn: Pfn, level: Level, change: int) -> int:
        if level == LEVEL_1G:
            return 0
        key = (level, self._parent(pfn, level))
        self._free_children[key] = count = self._free_children[key] + change
        return count

    @staticmethod
    def _parent(pfn: Pfn, level: Level) -> Pfn:
        return Pfn(pfn & ~(pages_of_level(Level(level + 1)) - 1))
