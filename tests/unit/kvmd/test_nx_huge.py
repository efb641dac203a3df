"""No execution from huge pages: who is split, who stays huge, and what recovery may take."""

from __future__ import annotations

import pytest

from kvmd.core.faults.page_fault import FaultResult
from kvmd.core.host import CpuFeatures
from kvmd.core.invariants import check_vm
from kvmd.core.tables.root_policy import RootBehaviour
from protocol.pt import bits
from tests.kit.lent import Lent
from tests.oracle.table import second_stage_walk
from tests.unit.kvmd.sources import GFN, MACHINE, Used

OTHER = GFN + 7


def switched(*, on: bool = True, features: CpuFeatures | None = None) -> Used:
    rig = Used("huge", features=features)
    over = rig.start(rig.vm.nx_huge.switch(on=on))
    rig.ack_all()
    assert over.done
    return rig


def execute(rig: Used, gfn: int = GFN) -> bool:
    return rig.run(rig.cpu.run([("exec", gfn << 12)])).done


def test_a_device_gets_a_huge_leaf_that_no_cpu_may_execute() -> None:
    rig = switched()
    assert rig.io_fault(rig.exported, GFN) is FaultResult.FIXED
    assert rig.entry() & (bits.PAGE_SIZE_BIT | bits.RWX) == bits.PAGE_SIZE_BIT | bits.READ | bits.WRITE
    found = second_stage_walk(rig.raw, MACHINE, int(rig.exported.meta.root_hpa), 4, GFN << 12)
    assert found.kind == "mapped"
    assert check_vm(rig.vm) == []


@pytest.mark.parametrize("ad_bits", [True, False])
def test_a_fetch_splits_and_no_other_fault_makes_the_leaf_huge_again(ad_bits: bool) -> None:
    rig = switched(features=CpuFeatures(ept_ad_bits=ad_bits))
    rig.io_fault(rig.exported, GFN)
    assert execute(rig)
    assert rig.entry() & (bits.PAGE_SIZE_BIT | bits.EXEC) == bits.EXEC
    assert rig.entry(OTHER) & (bits.PAGE_SIZE_BIT | bits.RWX) == bits.RWX, "split with it"
    heard = len(rig.importer.heard)
    assert rig.io_fault(rig.exported, OTHER) is FaultResult.SPURIOUS
    assert execute(rig, OTHER)
    assert len(rig.importer.heard) == heard, "only rights were added: nobody has to be told"
    assert check_vm(rig.vm) == []


def test_recovery_gives_the_huge_leaf_back_and_a_slot_that_logs_keeps_its_tables() -> None:
    rig = switched()
    assert execute(rig)
    for flags, zapped in ((1, 0), (0, 0)):
        rig.start(rig.vm.slots_change.set_memory_region(rig.region(0, GFN, 512, rig.hva, flags)))
        rig.ack_all()
        over = rig.start(rig.vm.nx_huge.recover())
        rig.ack_all()
        assert over.result() == zapped, "logging: kept; after it: the collapse took the table already"
    assert execute(rig)
    over = rig.start(rig.vm.nx_huge.recover())
    rig.ack_all()
    assert over.result() == 1
    assert rig.io_fault(rig.exported, OTHER) is FaultResult.FIXED
    assert rig.entry(OTHER) & bits.PAGE_SIZE_BIT
    assert check_vm(rig.vm) == []


def test_recovery_does_not_look_into_a_root_that_goes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that went left the CPUs' root obsolete; its page is a table of the next one by now."""
    monkeypatch.setattr("kvmd.core.faults.nx_huge.RECOVERY_BATCH", 1)
    rig = Lent(0x400, 3 << 9, level=2, policy=(RootBehaviour.TOLD_ALL, 0))
    rig.do(rig.vm.nx_huge.switch(on=True))
    for region in range(3):
        assert rig.run(rig.vcpu.run([("exec", 0x400 + (region << 9) << 12)])).done
    rig.change_slot(1, 0x10000, 1, rig.map(1))
    rig.change_slot(2, 0x20000, 1, rig.map(1))
    rig.change_slot(2, 0, 0, 0)
    over = rig.start(rig.vm.nx_huge.recover())
    rig.guest_read(rig.vcpu, 0x400 << 12, 1)
    while rig.importer.pending:
        rig.ack(rig.importer)
        rig.guest_write(rig.vcpu, 0x10000 << 12, b"x")
    assert over.result() == 0
    assert rig.sound()


def test_switched_off_a_huge_leaf_is_executable_again() -> None:
    rig = switched()
    over = rig.start(rig.vm.nx_huge.switch(on=False))
    rig.ack_all()
    assert over.done
    assert execute(rig)
    assert rig.entry() & (bits.PAGE_SIZE_BIT | bits.EXEC) == bits.PAGE_SIZE_BIT | bits.EXEC
