"""What Linux answers: lengths that are not whole pages, ranges over several mappings, protections.

Each expectation is what the kernel's source says [mm mmap.c, mprotect.c, mremap.c, madvise.c, khugepaged.c,
gup.c; fs open.c; x86 fault.c], 6.18.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.madvise import ADVICE, collapse
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.mremap import mremap
from kvmd.core.mm.space import TASK_SIZE
from kvmd.core.mm.stats import pagemap
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.mm.vma import Prot
from protocol.errors import UapiError
from protocol.units import Hva, Level
from tests.kit.kvmd import RW, World

PAGE = 4096
MIB2 = 2 << 20
AT = 0x5000_0000
NEW = 0x6000_0000
ALL_ONES = (1 << 64) - 1


@pytest.fixture
def world() -> World:
    return World()


def answer(world: World, flow: Coroutine[Any, None, Any]) -> int:
    """The errno, 0 for none."""
    try:
        world.run(flow)
    except UapiError as error:
        return error.errno
    return 0


def layout(mm: Mm) -> list[tuple[int, int]]:
    """Where something is mapped, in pages relative to AT or NEW, whichever is near."""
    return [(int(vma.start) // PAGE, int(vma.end) // PAGE) for vma in mm.vmas]


def spans(*pages: tuple[int, int]) -> list[tuple[int, int]]:
    return [(AT // PAGE + first, AT // PAGE + end) for first, end in pages]


def file_at(world: World, hva: int, pages: int, *, shared: bool, prot: Prot = RW) -> MemoryFile:
    file = MemoryFile(world.host.memory, "m", pages * PAGE)
    world.run(world.mm.mmap(Hva(hva), pages * PAGE, prot, shared=shared, file=file))
    return file


# -- lengths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "level", "mapped"),
    [(1, 1, PAGE), (PAGE + 1, 1, 2 * PAGE), (1, 2, MIB2), (MIB2 + PAGE, 2, 2 * MIB2)],
)
def test_mmap_rounds_its_length_up_to_the_mappings_pages(
    world: World, size: int, level: int, mapped: int
) -> None:
    hva = world.run(world.mm.mmap(None, size, RW, Level(level)))
    assert [(vma.start, vma.end) for vma in world.mm.vmas] == [(hva, hva + mapped)]


def test_mmap_of_a_file_beyond_what_a_file_can_have_is_eoverflow(world: World) -> None:
    file = MemoryFile(world.host.memory, "m", PAGE)
    top = (1 << 63) - PAGE
    assert answer(world, world.mm.mmap(None, PAGE, RW, file=file, offset=top)) == errno.EOVERFLOW
    assert answer(world, world.mm.mmap(None, PAGE, RW, file=file, offset=top - PAGE)) == 0


# call, offset from the mapping of 8 pages at AT, size -> errno, and what is left mapped if it is unmapped
LENGTHS: list[tuple[str, int, int, int]] = [
    ("munmap", 0, 1, 0),
    ("munmap", 0, 0, errno.EINVAL),
    ("munmap", 1, PAGE, errno.EINVAL),
    ("munmap", 0, TASK_SIZE, errno.EINVAL),
    ("munmap", 64 * PAGE, PAGE, 0),
    ("munmap", 0, ALL_ONES, errno.EINVAL),
    ("mprotect", 0, 1, 0),
    ("mprotect", 0, 0, 0),
    ("mprotect", 1, 0, errno.EINVAL),
    ("mprotect", 64 * PAGE, 0, 0),
    ("mprotect", 0, 8 * PAGE + 1, errno.ENOMEM),
    ("mprotect", 64 * PAGE, PAGE, errno.ENOMEM),
    ("mprotect", 0, ALL_ONES, errno.ENOMEM),
    *((f"madvise {advice}", 0, 0, 0) for advice in ADVICE),
    *((f"madvise {advice}", 1, 0, errno.EINVAL) for advice in ADVICE),
    *((f"madvise {advice}", 64 * PAGE, 0, 0) for advice in ADVICE),
    *((f"madvise {advice}", 0, ALL_ONES, errno.EINVAL) for advice in ADVICE),
    *((f"madvise {advice}", 64 * PAGE, PAGE, errno.ENOMEM) for advice in ADVICE),
    *((f"madvise {advice}", 0, 1, 0) for advice in ADVICE if advice not in ("remove", "collapse")),
    ("madvise dontneed", 0, 9 * PAGE, errno.ENOMEM),
    ("madvise dontneed", 0, 1 << 62, errno.ENOMEM),
    ("madvise dontneed", (1 << 64) - AT - PAGE, PAGE, errno.EINVAL),  # its end is 0
    ("madvise collapse", 0, 1, errno.EINVAL),  # the mapping has no room for 2 MiB
    ("madvise remove", 0, 1, errno.EINVAL),
]


@pytest.mark.parametrize(("call", "offset", "size", "expected"), LENGTHS)
def test_each_length_has_its_answer(world: World, call: str, offset: int, size: int, expected: int) -> None:
    world.map(8, hva=AT)
    at, (name, *advice) = Hva(AT + offset), call.split()
    flows: dict[str, Callable[[], Coroutine[Any, None, Any]]] = {
        "munmap": lambda: world.mm.munmap(at, size),
        "mprotect": lambda: world.mm.mprotect(at, size, Prot.READ),
        "madvise": lambda: ADVICE[advice[0]](world.mm, at, size),
    }
    assert answer(world, flows[name]()) == expected


def test_rounding_up_reaches_the_whole_last_page(world: World) -> None:
    world.map(4, hva=AT)
    world.run(world.mm.write(Hva(AT), b"x" * 4 * PAGE))
    world.run(ADVICE["dontneed"](world.mm, Hva(AT), PAGE + 1))
    assert world.run(world.mm.read(Hva(AT), 4 * PAGE)) == bytes(2 * PAGE) + b"x" * 2 * PAGE
    world.run(world.mm.mprotect(Hva(AT), PAGE + 1, Prot.READ))
    assert [vma.prot for vma in world.mm.vmas] == [Prot.READ, RW]
    world.run(world.mm.munmap(Hva(AT), 1))
    assert layout(world.mm) == spans((1, 2), (2, 4))


@pytest.mark.parametrize(
    ("size", "kept"), [(PAGE, 2), (MIB2 - PAGE, 2), (MIB2, 1), (MIB2 + PAGE, 1), (2 * MIB2 - 1, 0)]
)
def test_dontneed_on_hugetlb_rounds_its_end_down(world: World, size: int, kept: int) -> None:
    """To a huge page, after the length was rounded up to a page of 4 KiB."""
    hva = world.map(2, 2)
    world.run(world.mm.write(hva, b"x"))
    world.run(world.mm.write(Hva(hva + MIB2), b"x"))
    assert answer(world, ADVICE["dontneed"](world.mm, hva, size)) == 0
    assert world.host.frames.in_use == kept * 512
    assert answer(world, ADVICE["dontneed"](world.mm, Hva(hva + PAGE), MIB2)) == errno.EINVAL


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda mm, at: mm.munmap(at, PAGE), errno.EINVAL),
        (lambda mm, at: mm.munmap(Hva(at + PAGE), MIB2), errno.EINVAL),
        (lambda mm, at: mm.mprotect(at, PAGE, Prot.READ), errno.EINVAL),
        (lambda mm, at: mm.mprotect(at, PAGE, RW), 0),  # it is so already: nothing is split
        (lambda mm, at: mm.mmap(at, PAGE, RW, fixed=True), errno.EINVAL),
        (lambda mm, at: ADVICE["free"](mm, at, MIB2), errno.EINVAL),
        (lambda mm, at: ADVICE["pageout"](mm, at, MIB2), errno.EINVAL),
        (lambda mm, at: ADVICE["remove"](mm, at, MIB2), errno.EACCES),
        (lambda mm, at: ADVICE["collapse"](mm, at, MIB2), errno.EINVAL),
        (lambda mm, at: ADVICE["mergeable"](mm, at, MIB2), 0),
        (lambda mm, at: mremap(mm, at, MIB2, 2 * MIB2), errno.EINVAL),
        (lambda mm, at: mremap(mm, at, 2 * MIB2, PAGE), 0),
        (lambda mm, at: mremap(mm, at, MIB2, MIB2, Hva(NEW + PAGE)), errno.EINVAL),
    ],
)
def test_hugetlb_is_cut_at_its_own_pages_only(
    world: World, call: Callable[[Mm, Hva], Coroutine[Any, None, Any]], expected: int
) -> None:
    hva = world.map(2, 2)
    assert answer(world, call(world.mm, hva)) == expected


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (-PAGE, PAGE, errno.EINVAL),
        (0, -1, errno.EINVAL),
        (0, 0, errno.EINVAL),
        (0, (1 << 63) - 1, 0),
        (1, (1 << 63) - 1, errno.EFBIG),
        ((1 << 63) - 1, 1, errno.EFBIG),
        (1 << 40, PAGE, 0),
        (1, 1, 0),
    ],
)
def test_punch_hole_asks_for_a_range_a_file_can_have(
    world: World, offset: int, size: int, expected: int
) -> None:
    assert answer(world, MemoryFile(world.host.memory, "m", PAGE).punch_hole(offset, size)) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [(-1, errno.EINVAL), ((1 << 63) - 1, 0), (1 << 63, errno.EFBIG)]
)
def test_truncate_asks_for_a_size_a_file_can_have(world: World, size: int, expected: int) -> None:
    assert answer(world, MemoryFile(world.host.memory, "m", PAGE).truncate(size)) == expected


# -- protections ---------------------------------------------------------------------------------------


def test_write_without_read_is_a_protection_of_its_own(world: World) -> None:
    """get_user_pages wants VM_READ of who only reads; what is there and writable it takes as it is; a CPU
    that may write a page reads it as well."""
    hva = world.map(3, prot=Prot.WRITE)
    assert answer(world, world.mm.get_user_page(hva, write=False)) == errno.EFAULT
    assert world.run(world.mm.get_user_page(hva, write=True)).writable
    assert world.run(world.mm.get_user_page(hva, write=False)).writable, "what is writable can be read"
    assert world.run(world.mm.read(Hva(hva + PAGE), 4)) == bytes(4), "the process's own CPU"
    assert world.run(world.mm.read(Hva(hva + PAGE), 4, user=False)) == bytes(4), (
        "or the kernel's copy_from_user"
    )
    assert answer(world, world.mm.get_user_page(Hva(hva + PAGE), write=False)) == errno.EFAULT, (
        "not writable yet"
    )
    assert answer(world, world.mm.fault_in(hva, write=False)) == errno.EFAULT, "who does not try for more"


@pytest.mark.parametrize("before", [Prot.NONE, Prot.READ, Prot.WRITE, RW])
@pytest.mark.parametrize("after", [Prot.NONE, Prot.READ, Prot.WRITE, RW])
@pytest.mark.parametrize("shared", [False, True])
def test_mprotect_from_each_protection_to_each(world: World, before: Prot, after: Prot, shared: bool) -> None:
    file_at(world, AT, 1, shared=shared)
    world.run(world.mm.write(Hva(AT), b"x"))
    world.run(world.mm.mprotect(Hva(AT), PAGE, before))
    world.run(world.mm.mprotect(Hva(AT), PAGE, after))
    cpu_reads, cpu_writes = bool(after), Prot.WRITE in after
    assert answer(world, world.mm.read(Hva(AT), 1)) == (0 if cpu_reads else errno.EFAULT)
    assert answer(world, world.mm.write(Hva(AT), b"y")) == (0 if cpu_writes else errno.EFAULT)
    gup_reads = Prot.READ in after or cpu_writes  # the write before made it writable
    assert answer(world, world.mm.get_user_page(Hva(AT), write=False)) == (0 if gup_reads else errno.EFAULT)


def test_mprotect_stops_at_the_first_hole_and_keeps_what_it_did(world: World) -> None:
    world.map(2, hva=AT)
    world.map(2, hva=AT + 3 * PAGE)
    assert answer(world, world.mm.mprotect(Hva(AT), 5 * PAGE, Prot.READ)) == errno.ENOMEM
    assert [vma.prot for vma in world.mm.vmas] == [Prot.READ, RW]


# -- advice over several mappings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "first", "pages", "expected"),
    [
        ("munmap", 2, 2, errno.ENOMEM),
        ("munmap", 0, 2, 0),
        ("munmap", 6, 2, 0),
        ("munmap", 0, 8, 0),
        ("mmap", 2, 2, errno.ENOMEM),
        ("mprotect", 0, 2, errno.ENOMEM),
        ("mprotect", 0, 8, 0),
        ("madvise", 2, 2, errno.EAGAIN),
        ("madvise", 0, 8, 0),
        ("register", 6, 2, errno.ENOMEM),
        ("register", 0, 8, 0),
    ],
)
def test_no_mapping_is_split_beyond_so_many(
    world: World, monkeypatch: pytest.MonkeyPatch, call: str, first: int, pages: int, expected: int
) -> None:
    """vm.max_map_count: what makes none more than there are is done."""
    world.map(8, hva=AT)
    world.run(world.mm.write(Hva(AT), b"x" * 8 * PAGE))
    before = layout(world.mm)
    monkeypatch.setattr("kvmd.core.mm.space.MAX_MAP_COUNT", len(before))
    at, size = Hva(AT + first * PAGE), pages * PAGE
    flows: dict[str, Callable[[], Coroutine[Any, None, Any]]] = {
        "munmap": lambda: world.mm.munmap(at, size),
        "mmap": lambda: world.mm.mmap(at, size, Prot.READ, fixed=True),
        "mprotect": lambda: world.mm.mprotect(at, size, Prot.READ),
        "madvise": lambda: ADVICE["nohugepage"](world.mm, at, size),
        "register": lambda: Userfaultfd(world.mm, user_mode_only=False).register(
            at, size, missing=True, wp=False
        ),
    }
    assert answer(world, flows[call]()) == expected
    if expected:
        assert layout(world.mm) == before
        assert pagemap(world.mm, Hva(AT), 8 * PAGE)["present"] == {str(PAGE): 8}


def test_a_mapping_that_refuses_wins_over_a_hole_before_it(world: World) -> None:
    """[madvise_walk_vmas]: a hole is told at the end, an error at once; what was done before stays done."""
    file = file_at(world, AT, 1, shared=True)
    world.run(file.pwrite(0, b"x"))
    world.map(1, hva=AT + 2 * PAGE)  # page 1 is a hole, page 2 has no file
    assert answer(world, ADVICE["remove"](world.mm, Hva(AT), 3 * PAGE)) == errno.EINVAL
    assert file.pread(0, 1) == b"\0"
    private = file_at(world, AT + 4 * PAGE, 1, shared=False)
    assert answer(world, ADVICE["remove"](world.mm, Hva(AT + 3 * PAGE), 2 * PAGE)) == errno.EACCES
    assert answer(world, ADVICE["remove"](world.mm, Hva(AT), 2 * PAGE)) == errno.ENOMEM
    assert private.pread(0, 1) == b"\0"


def test_what_lies_behind_a_mapping_that_refuses_is_left_alone(world: World) -> None:
    world.map(1, hva=AT)
    file = file_at(world, AT + PAGE, 1, shared=True)
    world.run(file.pwrite(0, b"x"))
    assert answer(world, ADVICE["remove"](world.mm, Hva(AT), 2 * PAGE)) == errno.EINVAL
    assert file.pread(0, 1) == b"x"


@pytest.mark.parametrize("prot", [Prot.NONE, Prot.READ, Prot.WRITE, RW])
@pytest.mark.parametrize("advice", list(ADVICE))
@pytest.mark.parametrize("kind", ["anon", "shared", "private"])
def test_advice_asks_for_no_protection(world: World, prot: Prot, advice: str, kind: str) -> None:
    """MADV_REMOVE wants VM_MAYWRITE, which a shared mapping of memory always has; MADV_FREE wants no file."""
    if kind == "anon":
        world.map(1, prot=prot, hva=AT)
    else:
        file_at(world, AT, 1, shared=kind == "shared", prot=prot)
    refusals = {
        ("remove", "anon"): errno.EINVAL,
        ("remove", "private"): errno.EACCES,
        ("free", "shared"): errno.EINVAL,
        ("free", "private"): errno.EINVAL,
    }
    expected = errno.EINVAL if advice == "collapse" else refusals.get((advice, kind), 0)
    assert answer(world, ADVICE[advice](world.mm, Hva(AT), PAGE)) == expected


@pytest.mark.parametrize("pinned", [False, True])
def test_collapse_of_what_is_huge_already_is_nothing_to_do(world: World, pinned: bool) -> None:
    hva = world.run(world.mm.mmap(Hva(MIB2 * 512), 2 * MIB2, RW))
    world.run(world.mm.write(hva, b"x" * PAGE))
    world.run(world.mm.write(Hva(hva + MIB2), b"y"))
    assert world.run(collapse(world.mm, hva, MIB2)) == 1
    if pinned:
        world.run(world.mm.pin_user_page(hva))
    assert world.run(collapse(world.mm, hva, 2 * MIB2)) == 2
    assert pagemap(world.mm, hva, 2 * MIB2)["anon_huge_kib"] == 4096


def test_collapse_passes_by_what_is_pinned_and_says_so(world: World) -> None:
    hva = world.run(world.mm.mmap(Hva(MIB2 * 512), 2 * MIB2, RW))
    world.run(world.mm.write(hva, b"x"))
    world.run(world.mm.write(Hva(hva + MIB2), b"y"))
    world.run(world.mm.pin_user_page(hva))
    assert answer(world, collapse(world.mm, hva, 2 * MIB2)) == errno.EAGAIN
    assert pagemap(world.mm, hva, 2 * MIB2)["anon_huge_kib"] == 2048, "the second became huge"
    assert answer(world, collapse(world.mm, Hva(hva + PAGE), PAGE)) == 0, "no whole 2 MiB: nothing to do"


@pytest.mark.parametrize("what", ["hole", "zero"])
def test_collapse_fills_nothing_that_a_userfaultfd_watches(world: World, what: str) -> None:
    """[mm khugepaged.c, SCAN_EXCEED_NONE_PTE] Zero pages count as missing, and it ends there."""
    hva = world.run(world.mm.mmap(Hva(MIB2 * 512), 2 * MIB2, RW))
    if what == "zero":
        world.run(world.mm.read(hva, PAGE))
        world.run(world.mm.write(Hva(hva + PAGE), bytes(MIB2 - PAGE)))
    else:
        world.run(world.mm.write(hva, bytes(MIB2 - PAGE)))
    world.run(world.mm.write(Hva(hva + MIB2), bytes(MIB2)))
    uffd = Userfaultfd(world.mm, user_mode_only=False)
    world.run(uffd.register(hva, 2 * MIB2, missing=True, wp=False))
    assert answer(world, collapse(world.mm, hva, 2 * MIB2)) == errno.EBUSY
    assert pagemap(world.mm, hva, 2 * MIB2)["anon_huge_kib"] == 0
    assert answer(world, collapse(world.mm, Hva(hva + MIB2), MIB2)) == 0


# -- mremap --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "old", "new_size", "new", "expected"),
    [
        (AT + 1, PAGE, PAGE, None, errno.EINVAL),
        (AT, PAGE, 0, None, errno.EINVAL),
        (AT, PAGE, ALL_ONES, None, errno.EINVAL),  # rounds up to 0
        (AT, PAGE, TASK_SIZE + PAGE, None, errno.EINVAL),
        (AT, PAGE, PAGE, NEW + 1, errno.EINVAL),
        (AT, PAGE, PAGE, TASK_SIZE, errno.EINVAL),
        (AT, 4 * PAGE, 4 * PAGE, AT + 2 * PAGE, errno.EINVAL),
        (AT + 2 * PAGE, 4 * PAGE, 4 * PAGE, AT, errno.EINVAL),
        (AT, 4 * PAGE, 4 * PAGE, AT, errno.EINVAL),
        (AT, 2 * PAGE, 4 * PAGE, AT - PAGE, errno.EINVAL),
        (NEW, 4 * PAGE, 4 * PAGE, NEW + PAGE, errno.EINVAL),  # though nothing is mapped there
        (NEW, PAGE, PAGE, None, errno.EFAULT),
        (NEW, PAGE, PAGE, AT + 64 * PAGE, errno.EFAULT),
        (AT, 9 * PAGE, 10 * PAGE, None, errno.EFAULT),
        (AT, 9 * PAGE, 9 * PAGE, None, 0),  # no resize, no move: nothing is asked
        (AT, 9 * PAGE, 2 * PAGE, None, 0),  # what is cut off may be anything
        (AT, 9 * PAGE, 9 * PAGE, NEW, 0),  # a gap at the end of a move is none of it
        (AT, 9 * PAGE, 8 * PAGE, NEW, 0),
        (AT, 9 * PAGE, 10 * PAGE, NEW, errno.EFAULT),
        (AT, 0, PAGE, None, errno.EINVAL),  # a private mapping
        (AT, 1, 1, NEW, 0),
    ],
)
def test_mremap_answers(
    world: World, start: int, old: int, new_size: int, new: int | None, expected: int
) -> None:
    world.map(8, hva=AT)
    to = None if new is None else Hva(new)
    assert answer(world, mremap(world.mm, Hva(start), old, new_size, to)) == expected


def test_mremap_moves_several_mappings_and_keeps_the_gaps_between(world: World) -> None:
    """6.18: with MREMAP_FIXED and one size; what lies at the destination of a gap stays."""
    world.map(2, hva=AT)
    world.map(2, hva=AT + 3 * PAGE, prot=Prot.READ)
    file = file_at(world, AT + 5 * PAGE, 2, shared=True)
    world.run(world.mm.write(Hva(AT + PAGE), b"anon"))
    world.run(file.pwrite(0, b"file"))
    world.run(world.mm.mmap(Hva(NEW), 8 * PAGE, Prot.READ | Prot.WRITE))
    world.run(world.mm.write(Hva(NEW + 2 * PAGE), b"stays"))
    assert world.run(mremap(world.mm, Hva(AT + PAGE), 5 * PAGE, 5 * PAGE, Hva(NEW + PAGE))) == NEW + PAGE
    read = [world.run(world.mm.read(Hva(NEW + page * PAGE), 5)) for page in (1, 2, 5)]
    assert read == [b"anon\0", b"stays", b"file\0"]
    assert [vma.prot for vma in world.mm.vmas if vma.start == NEW + 3 * PAGE] == [Prot.READ]
    assert [vma.end - vma.start for vma in world.mm.vmas if vma.start < NEW] == [PAGE, PAGE]


@pytest.mark.parametrize(("old", "new_size"), [(5, 4), (5, 6)])
def test_mremap_that_resizes_is_about_one_mapping(world: World, old: int, new_size: int) -> None:
    world.map(2, hva=AT)
    world.map(3, hva=AT + 2 * PAGE, prot=Prot.READ)
    flow = mremap(world.mm, Hva(AT), old * PAGE, new_size * PAGE, Hva(NEW))
    assert answer(world, flow) == errno.EFAULT


def test_mremap_moves_a_watched_mapping_alone_or_not_at_all(world: World) -> None:
    world.map(2, hva=AT)
    world.map(2, hva=AT + 2 * PAGE, prot=Prot.READ)
    uffd = Userfaultfd(world.mm, user_mode_only=False)
    world.run(uffd.register(Hva(AT + 2 * PAGE), 2 * PAGE, missing=True, wp=False))
    assert answer(world, mremap(world.mm, Hva(AT + 2 * PAGE), 4 * PAGE, 4 * PAGE, Hva(NEW))) == errno.EFAULT
    assert answer(world, mremap(world.mm, Hva(AT), 4 * PAGE, 4 * PAGE, Hva(NEW))) == errno.EFAULT
    assert [vma.start for vma in world.mm.vmas] == [AT + 2 * PAGE, NEW], "the first had moved"
    assert answer(world, mremap(world.mm, Hva(AT + 2 * PAGE), 2 * PAGE, 2 * PAGE, Hva(NEW + MIB2))) == 0


def test_mremap_of_size_0_maps_a_shared_file_a_second_time(world: World) -> None:
    world.run(file_at(world, AT, 4, shared=True).pwrite(PAGE, b"here"))
    new = world.run(mremap(world.mm, Hva(AT + PAGE), 0, 2 * PAGE))
    assert world.run(world.mm.read(new, 4)) == world.run(world.mm.read(Hva(AT + PAGE), 4)) == b"here"
    assert [vma.offset for vma in world.mm.vmas if vma.start == new] == [PAGE]


def test_mremap_to_the_same_size_changes_nothing(world: World) -> None:
    """[mm mremap.c, mremap_at] Neither the mapping is cut there nor its huge page, and nobody is told."""
    world.run(world.mm.mmap(Hva(AT), MIB2, RW))
    world.run(ADVICE["hugepage"](world.mm, Hva(AT), MIB2))
    world.run(world.mm.write(Hva(AT), b"huge"))
    world.set_slot(0, 0x400, 512, AT)
    world.guest_write(world.create_vcpu(), 0x400 * PAGE, b"x")
    assert world.run(mremap(world.mm, Hva(AT), PAGE, PAGE)) == AT
    assert layout(world.mm) == spans((0, 512))
    assert pagemap(world.mm, Hva(AT), MIB2)["anon_huge_kib"] == 2048
    assert sum(world.vm.mmu.roots[0].leaves) == 1


@pytest.mark.parametrize("new_size", [2, 4])
def test_mremap_looks_for_room_before_it_unmaps(
    world: World, monkeypatch: pytest.MonkeyPatch, new_size: int
) -> None:
    """[mm mremap.c, check_mremap_params] Who is refused must know what is left."""
    world.map(4, hva=AT)
    world.map(4, hva=NEW)
    world.run(world.mm.write(Hva(NEW), b"there"))
    flow = mremap(world.mm, Hva(AT), 4 * PAGE, new_size * PAGE, Hva(NEW))
    monkeypatch.setattr("kvmd.core.mm.mremap.MAX_MAP_COUNT", 7)
    assert answer(world, flow) == errno.ENOMEM
    assert [vma.end - vma.start for vma in world.mm.vmas] == [4 * PAGE, 4 * PAGE]
    assert world.run(world.mm.read(Hva(NEW), 5)) == b"there"
    monkeypatch.setattr("kvmd.core.mm.mremap.MAX_MAP_COUNT", 8)
    assert answer(world, mremap(world.mm, Hva(AT), 4 * PAGE, new_size * PAGE, Hva(NEW))) == 0


def test_mremap_of_size_0_onto_itself_has_nothing_left_to_map_again(world: World) -> None:
    """[mm mremap.c, mremap_to] What is at the destination goes first, and then it looks again."""
    file_at(world, AT, 4, shared=True)
    assert answer(world, mremap(world.mm, Hva(AT), 0, 4 * PAGE, Hva(AT))) == errno.EFAULT
    assert layout(world.mm) == []
    assert answer(world, world.mm.mmap(Hva(AT), PAGE, RW)) == 0, "the mmap_lock is free again"
