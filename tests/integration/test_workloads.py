"""The workloads on every design: what holds for all, what each counts, and that a bug would be noticed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import trio

from protocol.units import MIB, PAGE_SIZE
from qemu_shim.api import DESIGNS, Context, Scenario
from qemu_shim.scenarios.run import Run
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.figures import compare
from qemu_shim.study.workloads.host_memory import Reclaim
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.study.workloads.storm import under_dma
from qemu_shim.vmm.machine import Host, connect_host
from qemu_shim.vmm.migrator import Migrator
from qemu_shim.vmm.process import Process
from tests.kit.daemons import System, system
from tests.kit.vmm import nothing_left

SMALL = {
    "boot-touch": {"pages": 32, "untouched": 8, "ram_mib": 32},
    "device-first": {"pages": 32, "ram_mib": 32},
    "dmatest": {"buf_kib": 64},
    "late-attach": {"pages": 32, "ram_mib": 32},
    "ring-and-buffers": {"work_descriptors": 64, "rounds": 1},
    "streaming": {"pages": 96, "window": 16},
    "balloon": {"pages": 64, "rounds": 2},
    "migration": {"pages": 64, "rounds": 2, "cpu_writes": 25, "device_writes": 25},
    "hotplug-storm": {"kept": 16, "plugged": 8, "rounds": 2, "storm": 3},
    "huge-pages": {"mib": 2, "storm": 1},
    "overcommit": {"pages": 64, "window": 16, "turns": 2},
}
SCARCE = ("streaming", "overcommit")  # on hosts of little memory
# What a design cannot do, and the words of whoever refuses it.
REFUSED = {
    ("streaming", "pinned"): "no free frames",
    ("overcommit", "pinned"): "no free frames",
    ("balloon", "pinned"): "ram_block_discard is disabled",
    ("huge-pages", "pinned"): "a page is pinned",
}
KVMS = ("managed", "shared")  # KVM fills what the unit walks


@pytest.fixture(scope="module")
def scarce_system() -> Iterator[System]:
    options = WORKLOADS["overcommit"].options
    with system(options) as running:
        yield running


@dataclass
class Hosts:
    """With plenty of memory, and with little."""

    plenty: Host
    scarce: Host

    async def play(self, workload: str, design: str, seed: int = 1, **params: int) -> Run:
        host = self.scarce if workload in SCARCE else self.plenty
        small = SMALL.get(workload, {}) | params
        return await run_scenario(host, WORKLOADS[workload], DESIGNS[design], seed, small)


@pytest.fixture
async def hosts(host: Host, scarce_system: System) -> AsyncIterator[Hosts]:
    async with connect_host(scarce_system.directory) as scarce:
        yield Hosts(host, scarce)
        await nothing_left(scarce)


def added(run: Run, name: str) -> dict[str, int]:
    """What each step added to a count."""
    before, steps = 0, {}
    for sample in run.samples:
        steps[sample.step] = sample.counts.get(name, 0) - before
        before = sample.counts.get(name, 0)
    return steps


@pytest.mark.parametrize("workload", WORKLOADS)
async def test_every_design_plays_every_workload_alike_or_says_why_not(hosts: Hosts, workload: str) -> None:
    """Alike: the same bytes, pages and descriptors; who refused something, and no other, is in no ranking."""
    runs = [await hosts.play(workload, design) for design in DESIGNS]
    for run in runs:
        assert run.problems == []
        refusals = [refusal.why for refusal in run.refusals]
        expected = REFUSED.get((workload, run.design))
        assert len(refusals) == (expected is not None), run.design
        assert all(expected is not None and expected in why for why in refusals), refusals
        if workload not in SCARCE or not refusals:
            assert "first dma" in [sample.step for sample in run.samples]
    (figures,) = compare(runs, default_costs(), "-").workloads
    assert list(figures.unranked) == [design for of, design in REFUSED if of == workload]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("workload", ["hotplug-storm", "migration"])
async def test_the_same_seed_gives_the_same_run(hosts: Hosts, workload: str, design: str) -> None:
    assert await hosts.play(workload, design, seed=7) == await hosts.play(workload, design, seed=7)


async def test_another_seed_writes_other_pages(hosts: Hosts) -> None:
    first, second = [await hosts.play("migration", "shared", seed=seed) for seed in (1, 2)]
    assert first.samples != second.samples


# -- what is counted ---------------------------------------------------------------------------------------

RING = {  # IO page faults of each class of pages; 64 descriptors fill a page, their records half of one
    "pinned": (0, 0, 0, 0, 0),
    "mirror": (1, 1, 64, 32, 32),
    "notifier": (0, 1, 0, 0, 32),
    "managed": (0, 1, 0, 0, 32),
    "shared": (0, 1, 0, 0, 32),
}


@pytest.mark.parametrize("design", DESIGNS)
async def test_who_knows_what_the_cpu_touched_faults_only_on_records_and_fresh_buffers(
    hosts: Hosts, design: str
) -> None:
    run = await hosts.play("ring-and-buffers", design)
    faults = added(run, "io_faults")
    classes = (
        *("work descriptors", "completion records", "transmit buffers"),
        *("recycled receive buffers", "fresh receive buffers"),
    )
    assert tuple(faults[name] for name in classes) == RING[design]
    assert not any(count for step, count in faults.items() if step.endswith("round 1"))
    reads = added(run, "cpu_faults")
    assert reads["driver reads buffers"] == (0 if design in KVMS else 32)


@pytest.mark.parametrize(
    ("design", "faults"),
    [("pinned", 0), ("mirror", 257), ("notifier", 257), ("managed", 257), ("shared", 1)],
)
async def test_a_device_that_comes_late_finds_the_cpus_pages_in_the_shared_table_alone(
    hosts: Hosts, design: str, faults: int
) -> None:
    """256 pages that the CPU wrote before, and the page of completion records."""
    run = await hosts.play("late-attach", design, pages=256)
    assert run.problems == []
    io, cpu = added(run, "io_faults"), added(run, "cpu_faults")
    assert sum(io.values()) == faults
    assert (cpu["cpu writes"], io["attached"], cpu["attached"]) == (256, 0, 0)
    assert run.samples[-1].counts["pages_pinned"] == (0 if design != "pinned" else 32 * MIB // PAGE_SIZE)
    assert added(run, "cpu_bytes")["cpu writes"] == 256


@pytest.mark.rfc("RFC-97")
async def test_shared_reports_what_was_written_and_each_page_costs_one_fault_a_round(hosts: Hosts) -> None:
    run = await hosts.play("migration", "shared")
    assert run.problems == []
    written, reported = added(run, "pages_written"), added(run, "pages_reported")
    io, cpu = added(run, "io_faults"), added(run, "cpu_faults")
    for step in ("round 1", "round 2", "last round"):
        assert 0 < io[step] < written[step] == reported[step] == io[step] + cpu[step]


async def test_logging_takes_the_huge_pages_of_the_shared_table_apart_and_no_other(hosts: Hosts) -> None:
    for design, owner, splits in (("shared", "shared", 1), ("mirror", "iommufd", 0)):
        run = await hosts.play("migration", design, huge=1, rounds=1)
        assert run.problems == []
        used, stopped = (run.samples[n].gauges[f"table_pages.{owner}.1"] for n in (2, -1))
        assert stopped - used == splits, design


@pytest.mark.parametrize("design", [design for design in DESIGNS if design != "shared"])
async def test_where_no_log_sees_the_device_everything_is_dirty_and_nothing_faults(
    hosts: Hosts, design: str
) -> None:
    """The CPU's stores are logged by its own table's dirty bits, which no unit walks."""
    run = await hosts.play("migration", design)
    assert run.problems == []
    written, reported = added(run, "pages_written"), added(run, "pages_reported")
    io, cpu = added(run, "io_faults"), added(run, "cpu_faults")
    for step in ("round 1", "round 2", "last round"):
        assert (io[step], cpu[step], reported[step]) == (0, 0, SMALL["migration"]["pages"])
        assert written[step] < reported[step]


@pytest.mark.parametrize("design", DESIGNS)
async def test_a_slots_removal_costs_the_device_faults_only_in_the_shared_table(
    hosts: Hosts, design: str
) -> None:
    """In the first round the device comes first, in the second the CPU; one fault is the record's page."""
    run = await hosts.play("hotplug-storm", design)
    assert run.problems == []
    io, cpu = added(run, "io_faults"), added(run, "cpu_faults")
    pages = SMALL["hotplug-storm"]["kept"]
    seen = [(io[f"the other slot {n}"], cpu[f"the other slot {n}"]) for n in (1, 2)]
    assert seen == ([(pages + 1, 0), (1, pages)] if design == "shared" else [(0, pages + 1)] * 2)


async def test_a_host_without_room_swaps_and_both_find_what_was_there(hosts: Hosts) -> None:
    run = await hosts.play("streaming", "shared", sweeps=3)
    assert run.problems == []
    faults = [added(run, name)[f"sweep {n}"] for name in ("cpu_faults", "io_faults") for n in (2, 3)]
    assert all(count >= SMALL["streaming"]["pages"] // 2 for count in faults)
    assert all(sample.gauges["resident_pages"] <= 96 // 2 + 16 for sample in run.samples)


# -- bugs --------------------------------------------------------------------------------------------------


async def test_a_dropped_dirty_bit_is_noticed(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Migrator.dirty

    async def all_but_one(migrator: Migrator) -> set[int]:
        return (found := await whole(migrator)) - {min(found)}

    monkeypatch.setattr(Migrator, "dirty", all_but_one)
    run = await hosts.play("migration", "shared")
    assert any("written while logged and not reported" in problem for problem in run.problems)
    assert any("pages of the copy differ" in problem for problem in run.problems)
    assert run.samples[-1].counts["pages_missed"] == 3


async def test_a_host_that_does_not_reclaim_runs_out_of_memory(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(reclaim: Reclaim) -> int:
        return 0

    monkeypatch.setattr(Reclaim, "balance", nothing)
    for workload in SCARCE:
        run = await hosts.play(workload, "shared")
        assert any("ENOMEM" in problem or "TRANSLATION_FAIL" in problem for problem in run.problems), workload


async def test_a_lost_page_is_noticed_by_cpu_and_device(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The balloon takes one page more than the guest gave."""
    drop = Process.madvise_dontneed

    async def too_much(process: Process, addr: int, size: int) -> None:
        await drop(process, addr - PAGE_SIZE, size + 2 * PAGE_SIZE)

    monkeypatch.setattr(Process, "madvise_dontneed", too_much)
    run = await hosts.play("balloon", "shared", share=25)
    assert any(problem.startswith("the device does not read") for problem in run.problems)
    assert any(problem.startswith("the CPU does not read") for problem in run.problems)


async def test_a_write_lost_under_dma_is_noticed(hosts: Hosts) -> None:
    async def play(ctx: Context) -> None:
        guest = await ctx.boot_for(8)
        pages = guest.pages(8)

        async def act() -> None:
            for gpa in pages:
                while not any(await guest.read(gpa, 1)):
                    await trio.lowlevel.checkpoint()
            await guest.discard(pages[0], 8 * PAGE_SIZE)

        await under_dma(ctx, guest, pages, act)

    run = await run_scenario(hosts.plenty, Scenario("loses", "", play), DESIGNS["shared"], 1)
    assert any("is lost" in problem for problem in run.problems)
