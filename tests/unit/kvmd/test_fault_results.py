"""How a fault ends, for a CPU and for a device: poison, frozen entries, other address spaces."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmd.core.export.tdp_fd import CreateTdpFd
from kvmd.core.faults.page_fault import IO_ERRNO, RESOLVED, FaultResult
from kvmd.core.invariants import check_vm
from kvmd.core.mm.fault import FaultCounts
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.page import MappedPage
from protocol.errors import EHWPOISON, UapiError
from protocol.kvm_run import ExitReason
from protocol.pt import bits
from protocol.pt.geometry import ENTRY_BYTES, index_of
from protocol.pt.walk import walk
from protocol.units import Gfn, Hva
from tests.kit.kvmd import READ, WRITE, World
from tests.kit.lent import Lent

RAM, PAGE = 0x10_0000, 4096
SMRAM = 1 << 16 | 3  # slot 3 of address space 1


class Scarce(Lent):
    """16 pages at gfn 0x100, of which some turn out not to be had."""

    def __init__(self) -> None:
        super().__init__(RAM >> 12, 16)

    def smm(self, gpa: int, size: int = 1) -> Any:
        return self.run(self.vcpu.run([("r", gpa, size)], smm=True))


class PoisonedMm:
    """The process's memory, of which the page at `hva` has failed."""

    def __init__(self, world: World, hva: Hva) -> None:
        self._mm = world.mm
        self._hva = hva
        self.lookups = 0

    async def get_user_page(self, hva: Hva, *, write: bool, tally: FaultCounts | None = None) -> MappedPage:
        self.lookups += 1
        if hva == self._hva:
            raise UapiError(EHWPOISON, f"hva {hva:#x}: its memory has failed")
        return await self._mm.get_user_page(hva, write=write, tally=tally)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mm, name)


@pytest.mark.rfc("RFC-80")
@pytest.mark.defect("B-14")
def test_poison_fails_a_device_after_one_look_and_signals_a_cpu() -> None:
    """The series retried for ever, and sent the signal to a kernel thread."""
    guest = Scarce()
    poisoned = PoisonedMm(guest, Hva(guest.hva + PAGE))
    guest.vm.mm = guest.vm.frames.mm = poisoned  # type: ignore[assignment]
    assert guest.io_fault(guest.exported, 0x101) is FaultResult.HWPOISON
    assert poisoned.lookups == 1
    assert IO_ERRNO[FaultResult.HWPOISON] not in (errno.EFAULT, errno.EINVAL), "more than this page is wrong"
    for _ in range(2):
        ran = guest.guest_read(guest.vcpu, RAM + PAGE, 1)
        assert (ran.exit.reason, ran.exit.errno) == (ExitReason.INTR, errno.EINTR)
        assert ran.exit.sigbus == guest.hva + PAGE
    assert guest.guest_write(guest.vcpu, RAM, b"x").done, "the page beside it is well"
    assert set(guest.table()) == {0x100}


@pytest.mark.rfc("RFC-78")
def test_a_frozen_entry_is_retried_and_never_stored_over() -> None:
    guest = Scarce()
    guest.io_fault(guest.exported, 0x100)
    writer, root = guest.host.writer, guest.exported.root
    found = walk(writer, guest.host.ept_rules, root.hpa, root.role.level, RAM)
    at = found.table + index_of(Gfn(0x101), found.level) * ENTRY_BYTES
    writer.store64(at, bits.FROZEN)
    assert guest.io_fault(guest.exported, 0x101) is FaultResult.UNSTABLE
    assert guest.vm.fault_path.retries == 64
    assert writer.load64(at) == bits.FROZEN
    guest.bare.clock.stock = 3
    store = guest.start(guest.vcpu.run([("w", RAM + PAGE, b"x")]))
    assert not store.done, "a CPU just tries again, and lets others run in between"
    writer.store64(at, bits.EMPTY)
    guest.bare.clock.waiting.pop().set(None)
    guest.flows.run_ready()
    assert store.result().done
    assert guest.io_fault(guest.exported, 0x101) is FaultResult.SPURIOUS


@pytest.mark.rfc("RFC-79")
@pytest.mark.defect("B-13")
def test_a_page_somebody_else_mapped_first_is_success() -> None:
    guest = Scarce()
    guest.guest_write(guest.vcpu, RAM, b"x")
    for kind in (READ, WRITE):
        assert guest.io_fault(guest.exported, 0x100, kind) is FaultResult.SPURIOUS
    assert FaultResult.SPURIOUS in RESOLVED


@pytest.mark.parametrize("result", [result for result in FaultResult if result not in RESOLVED])
def test_every_failure_of_a_device_s_fault_has_an_errno(result: FaultResult) -> None:
    about_page = {
        FaultResult.NO_SLOT,
        FaultResult.READONLY,
        FaultResult.NO_PAGE,
        FaultResult.TRACKED,
        FaultResult.MEMORY_FAULT,
    }
    assert (IO_ERRNO[result] in (errno.EFAULT, errno.EINVAL)) == (result in about_page)


# -- system-management mode ----------------------------------------------------------------------------


@pytest.mark.rfc("RFC-05", "RFC-89", "RFC-96")
def test_smm_runs_beside_a_lent_root_that_never_sees_it() -> None:
    guest = Scarce()
    world, smram = guest, guest.map(4)
    world.run(world.mm.write(smram, b"smm"))
    world.set_slot(SMRAM, 0x100, 4, smram)
    root = guest.exported.root.hpa
    assert guest.smm(RAM, 3).reads == [b"smm"]
    assert world.table(root) == {}, "nothing of it in the table that a device walks"
    smm = guest.vcpu.arch.roots[1]
    assert smm is not None
    assert smm.hpa != root
    with pytest.raises(UapiError) as caught:
        world.run(world.vm.exports.create(CreateTdpFd(1, 0, 0)))
    assert caught.value.errno == errno.EINVAL

    heard = len(guest.importer.heard)
    guest.do(dontneed(world.mm, smram, PAGE))
    assert len(guest.importer.heard) == heard + 1, "importers hear of flushes other roots caused"
    assert guest.smm(RAM, 3).reads == [bytes(3)]

    world.guest_write(guest.vcpu, RAM, b"x")
    guest.do(world.vm.slots_change.set_memory_region(world.region(0, 0, 0, 0)))
    assert (smm.invalid, guest.exported.root.invalid) == (True, False)
    assert guest.smm(RAM, 3).reads == [bytes(3)]
    assert guest.vcpu.arch.roots[1] is not smm
    assert guest.exported.root.hpa == root
    assert check_vm(world.vm) == []


def test_leaving_smm_does_not_take_its_translations_along() -> None:
    guest = Scarce()
    guest.set_slot(SMRAM, 0x100, 4, guest.map(4))
    for _ in range(2):
        assert guest.run(guest.vcpu.run([("w", RAM, b"s")], smm=True)).done
        assert guest.guest_write(guest.vcpu, RAM, b"n").done
    assert guest.smm(RAM).reads == [b"s"]
    assert guest.guest_read(guest.vcpu, RAM, 1).reads == [b"n"]
    assert guest.vcpu.arch.ept_violations == 2
