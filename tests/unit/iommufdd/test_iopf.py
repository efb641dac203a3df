"""Which page requests are handled, and that a group is whole when it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iommufdd.core.counts import UnitCounts
from iommufdd.core.iopf import Verdict, judge
from iommufdd.core.partial import MAX_PARTIAL, PartialGroups
from protocol.hw.prq import PageRequest
from protocol.units import Iova, Pasid
from tests.kit.iommufdd import Surroundings

RID = 0x6A08
HWPT = Surroundings().hwpt()


def request(prgi: int = 0, page: int = 0, *, last: bool = False, rid: int = RID) -> PageRequest:
    return PageRequest(rid=rid, prgi=prgi, addr=Iova(page << 12), last=last, read=True)


def asking(what: str) -> PageRequest:
    """r, w, x: the rights asked for; p: privileged; i: with a PASID; l: last."""
    return PageRequest(
        rid=RID,
        prgi=1,
        addr=Iova(0),
        last="l" in what,
        read="r" in what,
        write="w" in what,
        exec="x" in what,
        priv="p" in what,
        pasid_present="i" in what,
        pasid=Pasid(0),
    )


@pytest.mark.rfc("RFC-83", "RFC-84", "RFC-85")
@pytest.mark.parametrize(
    ("what", "verdict"),
    [
        ("r", Verdict.HANDLE),
        ("w", Verdict.HANDLE),
        ("rwl", Verdict.HANDLE),
        ("x", Verdict.HANDLE),
        ("xw", Verdict.HANDLE),
        ("rx", Verdict.REFUSE),
        ("rwxl", Verdict.REFUSE),
        ("rp", Verdict.REFUSE),
        ("wpl", Verdict.REFUSE),
        ("xp", Verdict.HANDLE),
        ("ri", Verdict.REFUSE),
        ("wil", Verdict.REFUSE),
        ("il", Verdict.SKIP),
        ("ilp", Verdict.SKIP),
        ("ilx", Verdict.SKIP),
        ("i", Verdict.REFUSE),
        ("l", Verdict.SKIP),
        ("xl", Verdict.SKIP),
        ("", Verdict.HANDLE),
    ],
)
def test_the_verdict_on_a_request(what: str, verdict: Verdict) -> None:
    assert judge(asking(what)) is verdict


@pytest.mark.rfc("RFC-82")
def test_a_group_comes_whole_and_in_order_with_its_last_request() -> None:
    groups = PartialGroups(UnitCounts())
    parts = [request(3, page) for page in (9, 4, 7)]
    assert [groups.gather(part, HWPT) for part in parts] == [None, None, None]
    assert groups.held == 3
    last = request(3, 1, last=True)
    assert groups.gather(last, HWPT) == [*parts, last]
    assert groups.held == 0


def test_groups_of_other_indices_and_functions_do_not_mix() -> None:
    groups = PartialGroups(UnitCounts())
    one, two, other = request(1, 1), request(2, 2), request(1, 3, rid=0x6A10)
    for part in (one, two, other):
        groups.gather(part, HWPT)
    ends = [request(1, 4, last=True, rid=0x6A10), request(1, 5, last=True), request(2, 6, last=True)]
    assert [groups.gather(end, HWPT) for end in ends] == [[other, ends[0]], [one, ends[1]], [two, ends[2]]]


def test_an_index_used_again_starts_empty() -> None:
    groups = PartialGroups(UnitCounts())
    groups.gather(request(1, 1), HWPT)
    groups.gather(request(1, 2, last=True), HWPT)
    last = request(1, 3, last=True)
    assert groups.gather(last, HWPT) == [last]


@pytest.mark.rfc("RFC-82")
def test_an_overflow_discards_every_partial_group() -> None:
    groups = PartialGroups(UnitCounts())
    for n in range(5):
        groups.gather(request(n, n, rid=RID + n % 2), HWPT)
    groups.discard()
    assert (groups.held, groups.counts.partial_discarded) == (0, 5)
    last = request(0, 9, last=True)
    assert groups.gather(last, HWPT) == [last]


def test_a_detach_discards_what_its_function_sent_and_nothing_else() -> None:
    groups = PartialGroups(UnitCounts())
    mine, other = request(1, 1), request(1, 2, rid=0x6A10)
    groups.gather(mine, HWPT)
    groups.gather(request(2, 3), HWPT)
    groups.gather(other, HWPT)
    groups.discard([RID])
    assert (groups.held, groups.counts.partial_discarded) == (1, 2)
    last = request(1, 4, last=True, rid=0x6A10)
    assert groups.gather(last, HWPT) == [other, last]


def test_as_many_requests_of_a_function_are_held_as_the_ring_has_and_no_more() -> None:
    groups = PartialGroups(UnitCounts())
    assert MAX_PARTIAL == 2048
    for n in range(MAX_PARTIAL):
        assert groups.gather(request(n % 512, n), HWPT) is None
    assert (groups.held, groups.counts.partial_discarded) == (MAX_PARTIAL, 0)
    assert groups.gather(request(5, 1), HWPT) is None
    assert (groups.held, groups.counts.partial_discarded) == (MAX_PARTIAL, 1)
    whole = groups.gather(request(5, 2, last=True), HWPT)
    assert whole is not None
    assert [part.addr >> 12 for part in whole] == [5, 517, 1029, 1541, 2]
    groups.gather(request(5, 3), HWPT)
    assert (groups.held, groups.counts.partial_discarded) == (MAX_PARTIAL - 3, 1)
    for n in range(MAX_PARTIAL):
        groups.gather(request(1, n, rid=0x6A10), HWPT)
    assert (groups.held, groups.counts.partial_discarded) == (2 * MAX_PARTIAL - 3, 1), (
        "a neighbour has room of its own"
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()) | st.sampled_from([None, 0, 1, 2]),
        max_size=60,
    )
)
def test_no_request_is_lost_or_handled_twice(steps: list[tuple[int, int, bool] | int | None]) -> None:
    groups = PartialGroups(UnitCounts())
    oracle: dict[tuple[int, int], list[PageRequest]] = {}
    discarded = 0
    for page, step in enumerate(steps):
        if isinstance(step, tuple):
            rid, prgi, last = step
            part = request(prgi, page, last=last, rid=rid)
            expected = [*oracle.pop((rid, prgi), []), part]
            if not last:
                oracle[rid, prgi] = expected
            assert groups.gather(part, HWPT) == (expected if last else None)
        else:
            gone = [key for key in oracle if step is None or key[0] == step]
            discarded += sum(len(oracle.pop(key)) for key in gone)
            groups.discard(None if step is None else [step])
        assert groups.held == sum(map(len, oracle.values()))
        assert groups.counts.partial_discarded == discarded
