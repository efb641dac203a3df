"""Parts of the workloads that need no daemon: who is swapped out, and which pages go into one descriptor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from protocol.units import PAGE_SIZE
from qemu_shim.api import Context, Guest
from qemu_shim.study.workloads.expected_memory import RUN, runs
from qemu_shim.study.workloads.host_memory import Reclaim, chunks

PAGES = 4  # of a chunk


class Quiet:
    async def quiet(self) -> None: ...


@dataclass
class FakeGuest:
    """Memory from gpa 0 on, in chunks; what was used is young until it is aged."""

    here: dict[int, int] = field(default_factory=dict)
    young: set[int] = field(default_factory=set)
    swapped: list[int] = field(default_factory=list)

    def use(self, *numbers: int) -> None:
        for number in numbers:
            self.here[number] = PAGES
            self.young.add(number)

    async def resident_pages(self, gpa: int, size: int) -> int:
        return self.here.get(gpa // size, 0)

    async def age(self, gpa: int, size: int) -> int:
        was_young = gpa // size in self.young
        self.young.discard(gpa // size)
        return was_young

    async def swap_out(self, gpa: int, size: int) -> int:
        self.swapped.append(gpa // size)
        return self.here.pop(gpa // size)


def reclaim_over(guest: FakeGuest, count: int, limit: int) -> Reclaim:
    over = chunks(cast(Guest, guest), 0, count * PAGES * PAGE_SIZE, PAGES)
    return Reclaim(cast(Context, Quiet()), over, limit)


async def test_what_was_used_longest_ago_is_swapped_out_and_no_more_than_needed() -> None:
    guest = FakeGuest()
    reclaim = reclaim_over(guest, 6, limit=3 * PAGES)
    guest.use(0, 1, 2)
    assert await reclaim.balance() == 3 * PAGES
    assert guest.swapped == []
    guest.use(3)
    assert await reclaim.balance() == 3 * PAGES
    assert guest.swapped == [0], "all were young: the first"
    guest.use(2, 4)
    assert await reclaim.balance() == 3 * PAGES
    assert guest.swapped == [0, 1], "2 and 4 were used since, 1 and 3 not"
    guest.use(3, 5)
    assert await reclaim.balance() == 3 * PAGES
    assert guest.swapped == [0, 1, 2]


async def test_a_use_that_ageing_does_not_see_counts_for_nothing() -> None:
    """A device's, in a table that is none of KVM's."""
    guest = FakeGuest()
    reclaim = reclaim_over(guest, 3, limit=2 * PAGES)
    guest.use(0, 1, 2)
    guest.young = {0, 2}
    await reclaim.balance()
    assert guest.swapped == [1]


@given(st.lists(st.integers(0, 40), unique=True).map(sorted))
def test_runs_are_the_pages_in_order_each_in_a_row_and_of_one_word(numbers: list[int]) -> None:
    gpas = [number * PAGE_SIZE for number in numbers]
    words = {gpa: gpa // PAGE_SIZE // 5 for gpa in gpas}
    for found, of_one_word in ((list(runs(gpas)), False), (list(runs(gpas, words)), True)):
        assert [gpa for run in found for gpa in run] == gpas
        for run in found:
            assert run == list(range(run[0], run[0] + len(run) * PAGE_SIZE, PAGE_SIZE))
            assert 0 < len(run) <= RUN
            assert not of_one_word or len({words[gpa] for gpa in run}) == 1
