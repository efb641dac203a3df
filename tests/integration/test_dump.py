"""Dumps, read by a reader of their own: of every scenario, a busy VM, huge pages; and planted faults."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import pytest
import trio

from protocol.hw.dsa import Status
from protocol.units import GIB, MIB, PAGE_SIZE
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.machine import Host, Machine, MachineConfig, connect_host, machine
from tests.integration.plain import Plain
from tests.integration.played import played
from tests.kit.daemons import System
from tests.kit.vmm import nothing_left
from tests.oracle.dump import Dump

READ, WRITE, SNP, TM = 1, 2, 1 << 11, 1 << 62


def expected(dump: Dump) -> list[int]:
    """The probes that must be mapped."""
    return [probe["gpa"] for probe in dump.document["probes"] if probe["expect_hpa"] is not None]


def absent(dump: Dump) -> list[int]:
    return [probe["gpa"] for probe in dump.document["probes"] if probe["expect_hpa"] is None]


def all_dumps(directory: Path) -> list[Path]:
    return sorted(document.parent for document in directory.rglob("TABLES.json"))


@pytest.mark.parametrize("name", SCENARIOS)
async def test_every_probe_of_a_scenarios_dump_is_what_an_independent_walk_finds(
    shared_system: System, tmp_path: Path, name: str
) -> None:
    async with connect_host(shared_system.directory) as host:
        host.dumps_to = tmp_path
        await played(host, name)  # whether the scenario held is for its own tests to say
        await nothing_left(host)
    assert tmp_path in all_dumps(tmp_path)
    for directory in all_dumps(tmp_path):
        dump = Dump(directory)
        assert dump.mismatches() == []
        assert expected(dump) != []
        assert absent(dump) != []


@pytest.fixture
async def guest(host: Host) -> AsyncIterator[Machine]:
    async with machine(host, MachineConfig(ram_bytes=64 * MIB)) as built:
        pages = built.memory.allocate(64)
        await built.memory.touch([pages + n * PAGE_SIZE for n in range(0, 64, 2)])
        yield built


async def dumped(guest: Machine, directory: Path) -> Dump:
    await guest.dump(directory)
    dump = Dump(directory)
    assert dump.mismatches() == []
    return dump


PLANTED: dict[str, Callable[[int], int]] = {
    "another frame": lambda entry: entry + PAGE_SIZE,
    "no write": lambda entry: entry & ~WRITE,
    "no read": lambda entry: entry & ~READ,
    "lost": lambda entry: 0,
    "bit 11": lambda entry: entry | SNP,
    "bit 62": lambda entry: entry | TM,
}


@pytest.mark.parametrize("what", PLANTED)
async def test_a_wrong_leaf_planted_in_the_pages_is_found(guest: Machine, tmp_path: Path, what: str) -> None:
    dump = await dumped(guest, tmp_path)
    gpa = Random(1).choice(expected(dump))
    _, at = dump.walk(gpa)
    data, offset = dump.slot_of(at)
    entry = int.from_bytes(data[offset : offset + 8], "little")
    data[offset : offset + 8] = PLANTED[what](entry).to_bytes(8, "little")
    assert len(dump.mismatches()) == 1


async def test_a_stale_leaf_planted_where_nothing_is_mapped_is_found(guest: Machine, tmp_path: Path) -> None:
    dump = await dumped(guest, tmp_path)
    neighbours = set(expected(dump))
    gpa = next(gpa for gpa in absent(dump) if gpa - PAGE_SIZE in neighbours)
    _, at = dump.walk(gpa)
    data, offset = dump.slot_of(at)
    data[offset : offset + 8] = (0x1_0000_0000 | READ).to_bytes(8, "little")
    assert len(dump.mismatches()) == 1


async def test_a_page_the_host_has_but_nobody_faulted_in_is_expected_absent(
    guest: Machine, tmp_path: Path
) -> None:
    """The process touched it, the TDP never did."""
    gpa = guest.memory.allocate(1)
    await guest.process.write(guest.hva_of(gpa), b"x")
    assert gpa in absent(await dumped(guest, tmp_path))
    await guest.memory.touch([gpa])
    assert gpa in expected(await dumped(guest, tmp_path))


async def test_what_the_host_took_away_is_expected_absent_until_it_faults_again(
    guest: Machine, tmp_path: Path
) -> None:
    dump = await dumped(guest, tmp_path)
    gpa = expected(dump)[3]
    await guest.process.madvise_dontneed(guest.hva_of(gpa), PAGE_SIZE)
    assert gpa in absent(await dumped(guest, tmp_path))
    await guest.process.write(guest.hva_of(gpa), b"x")  # there again, at some frame, but not in the TDP
    assert gpa in absent(await dumped(guest, tmp_path))


async def test_huge_pages_are_probed_with_their_size(host: Host, tmp_path: Path) -> None:
    async with machine(host, MachineConfig(ram_bytes=64 * MIB, page_size=2 * MIB)) as guest:
        await guest.memory.touch([20 * MIB, 30 * MIB])
        dump = await dumped(guest, tmp_path)
    sizes = {p["page_size"] for p in dump.document["probes"] if p["expect_hpa"] is not None}
    assert sizes == {2 * MIB}


async def test_a_dump_in_the_middle_of_dma_and_invalidations_is_one_state(host: Host, tmp_path: Path) -> None:
    async with machine(host, MachineConfig(ram_bytes=64 * MIB)) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        await queue.enable()
        pages = guest.memory.allocate(32)
        gpas = [pages + n * PAGE_SIZE for n in range(32)]

        async def fill() -> None:
            while True:
                for gpa in gpas:
                    assert (await queue.fill(gpa, 7, PAGE_SIZE)).status is Status.SUCCESS

        async def take_away() -> None:
            while True:
                await guest.process.move_pages(guest.hva_of(gpas[0]), 16 * PAGE_SIZE)
                await guest.process.madvise_dontneed(guest.hva_of(gpas[16]), 16 * PAGE_SIZE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            nursery.start_soon(take_away)
            for _ in range(40):
                await dumped(guest, tmp_path)
            nursery.cancel_scope.cancel()


async def test_a_scenario_can_dump_whenever_it_likes_and_the_vm_goes_on(
    guest: Machine, tmp_path: Path
) -> None:
    first = await dumped(guest, tmp_path / "deep" / "first")
    await guest.memory.touch([guest.memory.allocate(1)])
    second = await dumped(guest, tmp_path / "second")
    assert len(expected(second)) == len(expected(first)) + 1
    lines = (tmp_path / "second" / "TABLES.json").read_text().splitlines()
    assert all(len(line) < 200 for line in lines)
    assert json.loads("\n".join(lines)) == second.document


async def test_hostile_requests_get_an_errno_and_leave_no_fd(shared_system: System, host: Host) -> None:
    peer = Plain.connect(shared_system.admin)
    peer.ask("STATS")  # it has accepted us
    before = shared_system.all_fds()
    for body, number in (
        ({"vm": 999}, 2),  # ENOENT
        ({"vm": None}, 9),  # EBADF: no fd came along
        ({"vm": -1}, 22),
        ({"vm": "1"}, 22),
        ({"vm": 1, "surprise": 1}, 22),
    ):
        for op in ("INSPECT", "DUMP_TABLES"):
            assert peer.ask(op, body) == number
    for probes in (0, (1 << 14) + 1, "all"):
        assert peer.ask("DUMP_TABLES", {"vm": 1, "probes": probes}) == 22
    shared_system.wait_closed(before)
    peer.close()


async def test_a_vm_without_a_table_is_enoent_and_one_with_an_address_too_high_einval(
    shared_system: System, host: Host
) -> None:
    process = await host.kvmd.start_process()
    vm = await host.kvmd.create_vm(process)
    peer = Plain.connect(shared_system.admin)
    number = peer.ask("STATS")[0]["vms"][-1]["vm"]
    inspector = Inspector(host.kvmd.channel)
    assert (await inspector.vm(vm))["roots"] == []
    assert peer.ask("DUMP_TABLES", {"vm": number}) == 2
    assert peer.ask("INSPECT_GPA", {"vm": number, "gpa": 0}) == 2
    hva = await process.mmap(GIB)
    await vm.set_user_memory_region(0, 0, GIB, hva)
    vcpu = await vm.create_vcpu(0)
    await vcpu.set_cpuid(46)
    await vcpu.run([("w", 0x5000, b"x")])
    found = await inspector.gpa(vm, 0x5123)
    assert found["cpu"] == found["unit"]
    assert [level for level, _, _ in found["path"]] == [4, 3, 2, 1]
    assert peer.ask("INSPECT_GPA", {"vm": number, "gpa": 1 << 48}) == 22
    peer.close()
    for file in (vcpu, vm, process):
        file.close()
