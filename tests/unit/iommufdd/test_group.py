"""One HWPT a group, one change at a time, and a replacement that moves every device or none."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from iommufdd.core.counts import UnitCounts
from iommufdd.core.device import IommufdDevice
from iommufdd.core.fault_policy import FaultPolicy
from iommufdd.core.group import IommufdGroup
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.partial import PartialGroups
from protocol.errors import UapiError
from protocol.flow import Wait
from tests.kit.iommufdd import RID, Surroundings, function

OWNER, OTHER = object(), object()


class Grouped:
    """Two devices of one group, two HWPTs."""

    def __init__(self) -> None:
        self.world = Surroundings()
        self.group = IommufdGroup(3)
        self.devices = [self._device(0), self._device(1)]
        self.kvm: Hwpt = self.world.hwpt()
        self.paging = self.world.paging()
        self.kvm.id, self.paging.id = 5, 6

    def _device(self, number: int) -> IommufdDevice:
        self.group.claim(OWNER)
        return IommufdDevice(
            function(RID + 8 * number), self.world, self.world, FaultPolicy(), PartialGroups(UnitCounts())
        )

    def start(self, number: int, hwpt: Hwpt, *, pinned: bool = False) -> Wait[None]:
        return self.world.start(self.group.attach(self.devices[number], hwpt, pinned=pinned))

    def attach(self, number: int, hwpt: Hwpt, *, pinned: bool = False) -> None:
        self.start(number, hwpt, pinned=pinned).result()

    def detach(self, number: int) -> None:
        self.world.run(self.group.detach(self.devices[number]))

    def refused(self, number: int, hwpt: Hwpt, *, pinned: bool = False) -> UapiError:
        with pytest.raises(UapiError) as caught:
            self.attach(number, hwpt, pinned=pinned)
        return caught.value

    def on(self) -> list[int]:
        """Which HWPT each device is on, and the page requests that go with it."""
        for device in self.devices:
            needs = device.hwpt is self.kvm
            functions = self.world.switched.get(device.rid, {})
            assert bool(functions.get("pri")) is needs, f"{device.info.name}: {functions}"
            assert bool(functions.get("master")) is (device.hwpt is not None)
        return self.on_hwpts()

    def on_hwpts(self) -> list[int]:
        return [device.hwpt.id if device.hwpt is not None else 0 for device in self.devices]


@pytest.fixture
def grouped() -> Grouped:
    return Grouped()


@pytest.mark.rfc("RFC-59")
def test_a_second_device_of_the_group_on_another_hwpt_is_einval(grouped: Grouped) -> None:
    grouped.attach(0, grouped.kvm)
    refused = grouped.refused(1, grouped.paging)
    assert refused.errno == errno.EINVAL
    assert "HWPT 5" in refused.why
    assert grouped.on() == [5, 0]
    grouped.detach(0)
    grouped.attach(1, grouped.paging)
    assert grouped.on() == [0, 6]


@pytest.mark.rfc("RFC-66")
def test_every_device_of_the_group_counts_as_a_user(grouped: Grouped) -> None:
    grouped.attach(0, grouped.kvm)
    grouped.attach(1, grouped.kvm)
    assert grouped.kvm.users == 2
    grouped.detach(0)
    assert grouped.kvm.users == 1
    grouped.detach(1)
    grouped.detach(1)
    assert grouped.kvm.users == 0


@pytest.mark.rfc("RFC-107")
@pytest.mark.defect("B-12")
def test_a_replacement_moves_the_whole_group_and_page_requests_go_with_it(grouped: Grouped) -> None:
    """B-12: `on` holds page requests against what each device's HWPT needs."""
    grouped.attach(0, grouped.paging)
    grouped.attach(1, grouped.paging)
    for hwpt, expected in ((grouped.kvm, [5, 5]), (grouped.paging, [6, 6]), (grouped.kvm, [5, 5])):
        grouped.attach(1, hwpt)
        assert grouped.on() == expected
    assert (grouped.kvm.users, grouped.paging.users) == (2, 0)


def test_replacing_by_the_same_is_nothing(grouped: Grouped) -> None:
    grouped.attach(0, grouped.kvm)
    steps = len(grouped.world.log)
    grouped.attach(0, grouped.kvm)
    assert (len(grouped.world.log), grouped.kvm.users) == (steps, 1)


def test_replacing_by_the_same_with_everything_pinned_is_not_passed_over(grouped: Grouped) -> None:
    """It was answered ok, with nothing pinned."""
    grouped.attach(0, grouped.kvm)
    grouped.attach(1, grouped.kvm, pinned=True)
    steps = len(grouped.world.log)
    assert grouped.refused(0, grouped.kvm, pinned=True).errno == errno.EINVAL
    assert (len(grouped.world.log), grouped.on(), grouped.kvm.users) == (steps, [5, 5], 2)
    grouped.detach(0)
    grouped.attach(0, grouped.kvm, pinned=True)
    grouped.attach(0, grouped.kvm, pinned=True)
    assert [entry for entry in grouped.world.log if entry[0] == "pin_all"] == [("pin_all",)] * 2


def test_where_nothing_is_absent_pinned_is_what_it_is_already(grouped: Grouped) -> None:
    grouped.attach(0, grouped.paging)
    grouped.attach(0, grouped.paging, pinned=True)
    assert grouped.paging.users == 1


@pytest.mark.parametrize("calls", range(26))
def test_a_replacement_that_fails_anywhere_moves_every_device_or_none(grouped: Grouped, calls: int) -> None:
    """Leaving goes on in spite of an error, entering does not: then everything goes back."""
    grouped.attach(0, grouped.paging)
    grouped.attach(1, grouped.paging)
    grouped.world.fails.after(calls, errno.EIO, lasting=False)
    replaced = grouped.start(0, grouped.kvm)
    moved = True
    try:
        replaced.result()
    except UapiError:
        moved = False
    assert grouped.on_hwpts() == ([5, 5] if moved else [6, 6])
    assert (grouped.kvm.users, grouped.paging.users) == ((2, 0) if moved else (0, 2))


def test_a_device_that_can_go_nowhere_is_blocked_and_detached(grouped: Grouped) -> None:
    grouped.attach(0, grouped.paging)
    grouped.world.fails.after(0, errno.ENODEV)
    assert grouped.refused(0, grouped.kvm).errno == errno.ENODEV
    assert (grouped.kvm.users, grouped.paging.users, grouped.group.attached) == (0, 0, [])


def test_a_refused_replacement_touches_nothing(grouped: Grouped) -> None:
    grouped.devices[1] = IommufdDevice(
        function(RID + 8, fault_capability="partial"),
        grouped.world,
        grouped.world,
        FaultPolicy(),
        PartialGroups(UnitCounts()),
    )
    grouped.attach(0, grouped.paging)
    grouped.attach(1, grouped.paging)
    steps = len(grouped.world.log)
    assert grouped.refused(0, grouped.kvm).errno == errno.EINVAL
    assert (len(grouped.world.log), grouped.on()) == (steps, [6, 6])


def test_changes_of_a_group_come_one_after_the_other(grouped: Grouped) -> None:
    grouped.world.hold()
    first = grouped.start(0, grouped.kvm)
    second = grouped.start(1, grouped.kvm)
    gone = grouped.world.start(grouped.group.detach(grouped.devices[0]))
    assert [what for what, *_ in grouped.world.log] == ["pasid_entry", "pasid"]
    grouped.world.let_go()
    assert all(wait.done for wait in (first, second, gone))
    assert grouped.on() == [0, 5]


def test_two_detaches_at_once_detach_once_and_both_return(grouped: Grouped) -> None:
    grouped.attach(0, grouped.kvm)
    grouped.world.log.clear()
    grouped.world.hold()
    both = [grouped.world.start(grouped.group.detach(grouped.devices[0])) for _ in range(2)]
    assert not any(wait.done for wait in both)
    grouped.world.let_go()
    assert [wait.result() for wait in both] == [None, None]
    assert grouped.world.log.count(("pasid_entry", RID, 0, False)) == 1


def test_an_attach_that_waited_while_its_device_was_unbound_is_einval(grouped: Grouped) -> None:
    grouped.attach(0, grouped.kvm)
    grouped.world.hold()
    unbound = grouped.world.start(grouped.group.unbind(grouped.devices[0]))
    late = grouped.start(0, grouped.kvm)
    grouped.world.let_go()
    assert unbound.done
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.EINVAL):
        late.result()
    assert grouped.kvm.users == 0


def test_two_unbinds_at_once_unbind_once_and_both_return(grouped: Grouped) -> None:
    grouped.attach(0, grouped.kvm)
    grouped.world.hold()
    both = [grouped.world.start(grouped.group.unbind(grouped.devices[0])) for _ in range(2)]
    assert not any(wait.done for wait in both)
    grouped.world.let_go()
    assert [wait.result() for wait in both] == [None, None]
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.EBUSY):
        grouped.group.claim(OTHER)  # the rest of the group is bound still, each device counted once


def test_a_group_belongs_to_one_iommufd_until_all_its_devices_are_unbound(grouped: Grouped) -> None:
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.EBUSY):
        grouped.group.claim(OTHER)
    for device in grouped.devices:
        grouped.group.release(device)
    grouped.group.claim(OTHER)


# -- units or a KVM that go meanwhile ------------------------------------------------------------------


def lose_units(grouped: Grouped) -> None:
    grouped.world.alive = False


def lose_kvm(grouped: Grouped) -> None:
    grouped.kvm.maintained = False


LOSSES = [lose_units, lose_kvm]


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("replacing", [False, True])
def test_nothing_is_attached_to_what_nobody_walks_or_maintains(
    grouped: Grouped, lose: Callable[[Grouped], None], *, replacing: bool
) -> None:
    """The table would be walked as it was left, whatever became of its frames."""
    if replacing:
        grouped.attach(0, grouped.paging)
    lose(grouped)
    steps = len(grouped.world.log)
    assert grouped.refused(0, grouped.kvm).errno == errno.ENODEV
    assert (len(grouped.world.log), grouped.on()) == (steps, [6 * replacing, 0])


@pytest.mark.parametrize("lose", LOSSES)
def test_an_attach_that_waited_asks_whether_its_hwpt_is_walkable(
    grouped: Grouped, lose: Callable[[Grouped], None]
) -> None:
    grouped.world.hold()
    first = grouped.start(0, grouped.kvm)
    second = grouped.start(1, grouped.kvm)
    lose(grouped)
    grouped.world.let_go()
    assert first.done, "its KVM takes it off again"
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.ENODEV):
        second.result()
    assert grouped.on_hwpts() == [5, 0]


@pytest.mark.parametrize("let_go", range(1, 5))
def test_a_replacement_asks_again_once_the_device_has_left(grouped: Grouped, let_go: int) -> None:
    """KVM goes while it leaves its former HWPT: back it goes, and nobody had to take it off the new one."""
    grouped.attach(0, grouped.paging)
    grouped.world.hold()
    replaced = grouped.start(0, grouped.kvm)
    for _ in range(let_go):
        held, grouped.world.held = grouped.world.held, []
        assert held
        held[0].set(None)
        grouped.world.flows.run_ready()
    lose_kvm(grouped)
    assert grouped.kvm.users == 0, "it is still leaving"
    grouped.world.let_go()
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.ENODEV):
        replaced.result()
    assert grouped.on() == [6, 0]


def test_what_a_failed_replacement_goes_back_to_cannot_be_destroyed_meanwhile(grouped: Grouped) -> None:
    """With its only device on its way it had no user, and IOMMU_DESTROY took it; then it came back."""
    grouped.attach(0, grouped.paging)
    grouped.world.hold()
    replaced = grouped.start(0, grouped.kvm)
    while not replaced.done:
        assert grouped.paging.users > 0, "IOMMU_DESTROY would take it"
        held, grouped.world.held = grouped.world.held, []
        assert held
        held[0].set(None)
        grouped.world.flows.run_ready()
    assert (grouped.on(), grouped.paging.users, grouped.kvm.users) == ([5, 0], 0, 1)
