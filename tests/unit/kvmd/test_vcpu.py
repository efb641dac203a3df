"""vCPU accesses: what the guest reads, when it faults, and how it leaves to user space."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.cpu import cpu as cpu_module
from kvmd.core.host import CpuFeatures
from kvmd.core.mm.vma import Prot
from kvmd.core.tables import tdp_mmu
from protocol.errors import UapiError
from protocol.kvm_run import ExitReason
from protocol.units import Gfn, GfnSpan, Hpa, Hva, Level
from tests.kit.kvmd import World
from tests.kit.lent import Backed

PAGE = 4096


@pytest.fixture
def world() -> World:
    return Backed(0x100, 16)


def test_the_guest_reads_what_the_process_wrote_and_the_other_way_round(world: World) -> None:
    vcpu, hva = world.vm.vcpus[0], world.vm.slots.find(Gfn(0x100))
    assert hva is not None
    world.run(world.mm.write(Hva(hva.hva + 5000), b"from the process"))
    assert world.guest_read(vcpu, 0x10_0000 + 5000, 16).reads == [b"from the process"]
    world.guest_write(vcpu, 0x10_0000 + 4090, b"across a page")
    assert world.run(world.mm.read(Hva(hva.hva + 4090), 13)) == b"across a page"


def test_one_violation_a_page_and_none_once_mapped(world: World) -> None:
    vcpu = world.vm.vcpus[0]
    hva = next(iter(world.vm.slots)).hva
    world.run(world.mm.write(hva, b"the process's own by now" + bytes(3 * PAGE - 24)))
    world.guest_read(vcpu, 0x10_0000, 3 * PAGE)
    assert vcpu.arch.ept_violations == 3
    world.guest_write(vcpu, 0x10_0000, b"x" * 3 * PAGE)
    assert vcpu.arch.ept_violations == 3, "a writable page is mapped writable at once"
    world.guest_read(world.create_vcpu(1), 0x10_0000, 3 * PAGE)
    assert world.vm.vcpus[1].arch.ept_violations == 0, "the other vCPU runs on the same root"


@pytest.mark.parametrize("gpa", [0, 0xF_F000, 0x11_0000, (1 << 46) - 8, 1 << 46, 1 << 52, (1 << 64) - 8])
@pytest.mark.parametrize("write", [False, True])
def test_an_access_without_a_slot_leaves_as_mmio(world: World, gpa: int, write: bool) -> None:
    vcpu = world.vm.vcpus[0]
    result = world.guest_write(vcpu, gpa, b"x" * 8) if write else world.guest_read(vcpu, gpa, 8)
    assert (result.exit.reason, result.done, result.reads) == (ExitReason.MMIO, False, [])
    assert result.exit.mmio == (gpa, 8, write, b"x" * 8 if write else b"")


@pytest.mark.parametrize("levels", [4, 5])
def test_address_bits_the_walk_does_not_see_are_not_ignored(levels: int) -> None:
    """Bit 48 on a 4-level root must not alias to the page without it."""
    world = World(CpuFeatures(maxphyaddr=52, ept_levels=levels))
    world.set_slot(0, 0x100, 16, world.map(16))
    vcpu = world.create_vcpu(maxphyaddr=52)
    world.guest_write(vcpu, 0x10_0000, b"secret")
    for high in (48, 51, 57, 63):
        gpa = 0x10_0000 | 1 << high
        assert world.guest_read(vcpu, gpa, 6).exit.reason is ExitReason.MMIO
    world.set_slot(1, (1 << 36) + 0x100, 1, world.map(1))
    result = world.guest_read(vcpu, 0x10_0000 | 1 << 48, 6)
    assert result.exit.reason is (ExitReason.MMIO if levels == 4 else ExitReason.IO)
    assert b"secret" not in result.reads
    assert world.guest_read(vcpu, 0x10_0000, 6).reads == [b"secret"]


def test_an_exit_tells_what_was_done_before_it(world: World) -> None:
    vcpu = world.vm.vcpus[0]
    program = [
        ("w", 0x10_0000, b"done"),
        ("r", 0x10_0000, 4),
        ("w", 0x10_FFFC, b"halfhalf"),
        ("w", 0x10_0000, b"not!"),
    ]
    result = world.run(vcpu.run(program))
    assert (result.done, result.finished, result.reads) == (False, 2, [b"done"])
    assert result.exit.mmio == (0x11_0000, 4, True, b"half")
    assert world.guest_read(vcpu, 0x10_0000, 4).reads == [b"done"]
    assert world.guest_read(vcpu, 0x10_FFFC, 4).reads == [b"half"]


def test_a_write_to_a_read_only_slot_leaves_as_mmio_and_writes_nothing(world: World) -> None:
    vcpu = world.vm.vcpus[0]
    hva = world.map(1)
    world.run(world.mm.write(hva, b"rom"))
    world.set_slot(1, 0x200, 1, hva, flags=2)
    assert world.guest_read(vcpu, 0x20_0000, 3).reads == [b"rom"]
    assert world.guest_write(vcpu, 0x20_0000, b"ram").exit.reason is ExitReason.MMIO
    assert world.run(world.mm.read(hva, 3)) == b"rom"


@pytest.mark.parametrize(("prot", "write"), [(Prot.NONE, False), (Prot.READ, True)])
def test_what_the_host_forbids_is_efault(world: World, prot: Prot, write: bool) -> None:
    vcpu = world.vm.vcpus[0]
    world.set_slot(1, 0x200, 1, world.map(1, prot=prot))
    result = world.guest_write(vcpu, 0x20_0000, b"x") if write else world.guest_read(vcpu, 0x20_0000, 1)
    assert (result.exit.errno, result.finished) == (errno.EFAULT, 0)


def test_a_host_without_frames_is_enomem() -> None:
    world = World()
    world.run(world.mm.fault_in(world.map(1, 3), write=True))
    world.set_slot(0, 0, 1, world.map(1))
    assert world.guest_read(world.create_vcpu(), 0, 1).exit.errno == errno.ENOMEM


def test_a_host_without_table_pages_is_enomem_and_counted() -> None:
    world = World(tables=3 * PAGE)
    world.set_slot(0, 0, 1, world.map(1))
    assert world.guest_read(world.create_vcpu(), 0, 1).exit.errno == errno.ENOMEM
    assert sum(world.vm.fault_path.faults.values()) == 1


# -- the TLB -------------------------------------------------------------------------------------------


def test_a_flush_forgets_its_span_and_nothing_else(world: World) -> None:
    vcpu = world.vm.vcpus[0]
    world.guest_read(vcpu, 0x10_0000, 16 * PAGE)
    tdp_mmu.zap_leafs(world.vm.mmu, GfnSpan(Gfn(0), Gfn(1 << 36)))
    vcpu.flush_tlb(GfnSpan(Gfn(0x103), Gfn(0x105)))
    before = vcpu.arch.ept_violations
    world.guest_read(vcpu, 0x10_0000, 3 * PAGE)
    world.guest_read(vcpu, 0x10_5000, PAGE)
    assert vcpu.arch.ept_violations == before, "those are still in the TLB"
    world.guest_read(vcpu, 0x10_3000, 2 * PAGE)
    assert vcpu.arch.ept_violations == before + 2
    vcpu.flush_tlb(None)
    world.guest_read(vcpu, 0x10_0000, PAGE)
    assert vcpu.arch.ept_violations == before + 3


def test_a_tlb_that_is_full_starts_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_module, "MAX_TLB_ENTRIES", 4)
    vcpu = world.vm.vcpus[0]
    for i in range(16):
        world.guest_write(vcpu, 0x10_0000 + i * PAGE, bytes([i]))
        assert len(vcpu._cpus[0].tlb) <= 4
    assert [world.guest_read(vcpu, 0x10_0000 + i * PAGE, 1).reads for i in range(16)] == [
        [bytes([i])] for i in range(16)
    ]


def test_vcpus_of_different_width_run_on_their_own_roots() -> None:
    """Defect B-28: one that needs 5 levels beside one that needs 4, exported or not."""
    world = World(CpuFeatures(maxphyaddr=52, ept_levels=5))
    world.set_slot(0, 0x100, 2, world.map(2))
    narrow, wide = world.create_vcpu(0, 46), world.create_vcpu(1, 52)
    world.guest_write(wide, 0x10_0000, b"wide")
    assert world.guest_read(narrow, 0x10_0000, 4).reads == [b"wide"]
    assert narrow.arch.roots[0] is not None
    assert wide.arch.roots[0] is not None
    assert (narrow.arch.roots[0].role.level, wide.arch.roots[0].role.level) == (4, 5)
    exported = world.export()
    assert exported.root is narrow.arch.roots[0]
    world.guest_write(wide, 0x10_1000, b"more")
    assert world.guest_read(narrow, 0x10_1000, 4).reads == [b"more"]


# -- creation ------------------------------------------------------------------------------------------


def test_vcpu_ids_are_checked(world: World) -> None:
    for vcpu_id, number in ((0, errno.EEXIST), (-1, errno.EINVAL), (4096, errno.EINVAL)):
        with pytest.raises(UapiError) as caught:
            world.vm.vcpus.create(vcpu_id)
        assert caught.value.errno == number
    world.vm.vcpus.create(1023)


@pytest.mark.parametrize("width", [0, 31, 47, 53])
def test_a_guest_is_no_wider_than_its_host_and_no_narrower_than_32(world: World, width: int) -> None:
    with pytest.raises(UapiError) as caught:
        world.vm.set_maxphyaddr(world.vm.vcpus[0], width)
    assert caught.value.errno == errno.EINVAL


def test_the_width_of_a_vcpu_that_ran_is_fixed(world: World) -> None:
    world.guest_read(world.vm.vcpus[0], 0x10_0000, 1)
    with pytest.raises(UapiError):
        world.vm.set_maxphyaddr(world.vm.vcpus[0], 40)


@pytest.mark.rfc("RFC-23")
@pytest.mark.parametrize(
    ("levels", "width", "level"), [(4, 46, 4), (4, 52, 4), (5, 48, 4), (5, 49, 5), (5, 52, 5)]
)
def test_five_levels_only_for_guests_wider_than_48_bits(levels: int, width: int, level: int) -> None:
    features = CpuFeatures(maxphyaddr=52, ept_levels=levels, max_page_level=Level(3))
    assert features.root_level(width) == level


def test_a_vcpu_whose_new_root_cannot_be_made_has_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its old one became obsolete with a slot, and is put once: by the vCPU, not by the VM's end again."""
    vcpu, pool = world.vm.vcpus[0], world.host.pool
    world.guest_write(vcpu, 0x10_0000, b"its root is there")
    world.set_slot(1, 0x800, 1, world.map(1))
    world.set_slot(1, 0x800, 0, 0)
    obsolete = vcpu.arch.roots[0]
    assert obsolete is not None
    assert obsolete.invalid

    def is_empty() -> Hpa:
        raise UapiError(errno.ENOMEM, "no page for a root")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "allocate", is_empty)
        with pytest.raises(UapiError, match="no page for a root"):
            world.guest_read(vcpu, 0x10_0000, 1)
    assert vcpu.arch.roots == [None, None]
    assert obsolete.refs == 0
    assert world.guest_read(vcpu, 0x10_0000, 17).reads == [b"its root is there"]
