"""The leaf a device's fault makes is the one a vCPU's fault makes, bit for bit [RFC 26/42, 33/42].

Each case is played twice, on two worlds that are alike: once the device faults, once the CPU.  What is
compared are raw entries, found by reading the table's memory.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from protocol.hostmem import LOW_RAM_START
from protocol.pt.format import TableFormat
from protocol.units import Level
from tests.kit.kvmd import READ, WRITE, World
from tests.oracle.table import RawTables

GFN, PAGES = 0x200, 1024
FEATURES = {"A/D": CpuFeatures(), "no A/D": CpuFeatures(ept_ad_bits=False, pml=False)}
BEFORE = {  # what the process did to the page, so: what the host gives
    "untouched": None,
    "written": b"the process's own",
}
WRITE_BACK, IGNORE_PAT = 6, 1


def leaves(world: World) -> dict[int, int]:
    """gfn -> the raw leaf that maps it, and on how many levels below the root it was found."""
    tables = RawTables(LOW_RAM_START, world.bare.tables)
    found: dict[int, int] = {}

    def look(table: int, level: int, gfn: int) -> None:
        for index in range(512):
            entry = tables.entry(table, index)
            at = gfn + (index << 9 * (level - 1))
            if entry & 7 and (level == 1 or entry & 1 << 7):
                found[at] = entry
            elif entry & 7:
                look(entry & ((1 << 46) - (1 << 12)), level - 1, at)

    look(world.vm.mmu.roots[0].hpa, 4, 0)
    return found


def made(
    by_device: bool, features: CpuFeatures, level: int, before: str, write: bool, slot: int
) -> dict[int, int]:
    world = World(features)
    hva = world.map(PAGES, Level(level))
    world.set_slot(0, GFN, PAGES, hva, slot)
    if BEFORE[before] is not None:
        world.run(world.mm.write(hva, BEFORE[before] or b""))
    exported = world.export()
    if by_device:
        assert world.io_fault(exported, GFN, WRITE if write else READ) is FaultResult.FIXED
    else:
        vcpu = world.vm.vcpus[0]
        ran = world.guest_write(vcpu, GFN << 12, b"x") if write else world.guest_read(vcpu, GFN << 12, 1)
        assert ran.done
    return leaves(world)


CASES = [
    case
    for case in product(FEATURES, (1, 2), BEFORE, (False, True), (0, 2))
    if not (case[3] and case[4])  # a store to a read-only slot makes no leaf
]


@pytest.mark.rfc("RFC-30")
@pytest.mark.parametrize(("features", "level", "before", "write", "slot"), CASES)
def test_a_device_and_a_vcpu_make_the_same_leaf(
    features: str, level: int, before: str, write: bool, slot: int
) -> None:
    """Write-back, and the guest's PAT is ignored."""
    case = FEATURES[features], level, before, write, slot
    by_device, by_cpu = made(True, *case), made(False, *case)
    assert list(by_cpu) == [GFN]
    # The CPU that walks a leaf sets A, and D where it stores, itself; what KVM made is all else.
    assert {gfn: f"{leaf:#x}" for gfn, leaf in by_device.items()} == {
        gfn: f"{leaf:#x}" for gfn, leaf in by_cpu.items()
    }
    (leaf,) = by_device.values()
    assert (leaf >> 3 & 7, leaf >> 6 & 1) == (WRITE_BACK, IGNORE_PAT)


@pytest.mark.parametrize("bit", [6, 9, 57])
def test_a_leaf_that_differs_in_one_bit_is_noticed(bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    make_leaf = TableFormat.make_leaf

    def of_a_device(fmt: TableFormat, *args: Any, **kwargs: Any) -> int:
        calls.append(0)
        entry = make_leaf(fmt, *args, **kwargs)
        return entry ^ (1 << bit if len(calls) == 1 else 0)  # the first world's: the device's

    monkeypatch.setattr(TableFormat, "make_leaf", of_a_device)
    with pytest.raises(AssertionError, match="0x"):
        test_a_device_and_a_vcpu_make_the_same_leaf("A/D", 1, "written", True, 0)
