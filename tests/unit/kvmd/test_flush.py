"""Flushes: numbered, told to all at once, over when all have acked, in whatever order."""

from __future__ import annotations

import pytest

from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_table import Role, TdpMmu
from protocol.flow import Flows, Wait
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.pt.walk import ept_rules
from protocol.units import Gfn, GfnSpan, Hpa, Level, Pfn

BASE = Hpa(0x10_0000)


class Flushed:
    """A flusher with `walkers` that ack when told to."""

    def __init__(self, walkers: int = 1) -> None:
        self.writer = TableWriter(BASE, memoryview(bytearray(8 * 4096)))
        self.pool = TablePool(self.writer, 8 * 4096)
        self.flows = Flows()
        self.told: list[tuple[GfnSpan | None, int]] = []
        self.waits: dict[int, list[Wait[None]]] = {}
        self.walkers = walkers
        self.flusher = Flusher(7, self.pool, self.tell)

    def tell(self, span: GfnSpan | None, epoch: int) -> list[Wait[None]]:
        self.told.append((span, epoch))
        self.waits[epoch] = [Wait() for _ in range(self.walkers)]
        return list(self.waits[epoch])

    def flush(self, span: GfnSpan | None = None) -> Wait[None]:
        return self.flows.start(self.flusher.flush(span))

    def ack(self, epoch: int, walker: int = 0) -> None:
        self.waits[epoch][walker].set(None)
        self.flows.run_ready()

    def hold(self) -> None:
        self.pool.quarantine(7, self.pool.allocate(), self.flusher.next_epoch())


def test_a_flush_with_nobody_to_tell_is_over_at_once() -> None:
    vm = Flushed(0)
    vm.hold()
    assert vm.flush().done
    assert (vm.flusher.epoch, vm.flusher.acked, vm.pool.held(7)) == (1, 1, 0)


@pytest.mark.defect("B-26")
def test_all_walkers_are_told_before_anyone_is_waited_for() -> None:
    vm = Flushed(3)
    span = GfnSpan(Gfn(1), Gfn(2))
    over = vm.flush(span)
    assert vm.told == [(span, 1)]
    for walker in (2, 0):
        vm.ack(1, walker)
        assert not over.done
        assert vm.flusher.acked == 0
    vm.ack(1, 1)
    assert over.done
    assert vm.flusher.acked == 1


def test_acks_out_of_order_free_no_page_too_early() -> None:
    """Page A hangs on epoch 1, page B on epoch 2; epoch 2 is acked first."""
    vm = Flushed()
    vm.hold()
    vm.flush()
    vm.hold()
    vm.flush()
    vm.hold()
    vm.flush()
    vm.ack(2)
    assert (vm.flusher.acked, vm.pool.held(7)) == (0, 3)
    vm.ack(1)
    assert (vm.flusher.acked, vm.pool.held(7)) == (2, 1)
    vm.ack(3)
    assert (vm.flusher.acked, vm.pool.held(7)) == (3, 0)


def test_a_table_that_is_cut_off_waits_for_the_flush_that_follows() -> None:
    """Another flush is under way: who acks it may have walked through the table since."""
    vm = Flushed()
    mmu = TdpMmu(7, vm.writer, vm.pool, ept_rules(46, Level(2)), vm.flusher.next_epoch)
    root = mmu.get_root(Role(Level(4), 0, True))
    tdp_mmu.map_page(mmu, root, Gfn(0x200), Pfn(0x400), Level(1), writable=True)
    vm.flush()
    tdp_mmu.map_page(mmu, root, Gfn(0x200), Pfn(0x400), Level(2), writable=True)
    vm.flush()
    vm.ack(1)
    assert (vm.flusher.acked, vm.pool.held(7)) == (1, 1)
    vm.ack(2)
    assert (vm.flusher.acked, vm.pool.held(7)) == (2, 0)


def test_drain_waits_for_what_was_outstanding_and_for_no_more() -> None:
    vm = Flushed()
    vm.flush()
    vm.flush()
    drained = vm.flows.start(vm.flusher.drain())
    vm.flush()
    vm.ack(2)
    assert not drained.done
    vm.ack(1)
    assert drained.done
    assert vm.flusher.acked == 2


def test_drain_with_nothing_outstanding_does_not_wait() -> None:
    vm = Flushed()
    assert vm.flows.start(vm.flusher.drain()).done
