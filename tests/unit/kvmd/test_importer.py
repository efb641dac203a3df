"""TDP FDs, their importers and what keeps a VM: each order as it is, and with a step of it left out."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.cpu.pre_fault import pre_fault_memory
from kvmd.core.export.importer import Importer, TdpFd
from kvmd.core.export.tdp_fd import CreateTdpFd, ExportEvent
from kvmd.core.lease import ack_with_lease
from kvmd.core.mm.madvise import dontneed
from kvmd.core.users import VmUsers
from kvmd.core.vm import Kvm, VmType
from kvmd.core.vm_list import VmList
from protocol.flow import Wait
from protocol.units import Gfn, GfnSpan, Gpa
from tests.kit.importer import HandLease, SlowImporter
from tests.kit.kvmd import WRITE, World
from tests.kit.refusals import errno_of
from tests.planted.plugin import Plants

PAGE = 4096
BASE = 0x100


class Listed(World):
    """A VM in a list, its fd the first user, and a TDP FD; its importers' acks and leases are by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[Kvm] = []
        self.vms = VmList(self.host, self.flows.spawn, self.gone.append)
        self.vm, self.users = self.run(self.vms.create(self.mm, VmType.DEFAULT))
        self.hva = self.map(16)
        self.set_slot(0, BASE, 16, self.hva)
        self.vcpu = self.create_vcpu()
        create = TdpFd.create(self.users, self.vm.exports, self.vm.fault_path, CreateTdpFd(0, 0, 0))
        self.tdp = self.run(create)
        self.ops: dict[str, SlowImporter] = {}
        self.leases: dict[str, HandLease] = {}

    def new_importer(self, name: str) -> Importer:
        made = Importer(self.tdp)
        self.register(made, name)
        return made

    def register(self, importer: Importer, name: str) -> None:
        ops, lease = SlowImporter(), HandLease()
        importer.register(name, 77, ops, lease)
        self.ops[name], self.leases[name] = ops, lease

    def end_lease(self, name: str) -> None:
        self.leases[name].ended.set(None)
        self.flows.run_ready()

    def fault(self, importer: Importer, gfn: int = BASE) -> None:
        self.run(importer.fault(77, Gfn(gfn), WRITE))

    def give_up(self) -> Wait[int]:
        """The host takes the first page."""
        return self.start(dontneed(self.mm, self.hva, PAGE))


@pytest.fixture
def rig() -> Listed:
    return Listed()


# -- register and leave ----------------------------------------------------------------------------------


def test_a_channel_registers_once_a_name_is_one_importers_and_the_process_must_be_the_vms(
    rig: Listed,
) -> None:
    first, second = rig.new_importer("unit"), Importer(rig.tdp)
    assert errno_of(lambda: rig.register(first, "other")) == errno.EBUSY
    assert errno_of(lambda: rig.register(second, "unit")) == errno.EBUSY
    assert errno_of(lambda: second.register("other", 78, SlowImporter(), HandLease())) == errno.EINVAL
    assert rig.tdp.exported.importer_names == ["unit"]
    assert len(rig.tdp.leases) == 1, "a register that is refused leaves nothing"
    rig.register(second, "other")
    assert rig.tdp.exported.importer_names == ["other", "unit"]


def hears_until_its_lease_ends(rig: Listed) -> None:
    importer = rig.new_importer("unit")
    rig.fault(importer)
    left = rig.start(importer.unregister())
    taken = rig.give_up()
    assert len(rig.ops["unit"].pending) == 1, "something may still walk for it, and was not told"
    rig.ack(rig.ops["unit"])
    assert taken.done
    assert not left.done
    rig.end_lease("unit")
    assert left.done
    other = rig.new_importer("other")
    rig.fault(other)
    rig.give_up()
    assert len(rig.ops["unit"].heard) == 1, "I15: nothing once it is gone"
    assert len(rig.ops["other"].heard) == 1


def test_who_leaves_hears_of_every_flush_until_its_lease_ends_and_of_none_after(rig: Listed) -> None:
    hears_until_its_lease_ends(rig)


def test_an_importer_that_leaves_at_once_is_noticed(rig: Listed, plant: Plants) -> None:
    """I13 broken: what it was lent is still walked."""
    plant("R26-leaves-before-its-lease")
    with pytest.raises(AssertionError, match="was not told"):
        hears_until_its_lease_ends(rig)


def test_a_name_is_taken_until_the_lease_ends_and_another_may_be_had_meanwhile(rig: Listed) -> None:
    importer = rig.new_importer("unit")
    rig.start(importer.unregister())
    assert errno_of(lambda: rig.register(importer, "unit")) == errno.EBUSY
    rig.register(importer, "again")
    rig.end_lease("unit")
    assert rig.tdp.exported.importer_names == ["again"]


def test_its_pins_go_when_its_lease_has_ended_and_it_pins_no_more(rig: Listed) -> None:
    importer = rig.new_importer("unit")
    span = GfnSpan.of_pages(Gfn(BASE), 2)
    assert rig.run(importer.pin(span)) == 1
    assert rig.mm.pinned_pages == 2
    rig.start(importer.unregister())
    assert errno_of(lambda: rig.run(importer.pin(span))) == errno.EINVAL
    assert rig.mm.pinned_pages == 2, "its unit may be reading them"
    rig.end_lease("unit")
    assert rig.mm.pinned_pages == 0


def test_a_channel_that_closes_while_it_unregisters_leaves_once(rig: Listed) -> None:
    importer = rig.new_importer("unit")
    asked, closed = (rig.start(importer.unregister()) for _ in range(2))
    assert (asked.done, closed.done) == (False, True)
    rig.end_lease("unit")
    assert asked.done
    assert rig.tdp.leases == []


class Dying(SlowImporter):
    """It hangs up on what it is told."""

    def __init__(self, lease: HandLease) -> None:
        super().__init__()
        self.lease = lease

    def invalidate(self, start: int, size: int, epoch: int) -> Wait[None]:
        acked = super().invalidate(start, size, epoch)
        ack_with_lease(self.lease, acked)
        return acked


def test_the_ack_of_an_importer_that_died_is_the_end_of_its_lease(rig: Listed) -> None:
    """I13: its unit may still walk the entry, and its device write to the frame."""
    importer, lease = Importer(rig.tdp), HandLease()
    importer.register("dying", 77, Dying(lease), lease)
    rig.fault(importer)
    pfn = rig.run(rig.mm.fault_in(rig.hva, write=True)).pfn
    tag = rig.bare.tags.read(pfn)
    left, taken = rig.start(importer.unregister()), rig.give_up()
    assert not taken.done
    assert rig.bare.tags.read(pfn) == tag, "given up behind a walker"
    lease.ended.set(None)
    rig.flows.run_ready()
    assert (left.done, taken.done) == (True, True)
    assert rig.bare.tags.read(pfn) != tag


# -- the last close of a TDP FD --------------------------------------------------------------------------


def closes_last(rig: Listed) -> None:
    rig.new_importer("unit")
    released = rig.start(rig.tdp.release())
    rig.new_importer("late")
    rig.end_lease("unit")
    assert rig.vm.exports.tdps, "a walker that came meanwhile still has its lease"
    rig.end_lease("late")
    assert released.done
    assert rig.vm.exports.tdps == {}


def test_a_close_waits_for_who_registered_while_it_waited(rig: Listed) -> None:
    closes_last(rig)


def test_a_close_that_waits_only_for_the_leases_it_found_is_noticed(rig: Listed, plant: Plants) -> None:
    plant("R28-one-look-at-leases")
    with pytest.raises(AssertionError, match="still has its lease"):
        closes_last(rig)


def test_nothing_is_asked_of_a_tdp_fd_that_is_gone(rig: Listed) -> None:
    importer = rig.new_importer("unit")
    released = rig.start(rig.tdp.release())
    rig.end_lease("unit")
    assert released.done
    assert errno_of(importer.metadata) == errno.ENODEV
    assert errno_of(lambda: rig.fault(importer)) == errno.ENODEV
    assert errno_of(lambda: rig.new_importer("late")) == errno.ENODEV
    assert rig.tdp.leases == [rig.leases["unit"]], "it has not unregistered, and has nothing to walk"


def test_an_export_ends_once(rig: Listed) -> None:
    rig.run(rig.tdp.release())
    with pytest.raises(AssertionError, match="CLOSE happened to one that is RELEASED"):
        rig.tdp.exported.happens(ExportEvent.CLOSE)


# -- what keeps a VM -------------------------------------------------------------------------------------


def test_a_tdp_fd_keeps_its_vm_and_the_last_user_ends_it_and_its_process(rig: Listed) -> None:
    assert rig.users.count == 2
    rig.users.put()
    rig.run(rig.host.exit_mm(rig.mm))
    assert (list(rig.vms), rig.gone) == ([rig.vm], [])
    assert rig.host.processes == [rig.mm], "its VM is told of its memory"
    rig.run(rig.tdp.release())
    assert (list(rig.vms), rig.gone) == ([], [rig.vm])
    assert rig.host.pool.in_use == 0


def test_a_request_in_progress_keeps_the_vm_it_was_asked_of(rig: Listed) -> None:
    importer = rig.new_importer("unit")
    rig.fault(importer)
    taken = rig.give_up()
    fault = rig.start(importer.fault(77, Gfn(BASE), WRITE))
    assert not fault.done, "the page is being taken"
    rig.users.put()
    rig.leases["unit"].ended.set(None)
    rig.start(rig.tdp.release())
    assert list(rig.vms) == [rig.vm]
    rig.ack(rig.ops["unit"])
    assert (taken.done, fault.done) == (True, True)
    assert rig.gone == [rig.vm]


def test_a_channel_that_outlives_the_vm_is_told_that_it_is_gone(rig: Listed) -> None:
    """It keeps neither the TDP FD nor the VM, and may ask after both (B-36)."""
    importer = rig.new_importer("unit")
    name = rig.run(importer.pin(GfnSpan.of_pages(Gfn(BASE), 1)))
    rig.end_lease("unit")
    rig.users.put()
    rig.run(rig.tdp.release())
    assert rig.gone == [rig.vm]
    assert errno_of(lambda: rig.fault(importer)) == errno.ENODEV
    assert errno_of(lambda: rig.run(importer.pin(GfnSpan.of_pages(Gfn(BASE), 1)))) == errno.ENODEV
    assert errno_of(lambda: rig.run(importer.pin_all())) == errno.ENODEV
    assert errno_of(lambda: rig.run(importer.unpin(name))) == errno.ENODEV
    rig.run(importer.unregister())


def test_a_vm_put_more_often_than_it_was_got_is_an_error() -> None:
    users = VmUsers(lambda: None)
    users.put()
    with pytest.raises(AssertionError, match="more often than it was got"):
        users.put()
    with pytest.raises(AssertionError, match="nobody keeps this VM"):
        users.get()


# -- a vCPU is used by one at a time ---------------------------------------------------------------------


def test_a_vcpu_that_runs_is_busy_and_runs_on_undisturbed(rig: Listed) -> None:
    importer = rig.new_importer("unit")
    rig.fault(importer)
    rig.give_up()
    run = rig.start(rig.vcpu.run([("r", BASE * PAGE, 4)]))
    assert not run.done, "its page is being taken"
    assert errno_of(lambda: rig.run(rig.vcpu.run([("w", BASE * PAGE, b"x")]))) == errno.EBUSY
    assert errno_of(lambda: rig.run(rig.vcpu.run(None))) == errno.EBUSY
    ahead = pre_fault_memory(rig.vcpu, rig.vm.fault_path, Gpa(BASE * PAGE), PAGE, 0)
    assert errno_of(lambda: rig.run(ahead)) == errno.EBUSY
    rig.ack(rig.ops["unit"])
    assert run.result().reads == [bytes(4)]
    assert rig.guest_read(rig.vcpu, BASE * PAGE, 2).reads == [bytes(2)]


def test_a_vcpu_that_faults_ahead_does_not_run(rig: Listed) -> None:
    importer = rig.new_importer("unit")
    rig.fault(importer)
    rig.give_up()
    ahead = rig.start(pre_fault_memory(rig.vcpu, rig.vm.fault_path, Gpa(BASE * PAGE), PAGE, 0))
    assert errno_of(lambda: rig.run(rig.vcpu.run(None))) == errno.EBUSY
    rig.ack(rig.ops["unit"])
    assert ahead.result() == (BASE * PAGE + PAGE, 0)
    assert not rig.vcpu.running


def test_a_vm_is_not_destroyed_under_a_vcpu_that_runs(rig: Listed) -> None:
    """What `VmUsers.holding` is for: without it the last close would take the tables it walks."""
    importer = rig.new_importer("unit")
    rig.fault(importer)
    rig.give_up()
    run = rig.start(rig.vcpu.run([("r", BASE * PAGE, 4)]))
    rig.start(rig.tdp.release())
    rig.end_lease("unit")
    assert not run.done
    with pytest.raises(AssertionError, match="a vCPU that runs keeps its VM"):
        rig.run(rig.vm.destroy())
