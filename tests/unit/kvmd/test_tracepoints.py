"""What a run shows at the tracepoints of KVM's MMU and of its dirty rings, against what the run did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocol.kvm_run import ExitReason
from protocol.trace import TRACE
from protocol.units import Gfn
from tests.kit.kvmd import World
from tests.unit.kvmd.logged import GFN, Logged

MMIO = 0x66_6000


@pytest.fixture
def lines() -> Iterator[list[str]]:
    written: list[str] = []
    TRACE.start(written.append)
    yield written
    TRACE.stop()


def of(lines: list[str], name: str) -> list[str]:
    return [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]


def test_a_fault_requests_the_frame_of_its_own_gfn_also_below_a_huge_leaf(lines: list[str]) -> None:
    world = World()
    world.set_slot(0, 0x200, 512, world.map(1, level=2))
    vcpu = world.create_vcpu()
    world.guest_write(vcpu, 0x20_5000, b"x")
    leaf = world.vm.mmu.leaf_at(world.vm.mmu.roots[0], Gfn(0x205))
    assert leaf is not None
    first = leaf.entry >> 12 & (1 << 40) - 1
    assert of(lines, "kvm_mmu_spte_requested") == [f"gfn 205 pfn {first + 5:x} level 2"]


def test_mmio_is_marked_once_and_then_found(lines: list[str]) -> None:
    world = World()
    world.set_slot(0, 0x100, 16, world.map(16))
    vcpu = world.create_vcpu()
    for _ in range(3):
        assert world.guest_write(vcpu, MMIO + 0x10, b"x").exit.reason is ExitReason.MMIO
    marked = of(lines, "mark_mmio_spte")
    assert [line.partition(" ")[2] for line in marked] == ["gfn 666 access 0 gen 1"]
    at = int(marked[0].partition(" ")[0].removeprefix("sptep:"), 16)
    assert world.vm.mmu.writer.load64(at) >> 63, "the mark of an MMIO entry is where it says"
    assert of(lines, "handle_mmio_page_fault") == ["addr:0 gfn 666 access 0"] * 2


def test_a_ring_shows_each_push_and_each_exit_that_it_causes(lines: list[str]) -> None:
    logged = Logged(ring=4096, pages=1024)
    limit = 4096 // 16 - 64
    logged.write(*range(limit - 1))
    assert logged.guest_write(logged.vcpu, GFN + limit << 12, b"x").exit.reason is ExitReason.DIRTY_RING_FULL
    assert of(lines, "kvm_dirty_ring_push") == [
        f"ring 0: dirty {n + 1:#x} reset 0x0 slot 0 offset {offset:#x} (used {n + 1})"
        for n, offset in enumerate([*range(limit - 1), limit])
    ]
    assert of(lines, "kvm_dirty_ring_exit") == ["vcpu 0"]
