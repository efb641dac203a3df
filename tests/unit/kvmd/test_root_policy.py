"""What a root is like is spelled by bits: each does what its name says, combinations are sound."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kvmd.core.capability import KvmCap, check_extension, enable_cap
from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.tables.root_policy import ALL_BEHAVIOURS, CPUS, IOMMU_OWN, RootBehaviour, RootPolicy
from kvmd.core.tables.spte import is_young
from kvmd.core.tables.tdp_table import TdpMmu
from protocol.errors import UapiError
from protocol.pt import bits
from protocol.uapi import names
from protocol.units import Gpa, Hva
from tests.kit.kvmd import READ, World
from tests.unit.kvmd.own_root import BASE, PAGE, Managed


def test_both_ends_spell_a_behaviour_by_the_same_bit() -> None:
    prefix = "KVM_TDP_FD_ROOT_"
    said = {name.removeprefix(prefix): bit for name, bit in vars(names).items() if name.startswith(prefix)}
    assert said == {bit.name: int(bit) for bit in RootBehaviour}
    assert int(KvmCap.TDP_FD_ROOT_POLICY) == names.KVM_CAP_TDP_FD_ROOT_POLICY


def test_a_root_of_the_iommus_own_is_one_of_the_combinations() -> None:
    own, spelled = Managed(), Managed(policy=(RootBehaviour.FILLED_BESIDE, 0))
    assert own.exported.root.role.policy == spelled.exported.root.role.policy == IOMMU_OWN
    assert CPUS not in [RootPolicy.of(behaviours, 0) for behaviours in range(ALL_BEHAVIOURS + 1)]


@pytest.mark.parametrize(
    "bad", [(0, [ALL_BEHAVIOURS + 1]), (0, [0, 4]), (0, [0, 0, 1]), (0, [0, 0, 0, 1]), (1, [0])]
)
def test_what_nobody_knows_is_refused(bad: tuple[int, list[int]]) -> None:
    world = World()
    assert check_extension(world.host.features, world.vm, KvmCap.TDP_FD_ROOT_POLICY) == ALL_BEHAVIOURS
    flags, args = bad
    with pytest.raises(UapiError) as caught:
        enable_cap(world.vm, KvmCap.TDP_FD_ROOT_POLICY, flags, args)
    assert caught.value.errno == errno.EINVAL
    assert world.vm.mmu.lent_policy is CPUS


# -- one behaviour each: what is seen without it, and what with it -----------------------------------------


def _aged(guest: Managed) -> bool:
    guest.fault(0)
    guest.do(guest.vm.host_changes.clear_flush_young(guest.hva, Hva(guest.hva + PAGE)))
    return not is_young(guest.entry(0))


def _protected_by_the_log(guest: Managed) -> bool:
    guest.fault(0)
    guest.log()
    return not guest.entry(0) & bits.WRITE


def _protected_by_tracking(guest: Managed) -> bool:
    guest.fault(0)
    guest.do(guest.vm.write_track.add(Gpa(BASE << 12)))
    protected = not guest.entry(0) & bits.WRITE
    assert (guest.fault(0) is FaultResult.TRACKED) == protected
    return protected


def _told_of_what_did_not_change(guest: Managed) -> bool:
    guest.fault(0)
    guest.do(guest.vm.flusher.flush(None))
    return guest.heard > 0


def _loses_all_with_a_slot(guest: Managed) -> bool:
    guest.fault(0)
    guest.change_slot(7, 0x9000, 1, guest.map(1))
    guest.change_slot(7, 0, 0, 0)
    return guest.iommu == {}


def _filled_by_a_vcpu(guest: Managed) -> bool:
    guest.write(0)
    return guest.iommu == {0: True}


EFFECTS: dict[RootBehaviour, Callable[[Managed], bool]] = {
    RootBehaviour.AGES: _aged,
    RootBehaviour.LOGS: _protected_by_the_log,
    RootBehaviour.TRACKS: _protected_by_tracking,
    RootBehaviour.TOLD_ALL: _told_of_what_did_not_change,
    RootBehaviour.ZAPPED_WHOLE: _loses_all_with_a_slot,
    RootBehaviour.FILLED_BESIDE: _filled_by_a_vcpu,
}


@pytest.mark.parametrize("behaviour", EFFECTS, ids=lambda behaviour: behaviour.name)
def test_each_behaviour_is_its_own_bits_alone(behaviour: RootBehaviour) -> None:
    effect = EFFECTS[behaviour]
    for policy, has_it in ((behaviour, True), (0, False), (ALL_BEHAVIOURS & ~behaviour, False)):
        guest = Managed(policy=(policy, 0))
        assert effect(guest) == has_it, policy
        assert guest.sound()


@pytest.mark.parametrize("nx", [False, True])
def test_huge_leaves_keep_x_unless_the_mitigation_is_theirs_too(nx: bool) -> None:
    guest = Managed(level=2, policy=(RootBehaviour.NX_HUGE if nx else 0, 0))
    guest.do(guest.vm.nx_huge.switch(on=True))
    guest.fault(0)
    assert bool(guest.entry(0) & bits.EXEC) != nx
    assert guest.exported.root.leaves[2] == 1


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_its_largest_leaf_is_the_policys_and_the_metadatas(largest: int) -> None:
    guest = Managed(level=2, policy=(RootBehaviour.FILLED_BESIDE, largest))
    guest.write(0)
    leaves = guest.exported.root.leaves
    assert (leaves[1], leaves[2]) == ((1, 0) if largest == 1 else (0, 1))
    assert guest.exported.meta.max_huge_page_level == (largest or 3)
    assert guest.cpu_root.leaves[2] == 1
    assert guest.sound()


# -- together ----------------------------------------------------------------------------------------------

ONE_BY_ONE = [0, *RootBehaviour, *(ALL_BEHAVIOURS & ~bit for bit in RootBehaviour), ALL_BEHAVIOURS]


def _history(guest: Managed) -> None:
    """Both sides touch, the host ages, a slot logs, is tracked and goes; sound on the way."""
    vm = guest.vm

    def touch(*pages: int) -> None:
        for page in pages:
            guest.write(page)
            guest.fault(page + 1)
        assert check_vm(vm) == []

    touch(0, 2)
    guest.do(vm.host_changes.clear_flush_young(guest.hva, Hva(guest.hva + 4 * PAGE)))
    guest.log()
    assert check_vm(vm) == []
    touch(1)
    guest.dirty()
    touch(0, 2)
    guest.do(vm.write_track.add(Gpa(BASE << 12)))
    guest.fault(0, READ)
    guest.write(0)
    assert check_vm(vm) == []
    guest.log(0)
    touch(1, 5)
    guest.do(vm.nx_huge.switch(on=True))
    guest.change_slot(7, 0x9000, 1, guest.map(1))
    guest.change_slot(7, 0, 0, 0)
    touch(1)
    guest.change_slot(0, 0, 0, 0)
    assert guest.iommu == {}
    assert guest.sound()


@pytest.mark.parametrize("behaviours", ONE_BY_ONE)
def test_each_alone_and_all_but_each_are_sound_through_a_history(behaviours: int) -> None:
    _history(Managed(level=2, policy=(behaviours, 0)))


@pytest.mark.parametrize(
    ("name", "wrong", "behaviour", "number"),
    [
        ("aged_roots", lambda self: self.roots, 0, "I23"),
        ("logged_roots", TdpMmu.cpu_roots, RootBehaviour.LOGS, "I20"),
    ],
)
def test_a_behaviour_that_asks_another_question_is_found(
    name: str, wrong: object, behaviour: int, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: every root is aged whatever its policy says; only CPUs' roots are logged."""
    guest = Managed(policy=(behaviour, 0))
    monkeypatch.setattr(TdpMmu, name, wrong)
    with pytest.raises(AssertionError, match=number):
        _history(guest)
