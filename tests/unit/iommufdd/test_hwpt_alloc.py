"""IOMMU_HWPT_ALLOC: the order in which an HWPT comes to be, and what each failure leaves behind: nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest

from iommufdd.core.hwpt_kvm import HwptKvm
from protocol.hw.caps import Cap
from protocol.units import Gpa, Level
from tests.kit.platform import META, TwoNodes
from tests.unit.iommufdd.spaces import outcome

TAKEN = ["open", "metadata", "register", "add_memory"]


def test_a_tdp_fd_is_asked_looked_at_and_registered_with_before_the_units_get_its_memory() -> None:
    rig = TwoNodes()
    number = rig.run(rig.kvm(rig.bind()))
    hwpt = rig.ctx.objects.get(number, HwptKvm)
    assert (rig.asked(), rig.platform.hwpts[hwpt.domain.did], hwpt.memory) == (TAKEN, hwpt, 5)
    rig.run(rig.hardware.on_invalidate(Gpa(0), 4096, 3))
    assert hwpt.acked_epoch == 3


@pytest.mark.defect("B-08", "B-09")
@pytest.mark.parametrize("step", range(4))
def test_whatever_fails_lets_go_of_the_tdp_fd_and_of_nothing_else(step: int) -> None:
    rig = TwoNodes()
    device = rig.bind()
    rig.hardware.fails.after(step, errno.EBUSY)
    assert outcome(lambda: rig.run(rig.kvm(device))) == errno.EBUSY
    assert rig.asked() == [*TAKEN[:step], "release"]
    assert rig.platform.hwpts == {}


@pytest.mark.parametrize(
    ("meta", "flags", "number"),
    [
        (replace(META, type=9), 0, errno.EINVAL),
        (replace(META, level=Level(5)), 0, errno.EOPNOTSUPP),
        (META, 1, errno.EOPNOTSUPP),
    ],
)
def test_what_the_unit_cannot_walk_is_not_registered_with(meta: object, flags: int, number: int) -> None:
    rig = TwoNodes()
    device = rig.bind()
    rig.hardware.meta = meta  # type: ignore[assignment]
    rig.hardware.cap = Cap(rig.hardware.cap.value & ~(1 << 11))  # 4 levels alone
    assert outcome(lambda: rig.run(rig.kvm(device, flags))) == number
    assert rig.asked() == ["open", "metadata", "release"]


def until(rig: TwoNodes, what: str) -> None:
    """Let what was asked be answered, up to and not including `what`."""
    while rig.hardware.log[-1] != (what,):
        rig.hardware.held, held = [], rig.hardware.held
        for wait in held or []:
            wait.set(None)
        rig.hardware.flows.run_ready()


def meanwhile(rig: TwoNodes, what: str, change: Callable[[], None]) -> int:
    """`change` happens while `what` is under way; what allocating ends with."""
    device = rig.bind()
    rig.hardware.hold()
    made = rig.start(rig.kvm(device))
    until(rig, what)
    change()
    while not made.done:
        rig.hardware.let_go()
    return outcome(made.result)


def test_a_unit_that_goes_meanwhile_is_enodev() -> None:
    rig = TwoNodes()

    def gone() -> None:
        rig.hardware.alive = False

    assert meanwhile(rig, "metadata", gone) == errno.ENODEV
    assert rig.asked() == ["open", "metadata", "release"]


@pytest.mark.parametrize("what", ["open", "register", "add_memory"])
def test_an_iommufd_closed_meanwhile_is_ebadf(what: str) -> None:
    rig = TwoNodes()
    assert meanwhile(rig, what, rig.ctx.close) == errno.EBADF
    assert rig.asked() == [*TAKEN, "remove_memory", "unregister", "release"]
    assert rig.platform.hwpts == {}


def test_kvm_that_goes_before_there_is_an_hwpt() -> None:
    """Between its answer and the units': what nobody maintains is not made."""
    rig = TwoNodes()
    assert meanwhile(rig, "add_memory", lambda: rig.hardware.on_gone()) == errno.ENODEV
    assert rig.platform.hwpts == {}
    assert not list(rig.ctx.objects.all(HwptKvm))


def test_kvm_that_goes_later_takes_its_devices_off() -> None:
    rig = TwoNodes()
    hwpt = rig.ctx.objects.get(rig.run(rig.kvm(rig.bind())), HwptKvm)
    rig.run(rig.nodes[0].attach(hwpt.id, pinned=False))
    rig.hardware.on_gone()
    rig.hardware.flows.run_ready()
    assert (hwpt.maintained, hwpt.rids, hwpt.users) == (False, [], 0)
    assert outcome(lambda: rig.run(rig.nodes[0].attach(hwpt.id, pinned=False))) == errno.ENODEV


def test_kvm_that_hangs_up_and_lives_gets_its_memory_back_behind_the_devices() -> None:
    """It waits for the lease with whatever it invalidates, a vCPU's fault too; the HWPT stays its user's."""
    rig = TwoNodes()
    hwpt = rig.ctx.objects.get(rig.run(rig.kvm(rig.bind())), HwptKvm)
    rig.run(rig.nodes[0].attach(hwpt.id, pinned=False))
    rig.asked()
    rig.hardware.on_gone()
    rig.hardware.flows.run_ready()
    walked = [what for what in rig.asked() if what in ("pasid_entry", "remove_memory")]
    assert walked == ["pasid_entry", "pasid_entry", "remove_memory"], "not present, then cleared"
    rig.run(rig.ctx.destroy(hwpt.id))
    assert rig.asked() == ["unregister", "release"]


@pytest.mark.parametrize("step", range(2))
def test_a_paging_hwpt_that_cannot_be_made_leaves_table_and_domain_id_free(step: int) -> None:
    rig = TwoNodes()
    ioas = rig.ioas()
    device = rig.bind()
    if step:
        rig.ctx.close()
    else:
        rig.hardware.fails.after(0, errno.ENOMEM, lasting=False)
    assert outcome(lambda: rig.run(rig.paging(device, ioas))) == [errno.ENOMEM, errno.EBADF][step]
    assert (rig.platform.hwpts, rig.tables.pool.in_use, ioas.hwpts, ioas.users) == ({}, 0, [], 0)


def test_domain_ids_run_out_and_come_back_with_their_hwpt() -> None:
    rig = TwoNodes()
    device, ioas = rig.bind(), rig.ioas()
    made = []
    while outcome(lambda: made.append(rig.run(rig.paging(device, ioas)))) == 0:
        pass
    assert outcome(lambda: rig.run(rig.paging(device, ioas))) == errno.ENOSPC
    dids = sorted(rig.platform.hwpts)
    assert dids == list(range(dids[0], 16))
    rig.run(rig.ctx.destroy(made[3]))
    rig.run(rig.paging(device, ioas))
    assert sorted(rig.platform.hwpts) == dids


def test_a_domain_id_is_another_s_once_the_units_have_let_go_of_the_memory_and_no_sooner() -> None:
    """They may have tagged something with it until then."""
    rig = TwoNodes()
    device = rig.bind()
    number = rig.run(rig.kvm(device))
    did = rig.ctx.objects.get(number, HwptKvm).domain.did
    rig.hardware.hold()
    gone = rig.start(rig.ctx.destroy(number))
    asked, rig.hardware.held = rig.hardware.held or [], None
    rig.run(rig.paging(device, rig.ioas()))
    assert (gone.done, len(rig.platform.hwpts)) == (False, 2)
    for wait in asked:
        wait.set(None)
    rig.hardware.flows.run_ready()
    assert (gone.done, did in rig.platform.hwpts, len(rig.platform.hwpts)) == (True, False, 1)


def test_a_domain_id_is_not_free_while_who_lost_kvm_still_takes_the_memory_back() -> None:
    """Destroyed meanwhile, an HWPT has nothing left to give: its domain id waits for them all the same."""
    rig = TwoNodes()
    device = rig.bind()
    number = rig.run(rig.kvm(device))
    hwpt = rig.ctx.objects.get(number, HwptKvm)
    rig.hardware.hold()
    lost = rig.start(rig.platform.lose_kvm(hwpt))
    (units,), rig.hardware.held = rig.hardware.held or [], None  # KVM hung up: it answers at once
    gone = rig.start(rig.ctx.destroy(number))
    assert (lost.done, gone.done, hwpt.domain.did in rig.platform.hwpts) == (False, False, True)
    units.set(None)
    rig.hardware.flows.run_ready()
    assert (lost.done, gone.done, hwpt.domain.did in rig.platform.hwpts) == (True, True, False)
