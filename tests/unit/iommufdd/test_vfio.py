"""A device node: bound once, attached within its iommufd, unbound once, and of its own hardware for good."""

from __future__ import annotations

import errno

import pytest

from iommufdd.core.device import DeviceState
from iommufdd.core.hmm import CallerMm, UserFd
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.hwpt_kvm import HwptKvm
from protocol.units import PAGE_SIZE, Hva, Iova
from tests.kit.platform import MM, TwoNodes
from tests.unit.iommufdd.spaces import HVA, outcome


def test_a_node_is_opened_once_and_again_after_its_end() -> None:
    rig = TwoNodes()
    assert outcome(lambda: rig.open(0)) == errno.EBUSY
    assert outcome(lambda: rig.open(2)) == errno.ENOENT
    rig.bind()
    rig.run(rig.platform.close(rig.nodes[0]))
    assert rig.platform.devices == []
    rig.open(0)


def test_a_node_is_bound_to_one_iommufd_and_its_group_with_it() -> None:
    rig = TwoNodes()
    device = rig.bind()
    assert outcome(lambda: rig.bind()) == errno.EINVAL
    rig.run(rig.nodes[0].unbind())
    assert device.state is DeviceState.UNBOUND
    assert rig.bind(ctx=rig.iommufd()) is not device


def test_an_iommufd_without_room_leaves_the_group_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = TwoNodes()
    monkeypatch.setattr("iommufdd.core.object.MAX_OBJECTS", 0)
    assert outcome(lambda: rig.bind()) == errno.ENOMEM
    monkeypatch.undo()
    rig.bind(ctx=rig.iommufd())


def test_what_is_not_bound_is_not_attached_nor_pinned_for() -> None:
    node = TwoNodes().nodes[0]
    rig = TwoNodes()
    for call in (node.attach(1, pinned=False), node.detach(), node.pin(Iova(0), 4096)):
        assert outcome(lambda call=call: rig.run(call)) == errno.EINVAL  # type: ignore[misc]


def test_what_is_no_hwpt_is_not_attached_to() -> None:
    rig = TwoNodes()
    device, ioas = rig.bind(), rig.ioas()
    for number, expected in ((ioas.id, errno.EOPNOTSUPP), (device.id, errno.EINVAL), (99, errno.ENOENT)):
        call = rig.nodes[0].attach(number, pinned=False)
        assert outcome(lambda call=call: rig.run(call)) == expected  # type: ignore[misc]


def test_an_hwpt_is_kept_while_somebody_waits_to_attach_to_it() -> None:
    rig = TwoNodes()
    number = rig.run(rig.kvm(rig.bind()))
    rig.hardware.hold()
    attached = rig.start(rig.nodes[0].attach(number, pinned=False))
    assert outcome(lambda: rig.run(rig.ctx.destroy(number))) == errno.EBUSY
    while not attached.done:
        rig.hardware.let_go()
    assert attached.result() == number


def test_two_who_unbind_take_the_device_out_once() -> None:
    """Its fd is closed while the iommufd is."""
    rig = TwoNodes()
    device = rig.bind()
    rig.run(rig.nodes[0].attach(rig.run(rig.kvm(device)), pinned=False))
    rig.hardware.hold()
    both = [rig.start(rig.nodes[0].unbind()), rig.start(rig.ctx.release())]
    while not all(wait.done for wait in both):
        rig.hardware.let_go()
    assert [wait.result() for wait in both] == [None, None]
    assert (device.state, rig.nodes[0].binding) == (DeviceState.UNBOUND, None)
    assert not list(rig.ctx.objects)


def test_hardware_that_went_is_not_what_came_in_its_place() -> None:
    rig = TwoNodes()
    old = rig.nodes[0]
    device = rig.bind()
    rig.hardware.alive = False
    again = rig.open(0)
    assert (rig.probes, again is old) == (1, False)
    again.bind(rig.iommufd().objects)
    assert outcome(lambda: rig.run(old.pin(Iova(0), 4096))) == errno.ENODEV
    assert outcome(lambda: rig.run(rig.kvm(device))) == errno.ENODEV
    rig.run(old.unbind())


def test_the_end_of_an_iommufd_is_devices_then_hwpts_then_ioases() -> None:
    rig = TwoNodes()
    device, ioas = rig.bind(), rig.ioas()
    rig.run(rig.nodes[0].attach(rig.run(rig.paging(device, ioas)), pinned=False))
    rig.run(ioas.map(CallerMm(MM, UserFd(9)), Hva(HVA), PAGE_SIZE, Iova(0), writable=True))
    rig.asked()
    rig.ctx.close()
    rig.run(rig.ctx.release())
    last = [what for what in rig.asked() if what in ("pasid_entry", "remove_memory", "unpin")]
    gone = ["pasid_entry", "pasid_entry"]  # not present, then cleared
    assert last == [*gone, "remove_memory", "unpin", "remove_memory"], "of the table, of the process"
    assert not list(rig.ctx.objects)
    assert rig.tables.pool.in_use == 0


def test_who_left_an_hwpt_while_its_kvm_was_lost_stays_where_it_went() -> None:
    """Who takes devices off waits for its turn, and by then the replacement is over."""
    rig = TwoNodes()
    device = rig.bind()
    kvm, paging = rig.run(rig.kvm(device)), rig.run(rig.paging(device, rig.ioas()))
    rig.run(rig.nodes[0].attach(kvm, pinned=False))
    rig.hardware.hold()
    replaced = rig.start(rig.nodes[0].attach(paging, pinned=False))
    lost = rig.start(rig.platform.lose_kvm(rig.ctx.objects.get(kvm, HwptKvm)))
    while not lost.done:
        rig.hardware.let_one_go()
    assert replaced.result() == paging
    assert device.hwpt is rig.ctx.objects.get(paging, Hwpt)
