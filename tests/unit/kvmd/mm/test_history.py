"""Any history of the host's memory shows every process the bytes it should see; planted bugs do not.

The rig is in `tests/unit/kvmd/mm/history.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvmd.core.mm import fault, mm, reclaim, space
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.notifier import Range
from kvmd.core.mm.page import Page, PageKind, Pte
from kvmd.core.mm.space import AddressSpace
from kvmd.core.mm.table import PageTable
from kvmd.core.mm.vma import Vma
from protocol.units import Hva, Pfn
from tests.unit.kvmd.mm.history import ACTIONS, MmHistory

RANGES = [(0, 4), (1, 2), (2, 8), (0, 512), (512, 512), (256, 512), (0, 1024), (510, 4), (100, 1), (512, 1)]
PAGES = [0, 1, 2, 3, 5, 100, 255, 256, 510, 511, 512, 513, 767, 1023]
KINDS = ["anon", "anon", "anon", "anon_shared", "file_shared", "file_private"]
PROTS = ["rw", "rw", "r", "none"]
ADVICE = ["dontneed", "free", "remove", "hugepage", "hugepage", "nohugepage", "mergeable", "pageout"]
DATA = [bytes([n]) * 8 for n in range(1, 4)]  # few: so that pages come to be equal

WHO = st.integers(0, 2)
MAYBE = st.sampled_from([None, *DATA])


class HistoryMachine(RuleBasedStateMachine):
    rig: MmHistory

    @initialize(kind=st.sampled_from(KINDS), huge=st.booleans())
    def begin(self, kind: str, huge: bool) -> None:
        self.rig = ready(kind, huge)

    @rule(who=WHO, span=st.sampled_from(RANGES), kind=st.sampled_from(KINDS), index=st.integers(0, 3))
    def mmap(self, who: int, span: tuple[int, int], kind: str, index: int) -> None:
        self.rig.mmap(who, *span, kind, "rw", index)

    @rule(who=WHO, span=st.sampled_from(RANGES), to=st.sampled_from([0, 1024, 1025, 1536]), out=st.booleans())
    def move(self, who: int, span: tuple[int, int], to: int, out: bool) -> None:
        self.rig.mremap(who, *span, to) if out else self.rig.munmap(who, *span)

    @rule(who=WHO, span=st.sampled_from(RANGES), prot=st.sampled_from(PROTS))
    def mprotect(self, who: int, span: tuple[int, int], prot: str) -> None:
        self.rig.mprotect(who, *span, prot)

    @rule(who=WHO, span=st.sampled_from(RANGES), advice=st.sampled_from(ADVICE))
    def madvise(self, who: int, span: tuple[int, int], advice: str) -> None:
        self.rig.madvise(who, *span, advice)

    @rule(who=WHO, span=st.sampled_from(RANGES), action=st.sampled_from(sorted(ACTIONS)))
    def act(self, who: int, span: tuple[int, int], action: str) -> None:
        self.rig.act(who, *span, action)

    @rule(who=WHO, page=st.sampled_from(PAGES), data=MAYBE, guest=st.booleans())
    def access(self, who: int, page: int, data: bytes | None, guest: bool) -> None:
        (self.rig.guest if guest else self.rig.access)(who, page, data)

    @rule(who=WHO, forks=st.booleans())
    def fork(self, who: int, forks: bool) -> None:
        self.rig.fork(who) if forks else self.rig.exit(who)

    @rule(who=WHO, page=st.sampled_from(PAGES), data=st.sampled_from(DATA), what=st.integers(0, 2))
    def pin(self, who: int, page: int, data: bytes, what: int) -> None:
        (
            lambda: self.rig.pin(who, page),
            lambda: self.rig.unpin(who),
            lambda: self.rig.device(who, data),
        )[what]()

    @rule(index=st.integers(0, 8), pages=st.integers(1, 4), data=MAYBE, what=st.integers(0, 2))
    def file(self, index: int, pages: int, data: bytes | None, what: int) -> None:
        if data is None:
            self.rig.pread(index)
        elif what == 0:
            self.rig.pwrite(index, data)
        elif what == 1:
            self.rig.truncate(index)
        else:
            self.rig.punch(index, pages)

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check_books()
            self.rig.end()


def test_any_history_shows_every_process_its_bytes_and_leaks_nothing() -> None:
    run_state_machine_as_test(
        HistoryMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# -- the same, dealt by a seed: longer ---------------------------------------------------------------------


def ready(kind: str = "anon", huge: bool = False) -> MmHistory:
    rig = MmHistory()
    rig.mmap(0, 0, 1024, kind if kind.startswith("anon") else "anon", "rw", 0)
    if not kind.startswith("anon"):
        rig.mmap(0, 0, 8, kind, "rw", 0)
    if huge:
        rig.madvise(0, 0, 1024, "hugepage")
    return rig


SMALL = [(0, 4), (1, 2), (2, 8), (3, 1), (6, 4), (7, 1), (510, 4), (513, 1)]
LIKELY = [(0, 6, "merge"), (512, 512, "collapse"), (512, 1, "split")]
FEW_PAGES = [0, 1, 2, 3, 6, 7, 8, 511, 512, 513, 700]


def afresh(rig: MmHistory, random: Random, who: int) -> None:
    """A process drops everything and begins again, with what lets most things happen."""
    rig.mmap(who, 0, 1024, "anon", "rw", 0)
    rig.madvise(who, 0, 512, "mergeable")
    rig.madvise(who, 512, 512, random.choice(("hugepage", "hugepage", "mergeable")))
    rig.mmap(who, 6, 4, random.choice(KINDS), "rw", random.randrange(4))


def random_step(rig: MmHistory, random: Random) -> None:
    who, page, span = random.randrange(3), random.choice(FEW_PAGES), random.choice(SMALL)
    data, index = random.choice(DATA), random.randrange(9)
    large = random.choice(RANGES) if random.random() < 0.2 else span
    steps: tuple[tuple[float, Callable[[], None]], ...] = (
        (9, lambda: rig.guest(who, page, data)),
        (9, lambda: rig.guest(who, page, None)),
        (5, lambda: rig.access(who, page, data)),
        (5, lambda: rig.access(who, page, None)),
        (4, lambda: rig.act(who, *large, random.choice(sorted(ACTIONS)))),
        (
            2,
            lambda: rig.act(
                who, *random.choice(((0, 6, "merge"), (512, 512, "collapse"), (512, 1, "split")))
            ),
        ),
        (0.5, lambda: rig.madvise(who, 6, 2, "remove")),
        (3, lambda: rig.madvise(who, *large, random.choice(ADVICE))),
        (2, lambda: rig.fork(who)),
        (1, lambda: rig.exit(who)),
        (1, lambda: rig.mprotect(who, *span, random.choice(PROTS))),
        (2, lambda: rig.mprotect(who, 0, 1024, "rw")),
        (1, lambda: rig.mmap(who, *span, random.choice(KINDS), random.choice(PROTS), random.randrange(4))),
        (0.2, lambda: rig.munmap(who, *span)),
        (0.5, lambda: rig.mremap(who, *large, random.choice((0, 1024, 1025, 1536)))),
        (1, lambda: afresh(rig, random, who)),
        (1, lambda: rig.pin(who, page)),
        (1, lambda: rig.device(who, data)),
        (0.5, lambda: rig.unpin(who)),
        (1, lambda: rig.pwrite(index, data)),
        (1, lambda: rig.pread(index)),
        (1, lambda: rig.truncate(index)),
        (0.5, lambda: rig.punch(index, random.randint(1, 4))),
    )
    random.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()


def soak(seed: int, steps: int = 500) -> MmHistory:
    random = Random(seed)
    rig = MmHistory()
    afresh(rig, random, 0)
    for step in range(steps):
        random_step(rig, random)
        rig.check()
        if step % 10 == 0:
            rig.check_books()
    rig.end()
    return rig


@pytest.mark.parametrize("seed", range(12))
def test_a_long_history_shows_every_process_its_bytes_and_leaks_nothing(seed: int) -> None:
    soak(seed)


def soaks(count: int) -> Counter[str]:
    """What was done, by name."""
    return sum((soak(seed).done for seed in range(count)), Counter[str]())


def test_long_histories_do_everything_often() -> None:
    done = soaks(6)
    for what in (*ACTIONS, "fork", "mremap", "mprotect", "truncate", "punch", "free", "remove"):
        assert done[what] > 3, f"{what}: {done}"


# -- planted bugs ------------------------------------------------------------------------------------------


async def change_untold(ranges: list[Range], edit: Callable[[], object]) -> object:
    return edit()


def replace_keeping_rights(self: PageTable, entry: Pte, page: Page, pfn: Pfn, *, writable: bool) -> None:
    self.set(type(entry)(entry.hva, pfn, entry.level, entry.writable, page, entry.uffd_wp))


async def unmap_sparing_copies(self: MemoryFile, first: int, last: int | None, *, copies_too: bool) -> None:
    await UNMAP(self, first, last, copies_too=False)


def pages_with_pins(space: AddressSpace, start: Hva, end: Hva) -> list[tuple[Vma, Page]]:
    entries = space.table.within(start, end)
    pages = {
        entry.page: None for entry in entries if isinstance(entry, Pte) and entry.page.kind is PageKind.ANON
    }
    vma = space.vmas.find(start)
    return [(vma, page) for page in pages] if vma is not None else []


UNMAP = MemoryFile.unmap
PLANTED: dict[str, tuple[object, str, object]] = {
    "changes are not told": (space, "edit_notified", change_untold),
    "a page of several processes is written in place": (fault, "_may_reuse", lambda *_: True),
    "fork and merging leave pages writable": (PageTable, "replace", replace_keeping_rights),
    "mprotect makes shared pages writable": (mm, "writable_now", lambda vma, entry: vma.writable),
    "truncate spares private copies": (MemoryFile, "unmap", unmap_sparing_copies),
    "a split huge page is not told as a whole": (PageTable, "whole", lambda self, start, end: (start, end)),
    "pinned pages are moved": (reclaim, "_pages", pages_with_pins),
    "only one process of several is told": (reclaim, "users_of", lambda page: []),
    "a dropped page is not put": (PageTable, "_drop", lambda self, old, kept: None),
}
CAUGHT = {
    "changes are not told": "I11",
    "a page of several processes is written in place": "reads b",
    "fork and merging leave pages writable": "I21",
    "mprotect makes shared pages writable": "I21",
    "truncate spares private copies": "reads b",
    "a split huge page is not told as a whole": "I21",
    "pinned pages are moved": "is not there",
    "only one process of several is told": "I11",
    "a dropped page is not put": "I21",
}  # by which complaint


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLANTED[bug])
    with pytest.raises(AssertionError, match=CAUGHT[bug]):
        soaks(20)
