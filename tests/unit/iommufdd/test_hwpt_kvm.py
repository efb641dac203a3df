"""The KVM HWPT between a KVM and a unit that answer late, or not at all."""

from __future__ import annotations

import errno
import struct

import pytest

from iommufdd.core import qi
from protocol.errors import UapiError
from protocol.flow import Wait
from protocol.hw.caps import Ecap
from protocol.hw.prq import PageRequest
from protocol.hw.qi import Descriptor
from protocol.units import WHOLE_SIZE, Gpa, Iova
from tests.kit.iommufdd import CAP, DID, ECAP, GONE, RID, Surroundings

SUCCESS, INVALID, FAILURE = 0, 1, 0xF


def request(addr: int, rights: str = "r") -> PageRequest:
    return PageRequest(
        rid=RID,
        prgi=0,
        addr=Iova(addr),
        last=True,
        read="r" in rights,
        write="w" in rights,
        exec="x" in rights,
    )


@pytest.mark.parametrize("rights", ["r", "w", "rw", "x", "rwx"])
@pytest.mark.parametrize(
    ("addr", "gfn"), [(0, 0), (0x1234_5000, 0x12345), ((1 << 48) - 0x1000, (1 << 36) - 1)]
)
def test_a_page_request_is_a_fault_on_its_gfn_with_its_rights(rights: str, addr: int, gfn: int) -> None:
    world = Surroundings()
    assert world.run(world.hwpt().fault(request(addr, rights))) == SUCCESS
    assert world.log == [("fault", gfn, rights)]


@pytest.mark.defect("B-37")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EFAULT, INVALID),
        (errno.EINVAL, INVALID),
        (errno.EPERM, FAILURE),
        (errno.ENODEV, FAILURE),
        (errno.ENOMEM, FAILURE),
        (errno.EIO, FAILURE),
    ],
)
def test_what_kvm_says_becomes_invalid_for_this_page_and_failure_for_more(number: int, code: int) -> None:
    """B-37: every error was Failure, with which a device's page requests end for good."""
    world = Surroundings()
    hwpt = world.hwpt()
    world.fault_errno = number
    assert world.run(hwpt.fault(request(0x5000))) == code
    world.fault_errno = 0
    assert world.run(hwpt.fault(request(0x5000))) == SUCCESS
    assert {int(code): n for code, n in hwpt.faults.items()} == {SUCCESS: 1, code: 1}


@pytest.mark.rfc("RFC-85")
@pytest.mark.defect("B-31")
@pytest.mark.parametrize(
    ("level", "addr", "asked"),
    [
        (4, 1 << 48, False),
        (4, (1 << 64) - 0x1000, False),
        (4, 1 << 47, True),
        (5, 1 << 48, True),
        (5, 1 << 56, True),
        (5, 1 << 57, False),
    ],
)
def test_an_address_beyond_the_domain_is_invalid_without_asking_kvm(
    level: int, addr: int, asked: bool
) -> None:
    """B-31: the upper half of a CPU's addresses is none of the guest's concern: no canonicality."""
    world = Surroundings()
    code = world.run(world.hwpt(level).fault(request(addr)))
    assert code == (SUCCESS if asked else INVALID)
    assert bool(world.log) is asked


@pytest.mark.rfc("RFC-88")
def test_a_range_goes_to_every_function_under_the_domains_id() -> None:
    world = Surroundings()
    hwpt = world.hwpt(did=7)
    hwpt.attached = {RID: world, RID + 8: world}
    world.run(hwpt.invalidate(Gpa(0x5000), 0x1000, 1))
    ((_, raw),) = world.log
    assert struct.unpack("<16Q", raw) == (
        *(2 | 3 << 4 | 3 << 6 | 7 << 16, 0x5000, 0, 0),
        *(3 | RID << 32, 0x5000, 0, 0),
        *(3 | RID + 8 << 32, 0x5000, 0, 0),
        *(5 | 1 << 5 | 1 << 6 | 2 << 32, 0, 0, 0),
    )


def test_each_unit_is_told_of_its_own_functions_and_one_without_any_of_nothing() -> None:
    near, far, idle = Surroundings(), Surroundings(), Surroundings()
    hwpt = near.hwpt(did=7)
    hwpt.attached = {RID: near, RID + 8: far, RID + 16: near}
    near.run(hwpt.invalidate(Gpa(0), WHOLE_SIZE, 1))
    told = [
        [qw0 & 0xF for qw0 in struct.unpack("<" + "Q24x" * (len(raw) // 32), raw)]
        for raw in (near.log[0][1], far.log[0][1])
    ]
    assert told == [[2, 3, 3, 5], [2, 3, 5]]
    assert idle.log == []


def test_a_unit_without_device_tlbs_is_sent_no_descriptor_for_them() -> None:
    world = Surroundings(ecap=Ecap(ECAP.value & ~(1 << 2)))
    hwpt = world.hwpt()
    hwpt.attached[RID] = world
    world.run(hwpt.invalidate(Gpa(0x5000), 0x1000, 1))
    assert len(world.log[0][1]) == 2 * 32


@pytest.mark.rfc("RFC-94")
def test_an_invalidation_is_acked_only_after_the_wait_completed() -> None:
    world = Surroundings()
    hwpt = world.hwpt()
    hwpt.attached[RID] = world
    world.hold()
    acked = world.start(hwpt.invalidate(Gpa(0), WHOLE_SIZE, 4))
    assert (acked.done, hwpt.acked_epoch, len(world.log)) == (False, 0, 1)
    world.let_go()
    assert (acked.done, hwpt.acked_epoch) == (True, 4)


def test_acks_that_overtake_each_other_keep_the_latest_epoch() -> None:
    world = Surroundings()
    hwpt = world.hwpt()
    hwpt.attached[RID] = world
    world.hold()
    first = world.start(hwpt.invalidate(Gpa(0), 0x1000, 4))
    second = world.start(hwpt.invalidate(Gpa(0x1000), 0x1000, 5))
    assert world.held is not None
    world.held.reverse()
    world.let_go()
    assert first.done
    assert second.done
    assert (hwpt.acked_epoch, hwpt.invalidations) == (5, 2)


def test_a_unit_that_is_gone_caches_nothing_so_the_ack_may_go() -> None:
    world = Surroundings()
    hwpt = world.hwpt()
    hwpt.attached[RID] = world
    world.fails.after(0, GONE)
    world.run(hwpt.invalidate(Gpa(0), 0x1000, 3))
    assert hwpt.acked_epoch == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_an_invalidation_the_unit_refused_is_never_acked(number: int) -> None:
    world = Surroundings()
    hwpt = world.hwpt()
    hwpt.attached[RID] = world
    world.fails.after(0, number)
    refused = world.start(hwpt.invalidate(Gpa(0), 0x1000, 3))
    with pytest.raises(UapiError):
        refused.result()
    assert hwpt.acked_epoch == 0


@pytest.mark.rfc("RFC-101")
@pytest.mark.defect("B-10", "B-11")
def test_destruction_unmaps_then_unregisters_then_drops_the_reference() -> None:
    """B-10: the domain went first; B-11: that KVM offers no unregister was never noticed."""
    world = Surroundings()
    hwpt = world.hwpt()
    hwpt.memory = 9
    world.run(hwpt.destroy())
    assert world.log == [("remove_memory", 9), ("unregister",), ("release",)]


def test_destruction_waits_for_the_unit_before_it_lets_go_of_the_table() -> None:
    world = Surroundings()
    hwpt = world.hwpt()
    hwpt.memory = 9
    world.hold()
    destroyed = world.start(hwpt.destroy())
    assert [what for what, *_ in world.log] == ["remove_memory"]
    assert not destroyed.done


@pytest.mark.parametrize("calls", [0, 1])
def test_the_reference_is_dropped_even_if_the_unit_or_kvm_is_gone(calls: int) -> None:
    world = Surroundings()
    world.fails.after(calls, GONE)
    world.run(world.hwpt().destroy())
    assert world.log[-1] == ("release",)


def test_destroying_an_hwpt_in_use_is_a_bug() -> None:
    world = Surroundings()
    hwpt = world.hwpt()
    hwpt.attached[RID] = world
    with pytest.raises(AssertionError, match="1 functions attached"):
        world.run(hwpt.destroy())


@pytest.mark.rfc("RFC-90")
def test_everything_is_flushed_unit_by_unit_the_domain_before_every_device_tlb() -> None:
    """Two units, three functions, a third unit whose devices have no TLB; acked after the last wait."""
    world = Surroundings()
    no_dt = Ecap(ECAP.value & ~(1 << 2))
    units = [SlowUnit(world, "a"), SlowUnit(world, "b"), SlowUnit(world, "c", no_dt)]
    hwpt = world.hwpt()
    behind = [(RID, units[0]), (RID + 8, units[0]), (RID + 16, units[1]), (RID + 24, units[2])]
    hwpt.attached.update(behind)  # type: ignore[arg-type]
    acked = world.start(hwpt.invalidate(Gpa(0), WHOLE_SIZE, 1))
    order = []
    while not acked.done:
        order += [(name, raw) for name, raw in world.log if name in "abc"]
        world.log.clear()
        held = [unit for unit in units if unit.held]
        assert len(held) == 1, "one unit at a time"
        held[0].held.pop().set(None)
        world.flows.run_ready()
    dsi, wait = 2 | 2 << 4 | 3 << 6 | DID << 16, 5 | 1 << 5 | 1 << 6 | 2 << 32
    tlb = [3 | rid << 32 for rid, _ in behind]
    assert [(name, [words[at] for at in range(0, len(words), 4)]) for name, words in order] == [
        ("a", [dsi, tlb[0], tlb[1], wait]),
        ("b", [dsi, tlb[2], wait]),
        ("c", [dsi, wait]),
    ]


class SlowUnit:
    """A remapping unit whose wait descriptor completes when the test says so."""

    def __init__(self, world: Surroundings, name: str, ecap: Ecap = ECAP) -> None:
        self.cap, self.ecap, self.name, self.held = CAP, ecap, name, list[Wait[None]]()
        self._log = world.log

    async def submit(self, descriptors: list[Descriptor]) -> None:
        raw = b"".join(qi.raw(descriptors))
        self._log.append((self.name, struct.unpack(f"<{len(raw) // 8}Q", raw)))
        wait: Wait[None] = Wait()
        self.held.append(wait)
        await wait
