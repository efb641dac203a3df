"""A mirror of a process, its ops those of `importer`, and 16 pages that it watches."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from kvmd.core.mm.check import check_memory
from kvmd.core.mm.hmm import FoundPages, Mirror
from kvmd.core.mm.madvise import dontneed
from protocol.flow import Wait
from protocol.units import Hpa, Hva, Pfn
from tests.kit.importer import HandLease
from tests.kit.kvmd import World

PAGE = 4096
PAGES = 16
SIZE = PAGES * PAGE
MIB2 = 2 << 20


class MirroredPages(World):
    """`host`: what a `World` takes."""

    def __init__(self, *, level: int = 1, **host: Any) -> None:
        super().__init__(**host)
        self.memory = self.host.memory
        self.hva = self.map(PAGES, level)
        self.mirror = Mirror(self.mm)
        self.run(self.mirror.register(self.importer, HandLease()))
        self.mirror.watch(self.hva, PAGES * (PAGE << 9 * (level - 1)))

    def at(self, page: int) -> Hva:
        return Hva(self.hva + page * PAGE)

    def write(self, page: int, data: bytes = b"written") -> None:
        self.run(self.mm.write(self.at(page), data))

    def fault(self, page: int = 0, pages: int = 1, *, write: bool = True) -> FoundPages:
        return self.run(self.faulting(page, pages, write=write))

    def faulting(
        self, page: int = 0, pages: int = 1, *, write: bool = True
    ) -> Coroutine[Any, None, FoundPages]:
        return self.mirror.range_fault(self.at(page), pages * PAGE, write=write)

    def look(self, page: int = 0, pages: int = PAGES) -> FoundPages:
        return self.run(self.mirror.range_fault(self.at(page), pages * PAGE, write=True, fault=False))

    def pin(self, page: int = 0, pages: int = 1, *, write: bool = True, area: int = 0) -> FoundPages:
        return self.run(self.mirror.pin(self.at(page), pages * PAGE, write=write, area=area))

    def unpin(self, page: int = 0, pages: int = PAGES, *, area: int = 0) -> int:
        return self.run(self.mirror.unpin(self.at(page), pages * PAGE, area=area))

    def drop(self, page: int = 0, pages: int = 1) -> None:
        self.do(dontneed(self.mm, self.at(page), pages * PAGE))

    def dropping(self, page: int = 0, pages: int = 1) -> Wait[int]:
        """Told, and not acked."""
        return self.start(dontneed(self.mm, self.at(page), pages * PAGE))

    def frame(self, pfn: Pfn, size: int = PAGE) -> bytes:
        """What a device reads there."""
        return self.host.read_frame(Hpa(pfn << 12), size)

    def tag(self, pfn: Pfn) -> int:
        return self.bare.tags.read(pfn)

    @property
    def told(self) -> list[tuple[int, int]]:
        """(page, pages) of each message."""
        return [((start - self.hva) // PAGE, size // PAGE) for start, size, _ in self.importer.heard]

    def violations(self) -> list[str]:
        return check_memory(self.memory, self.host.processes)
