"""What ends: a TDP FD, a process, a VM.  Each story as it is, and with the defect put back."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmd.core import host as host_module
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.mm.fault import FaultCounts
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.page import MappedPage
from kvmd.core.mm.reclaim import migrate
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.tdp_mmu import Mapped
from kvmd.core.tables.tdp_table import TdpMmu
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.units import Gfn, Hva
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import WRITE, World
from tests.kit.lent import Backed
from tests.planted.plugin import Plants

PAGE = 4096


@pytest.fixture
def world() -> World:
    return Backed(0x100, 16)


def use_after_release(world: World) -> None:
    """A vCPU that ran on the exported root runs on, and the host moves a page of it."""
    vcpu, slot = world.vm.vcpus[0], next(iter(world.vm.slots))
    exported, importer = world.lend(), world.importer
    world.guest_write(vcpu, 0x10_0000, b"before")
    exported.unregister_importer("unit", importer)
    world.run(world.vm.exports.close(exported))
    assert (exported.root.exported, exported.root.invalid) == (False, False)
    assert vcpu.arch.roots[0] is exported.root
    world.run(migrate(world.mm, slot.hva, PAGE))
    world.guest_write(vcpu, 0x10_0000, b"after!")
    assert world.run(world.mm.read(slot.hva, 6)) == b"after!", "the vCPU wrote to the page's old frame"


@pytest.mark.rfc("RFC-102")
@pytest.mark.defect("B-18")
def test_after_a_release_no_vcpu_uses_a_stale_translation(world: World) -> None:
    use_after_release(world)


@pytest.mark.defect("B-18")
def test_a_release_that_zaps_without_a_flush_is_noticed(world: World, plant: Plants) -> None:
    """The host then finds nothing to clear, flushes nothing, and the vCPU's TLB still has the old frame."""
    plant("B-18-zapped-at-release")
    with pytest.raises(AssertionError, match="old frame"):
        use_after_release(world)


def exit_under_dma(world: World) -> None:
    exported, importer = world.lend(), world.importer
    world.io_fault(exported, 0x100)
    over = world.start(world.mm.exit())
    assert importer.heard, "frames are given back and no importer was told"
    assert (over.done, world.host.frames.in_use) == (False, 1)
    world.ack(importer)
    assert (over.done, world.host.frames.in_use) == (True, 0)


@pytest.mark.rfc("RFC-103")
@pytest.mark.defect("B-19")
def test_a_process_that_exits_keeps_its_frames_until_importers_acked(world: World) -> None:
    exit_under_dma(world)


@pytest.mark.defect("B-19")
def test_an_exit_that_flushes_nothing_is_noticed(world: World, plant: Plants) -> None:
    plant("B-19-exit-zaps-unflushed")
    with pytest.raises(AssertionError, match="no importer was told"):
        exit_under_dma(world)


def end_of_a_vm(world: World) -> None:
    exported = world.export()
    for gfn in (0x100, 0x105):
        assert world.io_fault(exported, gfn) is FaultResult.FIXED
    world.run(world.vm.exports.close(exported))
    world.run(world.vm.destroy())
    held = world.host.pool.in_use, world.host.pool.held(world.vm.id)
    assert held == (0, 0), f"table pages in use, held for a flush: {held}"
    assert not any(world.bare.tables)


@pytest.mark.defect("B-23")
def test_a_vm_gives_back_the_pages_its_devices_faults_took(world: World) -> None:
    end_of_a_vm(world)


@pytest.mark.defect("B-23")
def test_a_vm_that_keeps_some_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the series did: pages are taken for exported faults five at a time, and the rest is forgotten."""
    map_page = tdp_mmu.map_page

    def from_a_cache(mmu: TdpMmu, *args: Any, **kwargs: Any) -> Mapped:
        mmu.pool.allocate()
        return map_page(mmu, *args, **kwargs)

    monkeypatch.setattr(tdp_mmu, "map_page", from_a_cache)
    with pytest.raises(AssertionError, match="table pages in use"):
        end_of_a_vm(world)


# -- who still asks after the release --------------------------------------------------------------------


def test_a_fault_that_slept_while_the_tdp_was_released_is_enodev(world: World) -> None:
    """The importer keeps no reference: its fault finds no exported root to map into, and maps nothing."""
    exported = world.export()
    gate: Wait[None] = Wait()
    looked_up = world.mm.get_user_page

    async def sleepy(hva: Hva, *, write: bool, tally: FaultCounts | None = None) -> MappedPage:
        await gate
        return await looked_up(hva, write=write, tally=tally)

    world.mm.get_user_page = sleepy  # type: ignore[method-assign]
    fault = world.start(exported.fault(world.vm.fault_path, 77, Gfn(0x100), WRITE))
    world.run(world.vm.exports.close(exported))
    gate.set(None)
    world.flows.run_ready()
    with pytest.raises(UapiError, match="ENODEV"):
        fault.result()
    assert world.table(exported.meta.root_hpa) == {}


@pytest.mark.defect("B-36")
def test_a_released_tdp_takes_no_importer_and_no_fault(world: World) -> None:
    exported = world.export()
    world.run(world.vm.exports.close(exported))
    world.export()
    with pytest.raises(UapiError, match="ENODEV"):
        exported.register_importer("unit", SlowImporter())
    with pytest.raises(UapiError, match="ENODEV"):
        world.io_fault(exported, 0x100)


def test_a_fork_that_fails_leaves_no_child(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(parent: Mm, child: Mm) -> None:
        raise UapiError(errno.ENOMEM, "no page for a copy")

    with monkeypatch.context() as patch:
        patch.setattr(host_module, "fork", fails)
        with pytest.raises(UapiError, match="no page for a copy"):
            world.run(world.host.fork_mm(world.mm))
    assert world.host.processes == [world.mm]
    child = world.run(world.host.fork_mm(world.mm))
    assert world.host.processes == [world.mm, child]
