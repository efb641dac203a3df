"""Processes, forks and files under any history of calls and host actions, against plain dicts.

The model keeps eight bytes a page: what each process should read, whatever frames, sharing and sizes the
core chooses. Every process has a secondary MMU that is as lazy as it may be: it goes on using a page it
once looked up, also to write, until it is told that the range changes. So a stale or too generous entry
shows as a byte that should not be there, or as a cached page the host does not have any more.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kvmd.core.mm.check import check_memory
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.fork import fork
from kvmd.core.mm.madvise import ADVICE, collapse
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.mremap import mremap
from kvmd.core.mm.page import Page, Pte
from kvmd.core.mm.reclaim import merge, migrate, numa_hint, swap_out
from kvmd.core.mm.thp import split
from kvmd.core.mm.vma import Prot
from protocol.errors import UapiError
from protocol.units import PAGE_SIZE, Hva, Pfn
from tests.kit.by_hand import ByHand
from tests.kit.kvmd import BareHost

BASE = 0x4000_0000
PROT = {"none": Prot.NONE, "r": Prot.READ, "rw": Prot.READ | Prot.WRITE}
ZERO = bytes(8)
ACTIONS: dict[str, Callable[[Mm, Hva, int], Coroutine[Any, None, int]]] = {
    "swap": swap_out,
    "migrate": migrate,
    "merge": merge,
    "hint": numa_hint,
    "collapse": collapse,
    "split": split,
}
MAX_PROCESSES = 3


class FileModel:
    def __init__(self, file: MemoryFile | None, pages: int) -> None:
        self.file = file
        self.pages = pages
        self.data: dict[int, bytes] = {}


@dataclass
class Mapped:
    """One page of address space."""

    prot: str
    file: FileModel | None = None
    index: int = 0
    shared: bool = False


class CachedPage(NamedTuple):
    pfn: int
    writable: bool
    level: int


@dataclass(eq=False)
class CachingNotifier:
    """The notifier of one process."""

    cached: dict[int, CachedPage] = field(default_factory=dict)

    async def invalidate_range_start(self, start: Hva, end: Hva) -> None:
        first, last = start - BASE >> 12, end - BASE - 1 >> 12
        self.cached = {page: held for page, held in self.cached.items() if not first <= page <= last}

    def invalidate_range_end(self, start: Hva, end: Hva) -> None: ...

    async def clear_flush_young(self, start: Hva, end: Hva) -> bool:
        return False


class Process:
    def __init__(self, mm: Mm) -> None:
        self.mm = mm
        self.mmu = CachingNotifier()
        self.mm.notifiers.append(self.mmu)
        self.mapped: dict[int, Mapped] = {}
        self.own: dict[int, bytes] = {}  # pages it has written in private mappings
        self.lazy: set[int] = set()  # that MADV_FREE may have taken
        self.pins: dict[int, tuple[Page, int]] = {}  # page -> what is pinned, the frame it was in
        self.loose: list[tuple[Page, int]] = []  # pinned, and mapped no more

    def forget(self, first: int, pages: int) -> None:
        for page in range(first, first + pages):
            self.own.pop(page, None)
            self.lazy.discard(page)
            self.let_go(page)

    def let_go(self, page: int) -> None:
        if page in self.pins:
            self.loose.append(self.pins.pop(page))


class MmHistory(ByHand):
    """Each method is one step; what it should do is in the dicts when it returns."""

    def __init__(self, frames_gib: int = 1) -> None:
        super().__init__()
        self.bare = BareHost(frames_gib=frames_gib)
        self.host = self.bare.host
        self.processes = [Process(self.host.create_mm())]
        self.file = MemoryFile(self.host.memory, "f", 8 * PAGE_SIZE)
        self.model = FileModel(self.file, 8)
        self.done: Counter[str] = Counter()

    def outcome(self, flow: Coroutine[Any, None, Any]) -> tuple[int, Any]:
        """The errno, and what came of it."""
        try:
            return 0, self.run(flow)
        except UapiError as error:
            return error.errno, None

    def attempt(self, name: str, flow: Coroutine[Any, None, Any]) -> int:
        """The errno; what succeeded is counted, so that a test can see that it did."""
        error, result = self.outcome(flow)
        self.done[name] += 0 if error else result if name in ACTIONS else 1
        return error

    # -- steps -----------------------------------------------------------------------------------------

    def mmap(self, who: int, first: int, pages: int, kind: str, prot: str, index: int) -> None:
        process = self.process(who)
        model = None
        if kind == "anon_shared":
            model, index = FileModel(None, pages), 0
        elif kind != "anon":
            model = self.model
        flow = process.mm.mmap(
            hva(first),
            pages * PAGE_SIZE,
            PROT[prot],
            shared=kind.endswith("shared"),
            file=model.file if model is not None else None,
            offset=index * PAGE_SIZE,
            fixed=True,
        )
        assert self.attempt("mmap", flow) == 0
        process.forget(first, pages)
        for i in range(pages):
            process.mapped[first + i] = Mapped(prot, model, index + i, kind.endswith("shared"))

    def munmap(self, who: int, first: int, pages: int) -> None:
        process = self.process(who)
        assert self.attempt("munmap", process.mm.munmap(hva(first), pages * PAGE_SIZE)) == 0
        process.forget(first, pages)
        for page in range(first, first + pages):
            process.mapped.pop(page, None)

    def mprotect(self, who: int, first: int, pages: int, prot: str) -> None:
        process = self.process(who)
        error = self.attempt("mprotect", process.mm.mprotect(hva(first), pages * PAGE_SIZE, PROT[prot]))
        for page in range(first, first + pages):
            if page not in process.mapped:
                assert error == errno.ENOMEM
                return
            process.mapped[page].prot = prot
        assert error == 0

    def madvise(self, who: int, first: int, pages: int, advice: str) -> None:
        process = self.process(who)
        error = self.attempt(advice, ADVICE[advice](process.mm, hva(first), pages * PAGE_SIZE))
        span = [page for page in range(first, first + pages) if page in process.mapped]
        if advice == "dontneed":
            assert error == (0 if len(span) == pages else errno.ENOMEM)
            for page in span:
                process.own.pop(page, None)
                process.lazy.discard(page)
                process.let_go(page)
        elif advice in ("free", "remove"):
            done = self._until_refused(process, span, advice)
            if len(done) == len(span):
                assert error == (0 if len(span) == pages else errno.ENOMEM)
            else:
                assert error in (errno.EINVAL, errno.EACCES)
            for page in done:
                where = process.mapped[page]
                if where.file is not None:
                    self._punched(where.file, where.index, 1)
                elif page in process.own:
                    process.lazy.add(page)

    @staticmethod
    def _until_refused(process: Process, span: list[int], advice: str) -> list[int]:
        """The pages before the first whose mapping does not take the advice."""
        for done, page in enumerate(span):
            where = process.mapped[page]
            if where.file is None if advice == "remove" else where.file is not None:
                return span[:done]
            if advice == "remove" and not where.shared:
                return span[:done]
        return span

    def mremap(self, who: int, first: int, pages: int, to: int) -> None:
        process = self.process(who)
        flow = mremap(process.mm, hva(first), pages * PAGE_SIZE, pages * PAGE_SIZE, hva(to))
        error = self.attempt("mremap", flow)
        if to < first + pages and first < to + pages:
            assert error == errno.EINVAL
            return
        if first not in process.mapped:
            assert error == errno.EFAULT
            return
        assert error == 0
        for i in [i for i in range(pages) if first + i in process.mapped]:  # gaps stay gaps
            process.forget(to + i, 1)
            process.mapped[to + i] = process.mapped.pop(first + i)
            for held in (process.own, process.pins):
                if first + i in held:
                    held[to + i] = held.pop(first + i)  # type: ignore[assignment]
            if first + i in process.lazy:
                process.lazy.remove(first + i)
                process.lazy.add(to + i)

    def act(self, who: int, first: int, pages: int, action: str) -> None:
        flow = ACTIONS[action](self.process(who).mm, hva(first), pages * PAGE_SIZE)
        assert self.attempt(action, flow) in (0, errno.ENOMEM, errno.EINVAL, errno.EAGAIN)

    def fork(self, who: int) -> None:
        if len(self.processes) < MAX_PROCESSES:
            parent, child = self.process(who), Process(self.host.create_mm())
            assert self.attempt("fork", fork(parent.mm, child.mm)) == 0
            child.mapped = {page: replace(mapped) for page, mapped in parent.mapped.items()}
            child.own, child.lazy = dict(parent.own), set(parent.lazy)
            self.processes.append(child)

    def exit(self, who: int) -> None:
        process = self.process(who)
        self.processes.remove(process)
        self.run(process.mm.exit())
        for page, _ in (*process.loose, *process.pins.values()):
            process.mm.unpin(page)
        self.host.forget_mm(process.mm)
        if not self.processes:
            self.processes.append(Process(self.host.create_mm()))

    # -- accesses --------------------------------------------------------------------------------------

    def access(self, who: int, page: int, data: bytes | None) -> None:
        """By the process itself."""
        process = self.process(who)
        mm, at = process.mm, hva(page)
        error, seen = self.outcome(mm.read(at, 8) if data is None else mm.write(at, data))
        assert error == (0 if self.allowed(process, page, data is not None) else errno.EFAULT)
        if not error and data is None:
            self.compare(process, page, seen)
        elif not error and data is not None:
            self.store(process, page, data)

    def guest(self, who: int, page: int, data: bytes | None) -> None:
        """By the secondary MMU, through what it has looked up some time."""
        process = self.process(who)
        held = process.mmu.cached.get(page)
        if held is None or (data is not None and not held.writable):
            error, found = self.outcome(process.mm.get_user_page(hva(page), write=data is not None))
            assert error == (0 if self.allowed(process, page, data is not None) else errno.EFAULT)
            if error:
                return
            pfn = found.pfn + (hva(page) - found.hva >> 12)
            held = process.mmu.cached[page] = CachedPage(pfn, found.writable, found.level)
        assert self.allowed(process, page, data is not None), f"page {page}: {held} should be gone"
        if data is None:
            self.compare(process, page, bytes(self.frame(held.pfn)))
        else:
            self.frame(held.pfn)[:] = data
            self.store(process, page, data)

    def pin(self, who: int, page: int) -> None:
        process = self.process(who)
        if page in process.pins or not self.allowed(process, page, True):
            return
        pinned = self.run(process.mm.pin_user_page(hva(page)))
        process.pins[page] = pinned, self.pfn_of(process, page)
        process.lazy.discard(page)
        self.store(process, page, bytes(self.frame(process.pins[page][1])))

    def unpin(self, who: int) -> None:
        process = self.process(who)
        for page in list(process.pins):
            process.let_go(page)
        while process.loose:
            process.mm.unpin(process.loose.pop()[0])

    def device(self, who: int, data: bytes) -> None:
        """Writes to whatever is pinned, mapped or not."""
        process = self.process(who)
        for _, pfn in process.loose:
            self.frame(pfn)[:] = data
        for page, (_, pfn) in process.pins.items():
            self.frame(pfn)[:] = data
            self.store(process, page, data)

    # -- the file --------------------------------------------------------------------------------------

    def truncate(self, pages: int) -> None:
        model = self.model
        assert self.attempt("truncate", self.file.truncate(pages * PAGE_SIZE)) == 0
        model.pages = pages
        self._punched(model, pages, 1 << 20)
        for process in self.processes:
            for page, where in process.mapped.items():
                if where.file is model and where.index >= pages:
                    process.forget(page, 1)

    def punch(self, index: int, pages: int) -> None:
        model = self.model
        assert self.attempt("punch", self.file.punch_hole(index * PAGE_SIZE, pages * PAGE_SIZE)) == 0
        self._punched(model, index, pages)

    def _punched(self, model: FileModel, index: int, pages: int) -> None:
        model.data = {i: data for i, data in model.data.items() if not index <= i < index + pages}
        for process in self.processes:
            for page, where in process.mapped.items():
                if where.file is model and where.shared and index <= where.index < index + pages:
                    process.let_go(page)

    def pwrite(self, index: int, data: bytes) -> None:
        model = self.model
        assert self.attempt("pwrite", self.file.pwrite(index * PAGE_SIZE, data)) == 0
        model.pages = max(model.pages, index + 1)
        model.data[index] = data

    def pread(self, index: int) -> None:
        model = self.model
        expected = model.data.get(index, ZERO) if index < model.pages else b""
        assert self.file.pread(index * PAGE_SIZE, 8) == expected

    # -- what should be --------------------------------------------------------------------------------

    def process(self, who: int) -> Process:
        return self.processes[who % len(self.processes)]

    def allowed(self, process: Process, page: int, write: bool) -> bool:
        where = process.mapped.get(page)
        if where is None or where.prot == "none" or (write and where.prot != "rw"):
            return False
        return where.file is None or where.file.file is None or where.index < where.file.pages

    def store(self, process: Process, page: int, data: bytes) -> None:
        where = process.mapped[page]
        if where.shared:
            assert where.file is not None
            where.file.data[where.index] = data
        else:
            process.own[page] = data
            process.lazy.discard(page)

    def compare(self, process: Process, page: int, seen: bytes) -> None:
        where = process.mapped[page]
        if page in process.lazy and seen == ZERO:
            process.own.pop(page, None)
            process.lazy.discard(page)
        backing = where.file.data.get(where.index, ZERO) if where.file is not None else ZERO
        expected = backing if where.shared else process.own.get(page, backing)
        assert seen == expected, f"page {page} of {where}: reads {seen!r}, should be {expected!r}"

    def frame(self, pfn: int) -> memoryview:
        at = self.host.frames.offset_of(Pfn(pfn))
        return self.host.frames.view[at : at + 8]

    def pfn_of(self, process: Process, page: int) -> int:
        entry = process.mm.table.find(hva(page))
        assert isinstance(entry, Pte), f"page {page} is not there"
        return entry.pfn + (hva(page) - entry.hva >> 12)

    def check(self) -> None:
        for process in self.processes:
            for page, held in process.mmu.cached.items():
                entry = process.mm.table.find(hva(page))
                assert type(entry) is Pte, f"I11: page {page} is cached, the host has {entry}"
                assert self.pfn_of(process, page) == held.pfn, f"I11: page {page} is cached at {held}"
                assert entry.writable or not held.writable, f"I11: page {page} is cached writable"
                assert entry.level >= held.level, f"I11: page {page} is cached larger than it is"
            for page, (_, pfn) in process.pins.items():
                assert self.pfn_of(process, page) == pfn, f"page {page} is pinned and moved"

    def check_books(self) -> None:
        found = check_memory(self.host.memory, [process.mm for process in self.processes])
        assert not found, found

    def end(self) -> None:
        """Nothing is left of anybody."""
        for _ in range(len(self.processes)):
            self.exit(0)
        self.file.put()
        memory = self.host.memory
        left = self.host.frames.in_use, memory.swapped, len(memory.merged), len(memory.pages)
        assert left == (0, 0, 0, 0), f"frames, swapped, merged, pages: {left}"


def hva(page: int) -> Hva:
    return Hva(BASE + (page << 12))
