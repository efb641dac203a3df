"""A function's DMA against the bytes in its frames, with a driver that answers late, wrongly or never."""

from __future__ import annotations

import pytest

from device_sim.core.function import GROUP_PAGES, MAX_REQUESTS, DmaFault, DmaRange, FaultCause
from protocol.flow import Wait
from protocol.hostmem import WindowKind
from protocol.units import Iova, IovaPfn, Pfn
from tests.kit.silicon import (
    DID,
    FRAMES,
    RID,
    R,
    Silicon,
    W,
    devtlb_all,
    devtlb_page,
    iotlb_domain,
    window,
)

PAGE = 4096
ABSENT, INVALID, ERROR = FaultCause


@pytest.fixture
def silicon() -> Silicon:
    attached = Silicon()
    attached.attach()
    return attached


def access(silicon: Silicon, *ranges: DmaRange, block: bool = True) -> Wait[None]:
    return silicon.start(silicon.function.make_accessible(list(ranges), block=block))


def fault_of(done: Wait[None]) -> tuple[int, bool, FaultCause]:
    with pytest.raises(DmaFault) as caught:
        done.result()
    return caught.value.iova, caught.value.write, caught.value.why


# -- finding the way -----------------------------------------------------------------------------------


def test_present_pages_need_no_page_request(silicon: Silicon) -> None:
    silicon.map(7, 1)
    silicon.map(8, 2)
    access(silicon, DmaRange(Iova(0x7F00), 0x200, True)).result()
    assert silicon.requests() == []
    assert silicon.function.io_faults == 0
    assert silicon.function.write(Iova(0x7F00), bytes(range(256)) * 2)
    assert silicon.bytes_of(1, 0x100, 0xF00) == bytes(range(256))
    assert silicon.bytes_of(2, 0x100) == bytes(range(256))


def test_nothing_is_stored_unless_all_of_it_is_translated(silicon: Silicon) -> None:
    silicon.map(7, 1)
    access(silicon, DmaRange(Iova(0x7000), 8, True)).result()
    assert not silicon.function.write(Iova(0x7FF8), b"x" * 16)
    assert silicon.bytes_of(1) == bytes(PAGE)
    assert silicon.function.read(Iova(0x7FF8), 16) is None


def test_a_read_only_page_is_read_and_not_written(silicon: Silicon) -> None:
    silicon.map(7, 1, rights=R)
    silicon.fill_frame(1, b"guest data")
    access(silicon, DmaRange(Iova(0x7000), 10, False)).result()
    assert silicon.function.read(Iova(0x7000), 10) == b"guest data"
    assert not silicon.function.write(Iova(0x7000), b"!")
    done = access(silicon, DmaRange(Iova(0x7000), 1, True), block=False)
    assert fault_of(done) == (0x7000, True, ABSENT)


def test_a_copy_goes_as_far_as_both_sides_are_translated(silicon: Silicon) -> None:
    for page, frame in ((7, 1), (8, 2), (100, 11)):
        silicon.map(page, frame)
    silicon.fill_frame(1, b"a" * PAGE)
    silicon.fill_frame(2, b"b" * PAGE)
    access(silicon, DmaRange(Iova(0x7000), 2 * PAGE, False), DmaRange(Iova(100 * PAGE), PAGE, True)).result()
    assert silicon.function.copy(Iova(0x7800), Iova(100 * PAGE + 0x100), 2 * PAGE - 0x800) == PAGE - 0x100
    assert silicon.bytes_of(11) == bytes(0x100) + b"a" * 0x800 + b"b" * 0x700
    assert silicon.function.copy(Iova(0x7000), Iova(200 * PAGE), 8) == 0


def test_a_copy_between_pages_that_lie_differently_moves_every_byte(silicon: Silicon) -> None:
    for n, frame in enumerate([5, 6, 3, 9]):
        silicon.map(16 + n, frame)
        silicon.fill_frame(frame, bytes((n * 37 + i) % 251 for i in range(PAGE)))
    for n, frame in enumerate([20, 40, 41, 30]):
        silicon.map(32 + n, frame)
    source = b"".join(silicon.bytes_of(frame) for frame in (5, 6, 3, 9))
    src, dst, size = 16 * PAGE + 0x123, 32 * PAGE + 0x456, 3 * PAGE
    access(silicon, DmaRange(Iova(src), size, False), DmaRange(Iova(dst), size, True)).result()
    assert silicon.function.copy(Iova(src), Iova(dst), size) == size
    written = b"".join(silicon.bytes_of(frame) for frame in (20, 40, 41, 30))
    assert written == bytes(0x456) + source[0x123 : 0x123 + size] + bytes(PAGE - 0x456)


def test_every_page_of_an_access_counts_as_a_hit(silicon: Silicon) -> None:
    for page in (7, 8, 9):
        silicon.map(page, page)
    access(silicon, DmaRange(Iova(0x7000), 3 * PAGE, True)).result()
    misses = silicon.function.devtlb.misses
    silicon.function.write(Iova(0x7FFF), b"xy")
    silicon.function.read(Iova(0x8000), 1)
    silicon.function.copy(Iova(0x7000), Iova(0x9000), PAGE)
    assert (silicon.function.devtlb.hits, silicon.function.devtlb.misses) == (2 + 1 + 2, misses)
    assert misses == 3


# -- page requests -------------------------------------------------------------------------------------


def test_a_blocked_access_waits_for_the_answer_and_then_asks_the_unit_again(silicon: Silicon) -> None:
    silicon.now = 1000
    done = access(silicon, DmaRange(Iova(0x7000), 8, True))
    (asked,) = silicon.requests()
    assert (asked.rid, asked.page, asked.read, asked.write, asked.last) == (RID, 7, True, True, True)
    silicon.now = 51_000
    silicon.map(7, 3)
    silicon.flows.run_ready()
    assert not done.done, "a mapped page alone wakes nobody"
    silicon.respond(asked.prgi)
    done.result()
    assert silicon.function.write(Iova(0x7000), b"8 bytes.")
    assert silicon.bytes_of(3, 8) == b"8 bytes."
    assert silicon.function.io_faults == 1
    assert list(silicon.function.fault_latencies_ns) == [50_000]


def test_the_response_itself_carries_no_translation(silicon: Silicon) -> None:
    done = access(silicon, DmaRange(Iova(0x7000), 8, True))
    assert [asked.page for asked in silicon.serve()] == [7]
    assert not done.done
    assert list(silicon.function.devtlb.entries()) == []
    assert [asked.page for asked in silicon.requests()] == [7], "still absent: asked for again"


def test_all_missing_pages_of_an_access_go_out_as_one_group_of_at_most_eight(silicon: Silicon) -> None:
    done = access(silicon, DmaRange(Iova(PAGE), 12 * PAGE, True))
    asked = silicon.requests()
    assert [request.page for request in asked] == list(range(1, 1 + GROUP_PAGES))
    assert {request.prgi for request in asked} == {0}
    assert [request.last for request in asked] == [False] * 7 + [True]
    for request in asked:
        silicon.map(request.page, request.page)
    silicon.respond(0)
    done.result()
    again = access(silicon, DmaRange(Iova(PAGE), 12 * PAGE, True))
    assert [request.page for request in silicon.requests()] == [9, 10, 11, 12]
    assert not again.done


def test_pages_that_are_there_are_not_asked_for(silicon: Silicon) -> None:
    silicon.map(2, 2)
    silicon.map(3, 3, rights=R)
    access(silicon, DmaRange(Iova(PAGE), 4 * PAGE, True))
    assert [request.page for request in silicon.requests()] == [1, 3, 4]


def test_source_and_destination_are_asked_for_in_one_group_with_their_rights(silicon: Silicon) -> None:
    access(silicon, DmaRange(Iova(0x7000), 8, False), DmaRange(Iova(0x9000), 8, True))
    assert [(a.page, a.write, a.prgi, a.last) for a in silicon.requests()] == [
        (7, False, 0, False),
        (9, True, 0, True),
    ]


def test_a_page_read_and_written_is_asked_for_once_for_writing(silicon: Silicon) -> None:
    access(silicon, DmaRange(Iova(0x7000), 8, False), DmaRange(Iova(0x7800), 8, True))
    assert [(a.page, a.write) for a in silicon.requests()] == [(7, True)]


@pytest.mark.parametrize("allocation", [1, 3])
def test_a_group_is_no_larger_than_the_allocation(silicon: Silicon, allocation: int) -> None:
    silicon.function.pri.enable(allocation)
    done = access(silicon, DmaRange(Iova(PAGE), 4 * PAGE, True))
    seen = []
    while asked := silicon.requests():
        assert len(asked) <= allocation
        for request in asked:
            silicon.map(request.page, request.page)
        seen += [request.page for request in asked]
        silicon.respond(asked[-1].prgi)
    done.result()
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize(("code", "why"), [(1, INVALID), (2, ERROR), (0xF, ERROR)])
def test_a_refused_request_is_a_fault_that_says_how_it_was_answered(
    silicon: Silicon, code: int, why: FaultCause
) -> None:
    done = access(silicon, DmaRange(Iova(0x7123), 8, True))
    silicon.serve(code)
    assert fault_of(done) == (0x7000, True, why)
    assert silicon.function.pri.enabled is (code == 1), "failure disables page requests, invalid does not"


def test_without_blocking_a_miss_is_a_fault_at_once(silicon: Silicon) -> None:
    done = access(silicon, DmaRange(Iova(0x7123), 8, False), block=False)
    assert fault_of(done) == (0x7000, False, ABSENT)
    assert silicon.requests() == []


def test_without_page_requests_enabled_a_miss_is_a_fault_at_once(silicon: Silicon) -> None:
    silicon.function.pri.disable()
    assert fault_of(access(silicon, DmaRange(Iova(0x7123), 8, False))) == (0x7000, False, ABSENT)


@pytest.mark.parametrize(("ats", "bus_master"), [(False, True), (True, False), (False, False)])
def test_a_function_that_may_not_translate_faults_and_asks_the_unit_nothing(
    silicon: Silicon, ats: bool, bus_master: bool
) -> None:
    silicon.map(7, 1)
    silicon.function.ats_enabled, silicon.function.dma_enabled = ats, bus_master
    assert fault_of(access(silicon, DmaRange(Iova(0x7000), 8, True))) == (0x7000, True, ABSENT)
    assert (silicon.unit.walks, silicon.requests(), silicon.faults()) == (0, [], [])


def test_what_the_unit_aborts_is_a_fault_and_never_a_page_request(silicon: Silicon) -> None:
    silicon.tables.store(silicon.tables.entry_at(7), FRAMES | R | 1 << 62)
    assert fault_of(access(silicon, DmaRange(Iova(0x7000), 8, False))) == (0x7000, False, ERROR)
    assert silicon.requests() == []
    assert len(silicon.faults()) == 1


def test_an_access_is_given_up_after_its_requests_succeeded_in_vain(silicon: Silicon) -> None:
    done = access(silicon, DmaRange(Iova(0x7000), 8, True))
    rounds = 0
    while not done.done:
        assert [asked.page for asked in silicon.serve()] == [7]
        rounds += 1
    assert rounds == MAX_REQUESTS
    assert fault_of(done) == (0x7000, True, INVALID)


def test_an_access_that_gets_on_is_not_given_up_however_many_requests_it_takes(silicon: Silicon) -> None:
    """The host takes away again all of a group but its first page."""
    pages = MAX_REQUESTS + GROUP_PAGES
    done = access(silicon, DmaRange(Iova(PAGE), pages * PAGE, True))
    for page in range(1, 1 + pages):
        if done.done:
            break
        asked = silicon.requests()
        assert asked[0].page == page
        silicon.map(page, page % 16)
        silicon.respond(asked[-1].prgi)
    done.result()


def test_a_page_taken_after_the_answer_is_asked_for(silicon: Silicon) -> None:
    done = access(silicon, DmaRange(Iova(0x7000), 2 * PAGE, True))
    first = silicon.requests()
    silicon.map(7, 7)
    silicon.map(8, 8)
    silicon.tables.unmap(7)
    silicon.respond(first[-1].prgi)
    (again,) = silicon.requests()
    assert again.page == 7
    silicon.map(7, 3)
    silicon.respond(again.prgi)
    done.result()
    assert silicon.function.write(Iova(0x7000), b"x" * 2 * PAGE)
    assert silicon.bytes_of(3) == silicon.bytes_of(8) == b"x" * PAGE


def test_an_invalidation_makes_the_device_ask_the_unit_again(silicon: Silicon) -> None:
    silicon.map(7, 1)
    access(silicon, DmaRange(Iova(0x7000), 8, True)).result()
    silicon.map(7, 2)
    silicon.execute(iotlb_domain(DID) + devtlb_page(RID, 7))
    assert not silicon.function.write(Iova(0x7000), b"x")
    access(silicon, DmaRange(Iova(0x7000), 8, True)).result()
    assert silicon.function.write(Iova(0x7000), b"x")
    assert (silicon.bytes_of(1, 1), silicon.bytes_of(2, 1)) == (b"\0", b"x")


@pytest.mark.parametrize("uses", [1, 2])
def test_what_was_used_just_before_an_invalidation_is_gone_behind_it(silicon: Silicon, uses: int) -> None:
    """R25: no entry outlives it because a DMA has just gone out by it."""
    silicon.map(7, 1)
    access(silicon, DmaRange(Iova(0x7000), 8, True)).result()
    for _ in range(uses):
        assert silicon.function.write(Iova(0x7000), b"8 bytes.")
    silicon.execute(devtlb_page(RID, 7))
    assert list(silicon.function.devtlb.entries()) == []


def test_a_device_tlb_dropped_before_the_iotlb_is_filled_with_the_old_leaf_again(silicon: Silicon) -> None:
    """Why the order matters: the planted bug of flushing the device first leaves a stale entry."""
    silicon.map(7, 1)
    access(silicon, DmaRange(Iova(0x7000), 8, True)).result()
    silicon.map(7, 2)
    silicon.execute(devtlb_page(RID, 7))
    access(silicon, DmaRange(Iova(0x7000), 8, True)).result()
    silicon.execute(iotlb_domain(DID))
    silicon.function.write(Iova(0x7000), b"x")
    assert (silicon.bytes_of(1, 1), silicon.bytes_of(2, 1)) == (b"x", b"\0")


def test_stopping_fails_what_waits_and_forgets_every_translation(silicon: Silicon) -> None:
    silicon.map(7, 1)
    access(silicon, DmaRange(Iova(0x7000), 8, True)).result()
    done = access(silicon, DmaRange(Iova(0x8000), 8, True))
    silicon.function.stop()
    silicon.flows.run_ready()
    assert fault_of(done) == (0x8000, True, ERROR)
    assert silicon.function.read(Iova(0x7000), 1) is None
    assert fault_of(access(silicon, DmaRange(Iova(0x7000), 8, True))) == (0x7000, True, ABSENT)


# -- where the table points outside memory -------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
def test_a_leaf_that_points_where_no_frame_is_faults_with_the_iova(silicon: Silicon, write: bool) -> None:
    silicon.map(7, 1)
    silicon.tables.map(8, 0x30_0000)
    access(silicon, DmaRange(Iova(0x7000), 2 * PAGE, write)).result()
    function = silicon.function
    with pytest.raises(DmaFault) as caught:
        function.write(Iova(0x7FF8), bytes(16)) if write else function.read(Iova(0x7FF8), 16)
    assert caught.value.why is INVALID
    assert (caught.value.iova, caught.value.write) == (0x8000, write), "a host address is none of the guest's"


def test_neighbours_in_two_windows_are_copied_whole() -> None:
    silicon = Silicon()
    silicon.attach()
    second = bytearray(0x2000)
    last = len(silicon.frames) // PAGE - 1
    above = window(WindowKind.FRAMES, FRAMES + len(silicon.frames), second)
    silicon.memory.add(above, lambda: None)
    for n in range(2):
        silicon.map(7 + n, last + n)
        silicon.map(16 + n, n)
    access(silicon, DmaRange(Iova(0x7000), 2 * PAGE, True), DmaRange(Iova(0x10000), 2 * PAGE, True)).result()
    data = bytes(i % 253 for i in range(2 * PAGE))
    assert silicon.function.write(Iova(0x7000), data)
    assert silicon.bytes_of(last) + second[:PAGE] == data
    access(silicon, DmaRange(Iova(0x7000), 2 * PAGE, False)).result()
    assert silicon.function.read(Iova(0x7000), 2 * PAGE) == data
    assert silicon.function.copy(Iova(0x7010), Iova(0x10000), PAGE) == PAGE
    assert silicon.bytes_of(0) == data[0x10 : 0x10 + PAGE]


# -- the debug check -----------------------------------------------------------------------------------


@pytest.fixture
def tagged() -> Silicon:
    """Pages 7 and 8 are translated as frames 1 and 2, owned by 9."""
    silicon = Silicon(tags=True)
    silicon.attach()
    for frame in range(16):
        silicon.set_tag(frame, 1 << 16 | 9)
    silicon.map(7, 1)
    silicon.map(8, 2)
    access(silicon, DmaRange(Iova(0x7000), 2 * PAGE, True), DmaRange(Iova(0x7000), 2 * PAGE, False)).result()
    return silicon


def test_frames_that_keep_their_owner_are_never_stale(tagged: Silicon) -> None:
    tagged.set_tag(3, 2 << 16)
    tagged.function.write(Iova(0x7800), bytes(PAGE))
    tagged.function.read(Iova(0x7000), 2 * PAGE)
    tagged.function.copy(Iova(0x7000), Iova(0x8000), PAGE)
    assert (tagged.function.stale, tagged.function.stale_notes) == (0, [])


@pytest.mark.parametrize("tag", [2 << 16, 2 << 16 | 9, 0])
def test_a_frame_that_changed_hands_since_its_walk_is_counted(tagged: Silicon, tag: int) -> None:
    tagged.set_tag(2, tag)
    tagged.function.write(Iova(0x7000), bytes(PAGE))
    assert tagged.function.stale == 0, "the other frame was not touched"
    tagged.function.write(Iova(0x8000), b"x")
    assert tagged.function.stale == 2, "once before the access and once after"
    assert "pfn 0x100002 written as page 0x8" in tagged.function.stale_notes[0]
    tagged.function.read(Iova(0x8000), 1)
    assert "read" in tagged.function.stale_notes[2]


def test_every_stale_frame_of_an_access_is_counted_and_the_notes_are_bounded(tagged: Silicon) -> None:
    for frame in (1, 2):
        tagged.set_tag(frame, 5 << 16)
    for _ in range(20):
        tagged.function.read(Iova(0x7000), 2 * PAGE)
    assert tagged.function.stale == 20 * 2 * 2
    assert len(tagged.function.stale_notes) == 16


def test_a_frame_invalidated_and_walked_again_under_its_new_owner_is_not_stale(tagged: Silicon) -> None:
    tagged.set_tag(1, 7 << 16 | 4)
    tagged.execute(iotlb_domain(DID) + devtlb_all(RID))
    access(tagged, DmaRange(Iova(0x7000), 8, True)).result()
    assert tagged.function.write(Iova(0x7000), b"12345678")
    assert tagged.function.stale == 0


def test_a_stale_frame_refilled_from_the_iotlb_keeps_the_tag_of_the_walk(tagged: Silicon) -> None:
    tagged.set_tag(1, 7 << 16 | 4)
    tagged.execute(devtlb_all(RID))
    access(tagged, DmaRange(Iova(0x7000), 8, True)).result()
    tagged.function.write(Iova(0x7000), b"x")
    assert tagged.function.stale > 0, "an IOTLB that was not flushed does not launder the frame"


def test_each_page_of_a_huge_leaf_is_checked(tagged: Silicon) -> None:
    for frame in range(512, 1024):
        tagged.set_tag(frame, 3 << 16 | 9)
    tagged.map(1024, 512, level=2)
    access(tagged, DmaRange(Iova(1024 * PAGE), 8, True)).result()
    tagged.function.write(Iova(1500 * PAGE), bytes(PAGE))
    assert tagged.function.stale == 0
    tagged.set_tag(512 + 1500 - 1024, 4 << 16)
    tagged.function.write(Iova(1500 * PAGE), b"x")
    assert tagged.function.stale == 2


def test_without_tags_nothing_is_checked(silicon: Silicon) -> None:
    silicon.map(7, 1)
    access(silicon, DmaRange(Iova(0x7000), 8, True)).result()
    silicon.map(7, 2)
    assert silicon.function.write(Iova(0x7000), b"x")
    assert silicon.function.stale == 0


def test_a_frame_given_up_during_the_walk_is_walked_again(tagged: Silicon) -> None:
    """The walk that is answered saw the tag it carries: a change in between starts it over."""
    assert tagged.memory.tags is not None
    real, walked = tagged.memory.tags.read, list[int]()

    class Racing:
        def read(self, pfn: int) -> int:
            walked.append(pfn)
            if len(walked) == 1:  # between the walk and the reading of the tag the page moves
                tagged.map(9, 5)
            return real(Pfn(pfn))

    tagged.map(9, 4)
    tagged.memory.tags = Racing()  # type: ignore[assignment]
    entry = tagged.unit.translation_request(RID, IovaPfn(9), W)
    assert entry.hpa == FRAMES + 5 * PAGE
    assert walked == [(FRAMES >> 12) + 4, (FRAMES >> 12) + 5]
