"""Dumps and looks of a core in this process: what is chosen, what it must say, and that kvmd's bugs show."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest

from kvmd.core import inspect
from kvmd.core.host import CpuFeatures
from kvmd.core.inspect import Probe, describe, look_up, make_probes, root_of, table_runs
from kvmd.core.mm.madvise import dontneed
from kvmd.core.mm.vma import Prot
from kvmd.core.tables import tdp_mmu
from protocol.errors import UapiError
from protocol.hostmem import LOW_RAM_START
from protocol.pt import bits
from protocol.pt.walk import Outcome, Walk
from protocol.units import GIB, MIB, PAGE_SIZE, Gfn, GfnSpan, Gpa, Level
from tests.kit.kvmd import READ, World
from tests.oracle.table import Machine, RawTables, second_stage_walk


def wrong(world: World, probes: list[Probe]) -> list[Probe]:
    """Probes that a walk of the raw bytes does not find so."""
    root = root_of(world.vm)
    found = []
    for probe in probes:
        tables = RawTables(LOW_RAM_START, world.bare.tables)
        seen = second_stage_walk(tables, Machine(snoop_control=True), root.hpa, root.role.level, probe.gpa)
        hpa = seen.hpa if seen.kind == "mapped" else None
        if (hpa, bool(seen.rights & 1), bool(seen.rights & 2)) != probe[1:4]:
            found.append(probe)
    return found


def mapped(probes: list[Probe]) -> set[int]:
    return {probe.gpa >> 12 for probe in probes if probe.expect_hpa is not None}


@pytest.fixture
def world() -> World:
    made = World(tables=16 * MIB)
    made.set_slot(0, 0x100, 64, made.map(64))
    made.set_slot(1, 0x1000, 32, made.map(32, prot=Prot.READ), flags=2)
    made.set_slot(2, 0x20_0000, 512 * 4, made.map(4, level=2))
    exported = made.export()
    for gfn in (0x100, 0x101, 0x13F, 0x20_0003, 0x20_0400):
        made.io_fault(exported, gfn)
    made.io_fault(exported, 0x1005, READ)
    return made


def test_probes_say_what_a_walk_of_the_raw_bytes_finds(world: World) -> None:
    probes = make_probes(world.vm, root_of(world.vm), 4096)
    assert wrong(world, probes) == []
    huge = set(range(0x20_0000, 0x20_0200)) | set(range(0x20_0400, 0x20_0600))
    assert mapped(probes) - huge == {0x100, 0x101, 0x13F, 0x1005}
    assert len(mapped(probes) & huge) > 100
    by_gfn = {probe.gpa >> 12: probe for probe in probes}
    assert {0xFF, 0x140, 0xFFF, 0x1020, 0x1F_FFFF, 0x20_0800} <= by_gfn.keys()  # just outside each slot
    assert not by_gfn[0x1005].writable
    assert by_gfn[0x20_0003].page_size == 2 * MIB
    assert (1 << 36) - 1 in by_gfn


@pytest.mark.parametrize("count", [1, 7, 100, 4096])
def test_there_are_at_most_as_many_probes_as_asked_in_order_each_once(world: World, count: int) -> None:
    probes = make_probes(world.vm, root_of(world.vm), count)
    assert len(probes) <= count
    assert all(a.gpa < b.gpa for a, b in pairwise(probes))


def test_what_the_host_dropped_is_probed_and_expected_absent(world: World) -> None:
    slot = next(iter(world.vm.slots))
    world.run(dontneed(world.mm, slot.hva, 2 * PAGE_SIZE))
    probes = make_probes(world.vm, root_of(world.vm), 4096)
    assert wrong(world, probes) == []
    assert not {0x100, 0x101} & mapped(probes)
    assert {0x100 << 12, 0x101 << 12} <= {probe.gpa for probe in probes}


def test_after_a_slot_was_deleted_nothing_is_mapped_until_it_faults_again(world: World) -> None:
    """An exported root loses all its leaves, whatever the slot [RFC 36/42]."""
    world.set_slot(2, 0, 0, 0)
    for again in (set[int](), {0x101}):
        for gfn in again:
            world.io_fault(world.vm.exports.tdps[0], gfn)
        probes = make_probes(world.vm, root_of(world.vm), 4096)
        assert wrong(world, probes) == []
        assert mapped(probes) == again


def test_a_planted_bug_a_zap_that_leaves_a_leaf_behind_shows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = next(iter(world.vm.slots))
    monkeypatch.setattr(tdp_mmu, "zap_some", lambda *_: 0)
    world.run(dontneed(world.mm, slot.hva, PAGE_SIZE))
    stale = wrong(world, make_probes(world.vm, root_of(world.vm), 4096))
    assert [probe.gpa >> 12 for probe in stale] == [0x100]


@pytest.mark.parametrize(
    "spoil", [lambda e: 0, lambda e: e + PAGE_SIZE, lambda e: e & ~bits.WRITE, lambda e: e | bits.TRANSIENT]
)
def test_a_leaf_stored_wrongly_shows(world: World, spoil: object) -> None:
    root = root_of(world.vm)
    (met,) = world.vm.mmu.leaves_in(root, GfnSpan(Gfn(0x101), Gfn(0x102)))
    world.host.writer.store64(met.at, spoil(met.entry))  # type: ignore[operator]
    assert [p.gpa >> 12 for p in wrong(world, make_probes(world.vm, root, 4096))] == [0x101]


def test_the_runs_are_the_tables_pages_and_no_others(world: World) -> None:
    root = root_of(world.vm)
    runs = table_runs(world.host.writer, root)
    assert sum(run.pages for run in runs) == root.tables
    assert all(a.base + a.pages * PAGE_SIZE < b.base for a, b in pairwise(runs))
    other = World()
    other.set_slot(0, 0, 16, other.map())
    other.guest_read(other.create_vcpu(), 0, 1)
    (run,) = table_runs(other.host.writer, root_of(other.vm))
    assert (run.base, run.pages) == (LOW_RAM_START, 4)


def test_a_table_too_big_to_copy_in_one_turn_is_efbig(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "MAX_DUMP_TABLES", 3)
    with pytest.raises(UapiError, match="pages, a dump at most 3") as refused:
        table_runs(world.host.writer, root_of(world.vm))
    assert refused.value.errno == errno.EFBIG


def test_five_levels_and_a_vcpus_own_root() -> None:
    world = World(CpuFeatures(maxphyaddr=52, ept_levels=5))
    world.set_slot(0, 1 << 37, 16, world.map())
    vcpu = world.create_vcpu(maxphyaddr=52)
    world.guest_write(vcpu, 1 << 49, b"x")
    root = root_of(world.vm)
    assert root.role.level == Level(5)
    probes = make_probes(world.vm, root, 100)
    assert mapped(probes) == {1 << 37}
    assert wrong(world, probes) == []


def test_looking_at_an_address_tells_every_level_and_both_verdicts(world: World) -> None:
    found = look_up(world.vm, Gpa(0x100_123))
    assert [level for level, _, _ in found["path"]] == [4, 3, 2, 1]
    mapped_at = [Walk(Outcome(end[0]), *end[1:]).hpa(0x100_123) for end in (found["cpu"], found["unit"])]
    assert mapped_at[0] == mapped_at[1]
    assert mapped_at[0] & 0xFFF == 0x123
    assert [level for level, _, _ in look_up(world.vm, Gpa(0x20_0003 << 12))["path"]] == [4, 3, 2]
    nothing = look_up(world.vm, Gpa(300 * GIB))
    assert nothing["cpu"][:4] == [Outcome.ABSENT, 3, 0, 0]
    with pytest.raises(UapiError, match="beyond a root of 4 levels"):
        look_up(world.vm, Gpa(1 << 48))


def test_a_vm_is_described_with_its_parts(world: World) -> None:
    told = describe(world.vm, max_slots=2)
    assert (told["slots_total"], [slot["slot"] for slot in told["slots"]]) == (3, [0, 1])
    (root,) = told["roots"]
    assert root["leaves"] == [4, 2, 0]
    assert root["mapped_pages"] == 4 + 2 * 512
    assert told["exported"] == [{"as_id": 0, "root_hpa": root["hpa"], "importers": []}]
    assert told["stats"]["pages_4k"] == 4


def test_a_vm_without_a_root_is_enoent() -> None:
    with pytest.raises(UapiError) as refused:
        root_of(World().vm)
    assert refused.value.errno == errno.ENOENT
