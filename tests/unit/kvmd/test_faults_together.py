"""A fault that sleeps in its lookup holds nobody up: no other fault, no memslot change."""

from __future__ import annotations

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.mm.fault import FaultCounts
from kvmd.core.mm.page import MappedPage
from protocol.flow import Wait
from protocol.units import Gfn, Hva
from tests.kit.kvmd import WRITE, World
from tests.planted.plugin import Plants


def nobody_waits_for_a_sleeper(world: World) -> None:
    first = world.map(16)
    world.set_slot(0, 0x100, 16, first)
    exported = world.export()
    gate: Wait[None] = Wait()
    looked_up = world.mm.get_user_page

    async def first_page_sleeps(hva: Hva, *, write: bool, tally: FaultCounts | None = None) -> MappedPage:
        if hva == first:
            await gate  # as on a userfaultfd, until the VMM has resolved it
        return await looked_up(hva, write=write, tally=tally)

    world.mm.get_user_page = first_page_sleeps  # type: ignore[method-assign]
    sleeper = world.start(exported.fault(world.vm.fault_path, 77, Gfn(0x100), WRITE))
    beside = world.start(exported.fault(world.vm.fault_path, 77, Gfn(0x101), WRITE))
    assert beside.done, "a fault waits for another's lookup"
    change = world.start(world.vm.slots_change.set_memory_region(world.region(1, 0x200, 1, first)))
    assert change.done, "the VMM cannot resolve the lookup: its memslot change waits for it"
    assert not sleeper.done
    gate.set(None)
    world.flows.run_ready()
    assert sleeper.result() is FaultResult.FIXED


@pytest.mark.defect("B-25")
def test_a_fault_that_sleeps_holds_up_neither_faults_nor_memslots() -> None:
    nobody_waits_for_a_sleeper(World())


@pytest.mark.defect("B-25")
def test_a_fault_path_under_the_slots_lock_is_noticed(plant: Plants) -> None:
    plant("B-25-slots-lock-over-faults")
    with pytest.raises(AssertionError, match="waits"):
        nobody_waits_for_a_sleeper(World())
