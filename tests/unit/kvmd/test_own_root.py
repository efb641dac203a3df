"""A TDP FD with a root of the IOMMU's own: what is faulted in goes to both, and what is done to CPUs' entries
is not done to a device's.  Beside each story, where it says something, what the shared root does with it.
"""

from __future__ import annotations

import errno

import pytest

from kvmd.core.capability import KvmCap, check_extension, enable_cap
from kvmd.core.cpu.pre_fault import pre_fault_memory
from kvmd.core.export.tdp_fd import CreateTdpFd
from kvmd.core.faults.nx_huge import NxHugePages
from kvmd.core.faults.page_fault import FaultResult, FaultSource, PageFault
from kvmd.core.host import CpuFeatures
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.reclaim import age
from kvmd.core.mm.vma import Prot
from kvmd.core.tables import tdp_mmu
from kvmd.core.tables.root_policy import CPUS, IOMMU_OWN
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.units import Gfn, Gpa, Hva, Level
from tests.kit.importer import SlowImporter
from tests.kit.kvmd import World
from tests.planted.plugin import Plants
from tests.unit.kvmd.logged import NO_PML
from tests.unit.kvmd.own_root import BASE, PAGE, PAGES, Managed


@pytest.fixture
def guest() -> Managed:
    return Managed()


# -- the capability ------------------------------------------------------------------------------------------


def test_the_capability_is_there_and_settles_which_root_a_tdp_fd_lends() -> None:
    shared, own = Managed(own=False), Managed()
    assert check_extension(own.host.features, own.vm, KvmCap.TDP_FD_OWN_ROOT) == 1
    assert check_extension(own.host.features, None, KvmCap.TDP_FD_OWN_ROOT) == 1
    assert (shared.exported.root.role.policy, own.exported.root.role.policy) == (CPUS, IOMMU_OWN)
    for guest in (shared, own):
        guest.write(0)
    assert shared.vcpu.arch.roots[0] is shared.exported.root
    assert own.vcpu.arch.roots[0] is own.cpu_root is not own.exported.root


@pytest.mark.parametrize("bad", [(1, [0]), (0, [1]), (0, [0, 0, 1, 0, 0]), (0, [0, 0, 0, 1 << 63])])
def test_the_capability_takes_neither_flags_nor_arguments(bad: tuple[int, list[int]]) -> None:
    world = World()
    flags, args = bad
    with pytest.raises(UapiError) as caught:
        enable_cap(world.vm, KvmCap.TDP_FD_OWN_ROOT, flags, args)
    assert caught.value.errno == errno.EINVAL
    assert world.vm.mmu.lent_policy is CPUS


def test_once_a_tdp_fd_was_made_it_is_too_late(guest: Managed) -> None:
    for made in (guest, Managed(own=False)):
        for _ in ("while it is there", "afterwards"):
            with pytest.raises(UapiError) as caught:
                enable_cap(made.vm, KvmCap.TDP_FD_OWN_ROOT, 0, [0])
            assert caught.value.errno == errno.EINVAL
            if made.vm.exports.tdps:
                made.do(made.vm.exports.close(made.exported))


def test_a_tdp_fd_that_was_never_handed_out_settles_nothing() -> None:
    world = World()
    world.set_slot(0, BASE, 16, world.map(16))
    world.create_vcpu()
    nowhere = world.map(1, prot=Prot.READ)
    enable_cap(world.vm, KvmCap.TDP_FD_OWN_ROOT, 0, [0])
    with pytest.raises(UapiError) as caught:
        world.run(world.vm.exports.create(CreateTdpFd(0, 0, 0, Hva(nowhere))))
    assert caught.value.errno == errno.EFAULT
    assert world.vm.mmu.roots == []
    enable_cap(world.vm, KvmCap.TDP_FD_OWN_ROOT, 0, [0])


# -- what is faulted in --------------------------------------------------------------------------------------


def test_whoever_comes_first_both_have_the_page_after_one_fault(guest: Managed) -> None:
    for page in range(0, 40, 2):
        guest.write(page)
    for page in range(1, 40, 2):
        assert guest.fault(page) is FaultResult.FIXED
    assert guest.cpu == guest.iommu == dict.fromkeys(range(40), True)
    for page in range(40):
        guest.write(page)
        assert guest.fault(page) is FaultResult.SPURIOUS
    stats = guest.stats()
    assert (stats["pf_taken"], stats["pf_fixed"], stats["io_pf_fixed"]) == (20, 20, 20)
    assert guest.heard == 0
    assert guest.sound()


def test_a_device_that_comes_before_any_vcpu_faults_for_both(guest: Managed) -> None:
    """As with a shared root: the CPU finds the page."""
    assert guest.vcpu.arch.roots[0] is None
    guest.fault(3)
    guest.write(3)
    assert guest.stats()["pf_taken"] == 0
    assert guest.sound()


def test_what_a_vcpu_prefetches_a_device_finds(guest: Managed) -> None:
    guest.touch(0)
    guest.do(pre_fault_memory(guest.vcpu, guest.vm.fault_path, Gpa(BASE << 12), PAGE, 0))
    assert guest.iommu == {0: True}
    assert guest.entry(0) & bits.ACCESSED, "a device's leaf is never young by use: it counts as used"
    assert guest.sound()


def test_a_vcpu_that_finds_its_entry_there_fills_the_iommus_all_the_same(guest: Managed) -> None:
    """Another vCPU of the same root was first, and the IOMMU's root lost the page meanwhile: no room, say."""
    guest.write(5)
    own = guest.exported.root
    lost = tdp_mmu.zap_some(guest.vm.mmu, own, guest.vm.mmu.cursor(own, guest.span(5)), 1)
    assert (lost, guest.iommu) == (1, {})
    flow = guest.vm.fault_path.handle_fault(PageFault(Gfn(BASE + 5), True, FaultSource.VCPU), guest.vcpu.arch)
    assert guest.do(flow) is FaultResult.SPURIOUS
    assert guest.iommu == {5: True}


def test_without_room_in_the_other_root_a_fault_is_resolved_in_its_own() -> None:
    """And who needs the other faults there."""
    guest = Managed(tables=9 * PAGE)
    guest.write(0)  # four tables each
    assert guest.stats()["table_pages"] == 8
    far = BASE + 512
    guest.change_slot(1, far, 1, guest.map(1))
    assert guest.do(guest.vcpu.run([("w", far << 12, b"x")])).done
    assert guest.fault(512) is FaultResult.NO_MEMORY
    assert (set(guest.cpu), set(guest.iommu)) == ({0, 512}, {0})
    assert guest.sound()


def test_system_management_ram_is_in_no_root_of_the_iommus(guest: Managed) -> None:
    guest.change_slot(1 << 16, BASE, 1, guest.map(1))
    assert guest.do(guest.vcpu.run([("w", BASE << 12, b"smm")], smm=True)).done
    assert guest.iommu == {}
    assert guest.sound()


def test_a_gfn_without_a_slot_is_remembered_for_cpus_alone(guest: Managed) -> None:
    guest.do(guest.vcpu.run([("w", 0x66_6000_0000, b"mmio")]))
    assert guest.stats()["pf_mmio_spte_created"] == 1
    assert guest.exported.root.tables == 1
    assert guest.sound()


def test_a_gfn_beyond_the_iommus_table_is_the_cpus_alone() -> None:
    wide = CpuFeatures(maxphyaddr=52, ept_levels=5)
    guest = Managed(features=wide)
    tall = guest.vm.vcpus.create(1)
    assert guest.exported.root.role.level == 4
    with pytest.raises(UapiError):
        guest.vm.set_maxphyaddr(tall, 52)
    tall.arch.maxphyaddr = 52  # as if from before the export
    guest.change_slot(1, 1 << 36, 1, guest.map(1))
    assert guest.do(tall.run([("w", 1 << 48, b"x"), ("w", BASE << 12, b"x")])).done
    assert guest.iommu == {0: True}
    assert guest.stats()["vcpus_apart"] == 1
    assert guest.sound()


# -- what is taken away --------------------------------------------------------------------------------------


def test_what_the_host_takes_both_lose_and_the_importer_is_told_once(guest: Managed) -> None:
    guest.write(*range(4))
    wait = guest.start(dontneed(guest.mm, Hva(guest.hva), 2 * PAGE))
    assert guest.cpu == guest.iommu == {2: True, 3: True}
    assert (guest.heard, wait.done) == (1, False)
    guest.settle(wait)
    assert guest.sound()


def test_the_frame_is_held_until_the_importer_acks(guest: Managed) -> None:
    """I6, also where another flush in between had nothing to tell it."""
    guest.write(0, 1)
    frames = guest.host.frames.in_use
    gone = guest.start(dontneed(guest.mm, Hva(guest.hva), PAGE))
    other = guest.start(guest.vm.flusher.flush(None))
    assert (guest.heard, gone.done, other.done) == (1, False, False)
    assert guest.host.frames.in_use == frames
    guest.settle(gone)
    assert other.done
    assert guest.host.frames.in_use == frames - 1


def test_a_slot_that_goes_takes_its_own_leaves_from_the_iommu_and_no_others(guest: Managed) -> None:
    hva = guest.map(16)
    guest.change_slot(1, BASE + PAGES, 16, hva)
    guest.write(*range(8), *range(PAGES, PAGES + 4))
    faults = guest.stats()["io_pf_taken"]
    guest.change_slot(1, 0, 0, 0)
    assert guest.iommu == dict.fromkeys(range(8), True)
    assert guest.heard == 1
    for page in range(8):
        guest.write(page)
    stats = guest.stats()
    assert stats["io_pf_taken"] == faults == 0
    assert stats["pf_fixed"] == 12 + 8, "CPUs' roots are obsolete, as ever"
    assert guest.sound()


def test_a_slot_a_device_never_touched_goes_without_a_word_to_the_importer(guest: Managed) -> None:
    """The fault storm that the review objected to: none."""
    guest.write(*range(8))
    told = []
    for own in (guest, shared := Managed(own=False)):
        own.write(*range(8))
        own.change_slot(7, 0x9000, 1, own.map(1))
        own.change_slot(7, 0, 0, 0)
        told.append(own.heard)
    assert told == [0, 1]
    assert (len(guest.iommu), shared.seen(shared.exported.root)) == (8, {})


def test_a_slot_of_smm_that_goes_leaves_the_iommus_leaves_alone(guest: Managed) -> None:
    guest.write(*range(4))
    guest.change_slot(1 << 16, BASE, 16, guest.map(16))
    guest.change_slot(1 << 16, 0, 0, 0)
    assert guest.iommu == dict.fromkeys(range(4), True)
    assert guest.heard == 0


def test_a_slot_that_moves_leaves_nothing_behind(guest: Managed) -> None:
    guest.write(*range(8))
    guest.change_slot(0, BASE + 0x1000, PAGES, guest.hva)
    assert guest.iommu == {}
    assert guest.fault(0x1000) is FaultResult.FIXED
    assert guest.fault(0) is FaultResult.NO_SLOT
    assert guest.sound()


def test_a_released_root_of_the_iommus_own_is_taken_apart() -> None:
    guest = Managed(features=NO_PML)
    guest.write(*range(8))
    guest.log()
    root, tables = guest.exported.root, guest.cpu_root.tables
    guest.exported.unregister_importer("unit", guest.importer)
    guest.do(guest.vm.exports.close(guest.exported))
    assert root not in guest.vm.mmu.roots
    assert guest.host.pool.in_use == tables
    assert guest.cpu == dict.fromkeys(range(8), False)
    assert guest.dirty() == set(range(8)), "what a device may have written"
    assert guest.dirty() == set()
    again = guest.export()
    assert again.root.role.policy is IOMMU_OWN
    assert guest.sound()


def test_a_slot_change_and_a_release_at_once_take_the_root_apart_once(guest: Managed) -> None:
    guest.write(*range(8))
    guest.exported.unregister_importer("unit", guest.importer)
    deleted = guest.start(guest.vm.slots_change.set_memory_region(guest.region(0, 0, 0, 0)))
    released = guest.start(guest.vm.exports.close(guest.exported))
    assert deleted.done
    assert released.done
    assert guest.vm.mmu.roots == [guest.vcpu.arch.roots[0]]
    assert guest.sound()


# -- what does not concern a device --------------------------------------------------------------------------


@pytest.mark.parametrize("features", [CpuFeatures(), CpuFeatures(ept_ad_bits=False, pml=False)])
def test_ageing_is_told_to_no_importer_and_costs_no_io_fault(features: CpuFeatures) -> None:
    told = []
    for guest in (Managed(features=features), Managed(own=False, features=features)):
        guest.write(0, 1)
        guest.fault(2)
        before = guest.entry(0)
        assert guest.do(age(guest.mm, Hva(guest.hva), 3 * PAGE)) == 1
        told.append((guest.heard, guest.entry(0) == before))
        assert guest.do(age(guest.mm, Hva(guest.hva), 3 * PAGE)) == 0, "nobody used them since"
        assert guest.sound()
    assert told == [(0, True), (1, False)]


def test_tracking_protects_a_gfn_from_cpus_alone(guest: Managed) -> None:
    guest.write(0, 1)
    guest.do(guest.vm.write_track.add(Gpa(BASE << 12)))
    assert (guest.cpu, guest.iommu) == ({0: False, 1: True}, {0: True, 1: True})
    assert guest.heard == 0
    assert guest.fault(0) is FaultResult.SPURIOUS
    guest.do(dontneed(guest.mm, Hva(guest.hva), PAGE))
    assert guest.fault(0) is FaultResult.FIXED
    assert (guest.cpu[0], guest.iommu[0]) == (False, True)
    stores = guest.stats()["pf_emulate"]
    guest.write(0)
    assert guest.stats()["pf_emulate"] == stores + 1
    assert guest.sound()


def test_no_huge_leaf_of_the_iommus_is_made_small_for_what_cpus_execute() -> None:
    guest = Managed(level=2)
    guest.touch(0)
    guest.do(guest.vm.nx_huge.switch(on=True))
    guest.do(guest.vcpu.run([("exec", BASE << 12)]))
    assert (guest.cpu_root.leaves, guest.exported.root.leaves) == ([0, 1, 0, 0], [0, 0, 1, 0])
    assert guest.exported.root.nx_split == {}
    before = guest.entry(0)
    assert guest.do(guest.vm.nx_huge.recover()) == 1
    guest.write(0)
    guest.do(guest.vm.nx_huge.switch(on=False))
    guest.write(0)
    assert guest.entry(0) == before
    assert guest.heard == 0
    assert guest.sound()


def test_a_tracked_gfn_makes_the_cpus_leaf_small_alone() -> None:
    guest = Managed(level=2)
    guest.do(guest.vm.write_track.add(Gpa(BASE << 12)))
    guest.fault(9)
    assert (guest.cpu_root.leaves[1:3], guest.exported.root.leaves[1:3]) == ([1, 0], [0, 1])
    assert guest.sound()


# -- counted -------------------------------------------------------------------------------------------------


def test_table_pages_are_counted_twice_and_told_by_owner_and_level(guest: Managed) -> None:
    shared = Managed(own=False)
    for each in (guest, shared):
        each.write(*range(PAGES))
    both = {f"table_pages.{owner}.{level}": 1 for owner in ("cpu", "iommu") for level in (1, 2, 3, 4)}
    once = {f"table_pages.shared.{level}": 1 for level in (1, 2, 3, 4)}
    assert _tables(guest) == both
    assert _tables(shared) == once
    assert guest.stats()["table_pages"] == 2 * shared.stats()["table_pages"] == 8
    assert guest.stats()["pf_fixed"] == shared.stats()["pf_fixed"] == PAGES


def _tables(guest: Managed) -> dict[str, int]:
    return {name: n for name, n in guest.stats().items() if name.startswith("table_pages.") and n}


# -- planted bugs --------------------------------------------------------------------------------------------


def test_a_shared_root_loses_what_the_own_one_keeps() -> None:
    """The same run over both: what the role bit is worth."""
    cost = {}
    for own in (True, False):
        guest = Managed(own=own)
        guest.write(*range(16))
        for page in range(16):
            guest.fault(page)
        guest.log()
        guest.write(*range(16))
        guest.dirty()
        guest.do(age(guest.mm, Hva(guest.hva), 16 * PAGE))
        guest.change_slot(5, 0x9000, 1, guest.map(1))
        guest.change_slot(5, 0, 0, 0)
        before = guest.stats()["io_pf_fixed"]
        for page in range(16):
            guest.fault(page)
        cost[own] = guest.heard, guest.stats()["io_pf_fixed"] - before
        assert guest.sound()
    assert cost[True] == (0, 0)
    assert cost[False] == (4, 16)


@pytest.mark.parametrize("missing", ["_map_in_other_roots", "level", "age"])
def test_a_planted_bug_is_noticed(missing: str, monkeypatch: pytest.MonkeyPatch, plant: Plants) -> None:
    if missing == "_map_in_other_roots":
        plant("other-root-not-filled")
        with pytest.raises(AssertionError, match=r"Left contains"):
            test_whoever_comes_first_both_have_the_page_after_one_fault(Managed())
    elif missing == "level":
        monkeypatch.setattr(NxHugePages, "level", lambda self, root, fault, level: Level(1))
        with pytest.raises(AssertionError, match=r"\[0, 1, 0, 0\] != \[0, 0, 1, 0\]"):
            test_no_huge_leaf_of_the_iommus_is_made_small_for_what_cpus_execute()
    else:
        plant("I23-ageing-takes-every-root")
        with pytest.raises(AssertionError, match=r"I23"):
            test_ageing_is_told_to_no_importer_and_costs_no_io_fault(CpuFeatures())


def test_an_importer_that_comes_later_hears_of_what_changes_from_then_on(guest: Managed) -> None:
    """I15, for a root of the IOMMU's own."""
    guest.write(0, 1)
    late = SlowImporter()
    guest.exported.register_importer("late", late)
    guest.do(age(guest.mm, Hva(guest.hva), PAGE))
    assert late.heard == []
    wait = guest.start(dontneed(guest.mm, Hva(guest.hva), PAGE))
    assert len(late.heard) == guest.heard == 1
    guest.ack(late)
    guest.settle(wait)
