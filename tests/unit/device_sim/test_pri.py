"""Page request groups against a driver that keeps its own books."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_sim.core.dmar import RemappingUnit
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.pri import PageAccess, PageRequestInterface
from device_sim.core.traits import capabilities
from protocol.flow import Flows, Wait
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.units import Iova, IovaPfn
from tests.kit.raw_driver import RawDriver
from tests.kit.silicon import Asked, page_request

RID = 0x6A08
SUCCESS, INVALID, FAILURE = ResponseCode.SUCCESS, ResponseCode.INVALID, ResponseCode.FAILURE


def read(page: int) -> PageAccess:
    return PageAccess(IovaPfn(page), False)


def write(page: int) -> PageAccess:
    return PageAccess(IovaPfn(page), True)


class Pri:
    """The interface before a ring, and the driver behind it."""

    def __init__(self, allocation: int = 8, capacity: int = 512, room: int = 2047) -> None:
        self.flows = Flows()
        memory = PhysicalMemory()
        self.unit = RemappingUnit(*capabilities(), 46, memory)
        self.driver = RawDriver(self.unit, memory)
        for rid in (RID, 1):
            self.driver.add_function(rid)
        self.unit.add_endpoint(RID, self)
        for _ in range(2047 - room):
            self.unit.prq.submit(PageRequest(rid=1, prgi=0, addr=Iova(0), last=False))
        self.pri = PageRequestInterface(RID, self.unit.prq, capacity)
        if allocation:
            self.pri.enable(allocation)

    def invalidate_translations(self, start: IovaPfn, npages: int) -> bool:
        return True

    def page_response(self, prgi: int, code: ResponseCode) -> None:
        self.pri.respond(prgi, code)

    def ask(self, *accesses: PageAccess) -> Wait[ResponseCode]:
        return self.flows.start(self.pri.request(accesses))

    def asked(self) -> list[Asked]:
        return [page_request(raw) for raw in self.driver.take_requests()]

    def groups(self) -> list[list[Asked]]:
        """What came since the last call, cut after each last request."""
        found: list[list[Asked]] = [[]]
        for request in self.asked():
            found[-1].append(request)
            if request.last:
                found.append([])
        assert found.pop() == [], "the last request of a group is marked"
        return found

    def respond(self, prgi: int, code: ResponseCode = SUCCESS) -> None:
        self.pri.respond(prgi, code)
        self.flows.run_ready()


def test_a_group_is_one_index_and_its_last_request_is_marked() -> None:
    pri = Pri()
    answer = pri.ask(read(7), write(8), read(9))
    assert pri.asked() == [
        Asked(RID, 0, 7, read=True, write=False, last=False),
        Asked(RID, 0, 8, read=True, write=True, last=False),
        Asked(RID, 0, 9, read=True, write=False, last=True),
    ]
    assert not answer.done
    pri.respond(0, INVALID)
    assert answer.result() is INVALID
    assert pri.pri.outstanding == 0


def test_outstanding_requests_never_exceed_the_allocation_and_go_on_in_order() -> None:
    pri = Pri(allocation=4)
    answers = [pri.ask(*[read(10 * n + i) for i in range(3)]) for n in range(4)]
    small = pri.ask(read(99))
    assert [group[0].page for group in pri.groups()] == [0], "one credit is left; nobody overtakes for it"
    pri.respond(0)
    assert [group[0].page for group in pri.groups()] == [10]
    for prgi in (1, 2, 3):
        pri.respond(prgi)
    assert [group[0].page for group in pri.groups()] == [20, 30, 99]
    pri.respond(4)
    assert all(answer.done for answer in [*answers, small])


def test_an_allocation_beyond_the_capacity_counts_as_the_capacity() -> None:
    pri = Pri(allocation=2048, capacity=2)
    for page in range(3):
        pri.ask(read(page))
    assert len(pri.groups()) == 2


def test_at_most_512_groups_are_outstanding_each_with_an_index_of_its_own() -> None:
    pri = Pri(allocation=1024, capacity=1024)
    answers = [pri.ask(read(page)) for page in range(514)]
    first = [group[0].prgi for group in pri.groups()]
    assert sorted(first) == list(range(512))
    pri.respond(300)
    assert [(group[0].prgi, group[0].page) for group in pri.groups()] == [(300, 512)]
    pri.respond(7)
    assert [(group[0].prgi, group[0].page) for group in pri.groups()] == [(7, 513)]
    for prgi in range(512):
        pri.respond(prgi)
    assert all(answer.done for answer in answers)
    assert pri.pri.unexpected_responses == 0


def test_a_function_takes_indices_in_turn_as_many_as_it_may_have_groups_out() -> None:
    pri = Pri(allocation=2, capacity=2)
    pri.ask(read(0))
    for page in (1, 2, 3):
        pri.ask(read(page))
        pri.respond(1)
    assert [(group[0].prgi, group[0].page) for group in pri.groups()] == [(0, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (read(7), read(7), True),
        (write(7), write(7), True),
        (write(7), read(7), True),
        (read(7), write(7), False),
        (read(7), read(8), False),
    ],
)
def test_two_accesses_that_miss_the_same_page_share_a_request_if_its_right_suffices(
    first: PageAccess, second: PageAccess, shared: bool
) -> None:
    pri = Pri()
    answers = [pri.ask(first), pri.ask(second)]
    groups = pri.groups()
    assert len(groups) == (1 if shared else 2)
    for group in groups:
        pri.respond(group[0].prgi)
    assert [answer.result() for answer in answers] == [SUCCESS, SUCCESS]


def test_a_request_half_of_which_is_out_asks_for_the_rest_and_waits_for_both() -> None:
    pri = Pri()
    one = pri.ask(read(1), read(2))
    both = pri.ask(read(2), read(3))
    assert [[asked.page for asked in group] for group in pri.groups()] == [[1, 2], [3]]
    pri.respond(1)
    assert not both.done
    pri.respond(0)
    assert (one.result(), both.result()) == (SUCCESS, SUCCESS)


@pytest.mark.parametrize("own", [(), (read(3),)])
def test_who_joined_a_group_that_is_invalid_for_another_page_looks_again(own: tuple[PageAccess, ...]) -> None:
    """It was failed as well, though its page was there to be had."""
    pri = Pri()
    one = pri.ask(read(1), read(2))
    joined = pri.ask(read(2), *own)
    if own:
        pri.respond(1)
    pri.respond(0, INVALID)
    assert (one.result(), joined.result()) == (INVALID, SUCCESS)


def test_who_joined_a_group_that_fails_the_interface_fails() -> None:
    pri = Pri()
    one, joined = pri.ask(read(1), read(2)), pri.ask(read(2))
    pri.respond(0, FAILURE)
    assert (one.result(), joined.result()) == (FAILURE, FAILURE)


def test_an_answered_page_is_asked_for_again() -> None:
    pri = Pri()
    pri.ask(read(7))
    pri.respond(0)
    pri.ask(read(7))
    assert [group[0].prgi for group in pri.groups()] == [0, 1]


def test_failure_disables_the_interface_and_fails_all_that_wait() -> None:
    pri = Pri(allocation=2)
    answers = [pri.ask(read(page)) for page in range(4)]
    pri.respond(1, FAILURE)
    assert [answer.result() for answer in answers] == [FAILURE] * 4
    assert (pri.pri.enabled, pri.pri.outstanding) == (False, 0)
    assert pri.ask(read(9)).result() is FAILURE
    assert len(pri.groups()) == 2, "nothing more went out"


def test_responses_after_a_disable_are_unexpected_and_wake_nobody() -> None:
    pri = Pri()
    answer = pri.ask(read(1))
    pri.pri.disable()
    pri.flows.run_ready()
    assert answer.result() is FAILURE
    pri.respond(0)
    assert pri.pri.unexpected_responses == 1


def test_a_late_response_does_not_answer_a_group_sent_after_re_enabling() -> None:
    pri = Pri()
    pri.ask(read(1))
    pri.pri.disable()
    pri.pri.enable(8)
    answer = pri.ask(read(1))
    pri.respond(0)
    assert not answer.done
    pri.respond(1)
    assert answer.result() is SUCCESS


def test_re_enabling_restores_the_whole_allocation() -> None:
    pri = Pri(allocation=2)
    pri.ask(read(1), read(2))
    pri.pri.disable()
    pri.pri.enable(2)
    pri.groups()
    pri.ask(read(3), read(4))
    assert len(pri.groups()) == 1


@pytest.mark.parametrize("index", [1, 511])
def test_a_response_to_an_index_nobody_used_is_counted_and_changes_nothing(index: int) -> None:
    pri = Pri()
    answer = pri.ask(read(1))
    pri.respond(index)
    assert (pri.pri.unexpected_responses, pri.pri.outstanding, answer.done) == (1, 1, False)


def test_a_second_answer_to_a_group_is_unexpected() -> None:
    pri = Pri(allocation=1)
    pri.ask(read(1))
    pri.respond(0)
    pri.respond(0)
    assert pri.pri.unexpected_responses == 1
    for page in (5, 6):
        pri.ask(read(page))
    assert len(pri.groups()) == 2, "no credit was won by it: one for each of two groups in all"


def test_a_group_whose_last_request_was_dropped_is_answered_by_the_unit() -> None:
    pri = Pri(room=1)
    pri.ask(read(1))
    dropped = [pri.ask(read(2)), pri.ask(read(3), read(4))]
    assert [answer.result() for answer in dropped] == [SUCCESS, SUCCESS]
    assert pri.pri.outstanding == 1


# -- any order -----------------------------------------------------------------------------------------


@dataclass
class Books:
    """The driver's: what is out by index, and how much of it."""

    allocation: int
    out: dict[int, list[Asked]] = field(default_factory=dict)

    def take(self, groups: list[list[Asked]]) -> None:
        for group in groups:
            assert {asked.prgi for asked in group} == {group[0].prgi}
            assert group[0].prgi not in self.out, "an index is used again before its group was answered"
            self.out[group[0].prgi] = group
        assert sum(map(len, self.out.values())) <= self.allocation


ACCESSES = st.lists(
    st.builds(PageAccess, st.integers(0, 12), st.booleans()),
    min_size=1,
    max_size=4,
    unique_by=lambda a: a.page,
)
STEPS = st.lists(
    st.tuples(st.just("ask"), ACCESSES)
    | st.tuples(st.just("respond"), st.integers(0, 99))
    | st.tuples(st.just("unexpected"), st.integers(0, 511)),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(
    steps=STEPS,
    allocation=st.integers(4, 10),
    codes=st.lists(st.sampled_from([SUCCESS, INVALID]), min_size=1),
)
def test_every_request_is_answered_once_whatever_the_order(
    steps: list[tuple[str, list[PageAccess] | int]], allocation: int, codes: list[ResponseCode]
) -> None:
    pri, books = Pri(allocation), Books(allocation)
    answers: list[tuple[list[PageAccess], Wait[ResponseCode]]] = []
    granted: set[int] = set()
    sent = unexpected = 0
    for kind, what in [*steps, *[("respond", 0)] * 300]:
        if isinstance(what, list):
            answers.append((what, pri.ask(*what)))
        elif kind == "unexpected":
            if what not in books.out:
                pri.respond(what)
                unexpected += 1
        elif books.out:
            prgi = sorted(books.out)[what % len(books.out)]
            group = books.out.pop(prgi)
            code = codes[sent % len(codes)]
            granted |= {asked.page for asked in group}
            pri.respond(prgi, code)
            sent += 1
        books.take(pri.groups())
    assert not books.out
    assert all(answer.done for _, answer in answers), "a wake-up was lost"
    assert pri.pri.unexpected_responses == unexpected
    assert pri.pri.groups == sent
    assert all(access.page in granted for accesses, _ in answers for access in accesses)
    if INVALID not in codes:
        assert {answer.result() for _, answer in answers} <= {SUCCESS}
