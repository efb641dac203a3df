"""Table pages: held with their contents until the flush is acked, then zeroed and reused."""

from __future__ import annotations

import errno

import pytest

from protocol.errors import UapiError
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.units import Hpa

BASE = Hpa(0x10_0000)


class Pages:
    def __init__(self, count: int = 4) -> None:
        self.memory = bytearray(count * 4096)
        self.pool = TablePool(TableWriter(BASE, memoryview(self.memory)), count * 4096)

    def dirty(self, table: int) -> None:
        at = table - BASE
        self.memory[at : at + 4096] = b"\xab" * 4096

    def page(self, table: int) -> bytes:
        return bytes(self.memory[table - BASE : table - BASE + 4096])


def test_pages_are_handed_out_once_zeroed_until_there_are_none() -> None:
    pages = Pages()
    taken = [pages.pool.allocate() for _ in range(4)]
    assert sorted(taken) == [BASE + i * 4096 for i in range(4)]
    assert pages.pool.in_use == 4
    with pytest.raises(UapiError) as caught:
        pages.pool.allocate()
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("acked", [0, 4])
def test_a_page_held_keeps_its_contents_and_is_not_reused(acked: int) -> None:
    pages = Pages(1)
    table = pages.pool.allocate()
    pages.dirty(table)
    pages.pool.quarantine(1, table, 5)
    assert pages.pool.reclaim(1, acked) == 0
    assert pages.page(table) == b"\xab" * 4096
    assert (pages.pool.held(1), pages.pool.in_use) == (1, 0)
    with pytest.raises(UapiError):
        pages.pool.allocate()
    assert pages.pool.reclaim(1, 5) == 1
    assert pages.pool.allocate() == table
    assert pages.page(table) == bytes(4096)


def test_only_the_acked_epochs_are_reclaimed() -> None:
    pages = Pages()
    tables = [pages.pool.allocate() for _ in range(4)]
    for table, epoch in zip(tables, (1, 1, 2, 3), strict=True):
        pages.pool.quarantine(1, table, epoch)
    assert [pages.pool.reclaim(1, acked) for acked in (0, 1, 1, 2, 9)] == [0, 2, 0, 1, 1]


def test_the_epochs_of_one_vm_free_nothing_of_another() -> None:
    pages = Pages()
    mine, theirs = pages.pool.allocate(), pages.pool.allocate()
    pages.pool.quarantine(1, mine, 1)
    pages.pool.quarantine(2, theirs, 1)
    assert pages.pool.reclaim(1, 100) == 1
    assert (pages.pool.held(1), pages.pool.held(2)) == (0, 1)
    assert pages.pool.reclaim(3, 100) == 0


def test_epochs_only_grow() -> None:
    pages = Pages()
    one, other = pages.pool.allocate(), pages.pool.allocate()
    pages.pool.quarantine(1, one, 2)
    with pytest.raises(AssertionError, match="grow"):
        pages.pool.quarantine(1, other, 1)


def test_a_vm_that_still_holds_pages_is_not_forgotten() -> None:
    pages = Pages()
    pages.pool.quarantine(1, pages.pool.allocate(), 1)
    with pytest.raises(AssertionError, match="still holds"):
        pages.pool.forget(1)
    pages = Pages()
    pages.pool.forget(1)
