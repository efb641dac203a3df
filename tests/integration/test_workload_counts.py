"""What the workloads count, worked out by hand from what each design does; every expectation is exact."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from qemu_shim.guest.memory import GuestMemory
from qemu_shim.scenarios.run import Run
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.figures import compare
from qemu_shim.study.compare.ranking import undeclared
from qemu_shim.study.compare.schema import WorkloadFigures
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.machine import Host, connect_host
from tests.kit.daemons import System, system

UNPINNED = ("mirror", "notifier", "managed", "shared")
ON_DEMAND = ("mirror", "notifier")  # tables of iommufdd's, which KVM tells of nothing it takes away


async def counted(host: Host, workload: str, design: str, **params: int) -> dict[str, int]:
    """The counts at the end."""
    run = await run_scenario(host, WORKLOADS[workload], DESIGNS[design], 1, params)
    assert run.problems == []
    return run.samples[-1].counts


def those(counts: dict[str, int], *names: str) -> tuple[int, ...]:
    return tuple(counts[name] for name in names)


# -- swap --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded_system() -> Iterator[System]:
    with system(WORKLOADS["streaming"].options) as running:
        yield running


@pytest.fixture
async def crowded(crowded_system: System) -> AsyncIterator[Host]:
    async with connect_host(crowded_system.directory) as host:
        yield host


@pytest.mark.parametrize("design", UNPINNED)
async def test_what_is_swapped_and_read_back_and_who_is_told(crowded: Host, design: str) -> None:
    """Six windows of 16 pages, frames for three.  From the fourth window of the first sweep on each window
    that is used sends the oldest out, 3 + 6 + 6 times; in the second sweep and in the last reading each is
    read back first, by the device in three windows of the second sweep, else by the CPU.
    """
    counts = await counted(crowded, "streaming", design, pages=96, window=16, room=50, sweeps=2)
    assert those(counts, "swap_outs", "swap_ins") == (16 * (3 + 6 + 6), 16 * (6 + 6))
    assert those(counts, "io_faults_major", "cpu_faults_major") == (16 * 3, 16 * (3 + 6))
    out, aged = 3 + 6 + 6, 4 + 14  # the first look at age finds four windows used, each later one another
    assert counts["flushes"] == out + aged
    assert counts["invalidations"] == (out + aged if design == "shared" else out)
    unseen = 3 if design == "mirror" else 0  # of what goes last the device has not used three windows again
    descriptors = counts["invalidations"] - unseen
    told = ("invalidation_waits", "iotlb_invalidations", "devtlb_invalidations")
    assert those(counts, *told) == (descriptors,) * 3


# -- copies, retries, invalidations ------------------------------------------------------------------------


@pytest.mark.parametrize("design", UNPINNED)
async def test_a_write_to_a_page_of_zeroes_invalidates_it_and_looks_again(host: Host, design: str) -> None:
    """All 32 pages are given back and taken again, twice: each is read first, and its write replaces the page
    of zeroes, of which whoever had that mapped is told; the fault that writes hears of it and looks again.
    """
    pages, rounds = 32, 2
    half = pages // 2
    counts = await counted(host, "balloon", design, pages=pages, rounds=rounds, share=100)
    assert counts["fault_retries"] == rounds * pages
    assert counts["invalidations"] == rounds * (pages + 1)
    of_device = rounds * (half if design == "mirror" else pages) + rounds
    assert (
        those(counts, "invalidation_waits", "iotlb_invalidations", "devtlb_invalidations") == (of_device,) * 3
    )
    of_cpu = rounds * (half if design in ON_DEMAND else pages) + rounds
    assert counts["flushes"] == of_cpu
    both = 2 if design in ON_DEMAND else 1  # KVM, and the mirror
    assert counts["notifier_calls"] == both * rounds * (pages + 1)


# -- splits and collapses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
async def test_logging_splits_each_huge_page_of_the_cpus_table_once_and_none_of_the_devices(
    host: Host, design: str
) -> None:
    counts = await counted(host, "migration", design, pages=600, huge=1, rounds=1)
    assert those(counts, "splits", "collapses") == (2, 0)


@pytest.mark.parametrize(
    ("design", "collapses"), [("pinned", 0), ("mirror", 2), ("notifier", 2), ("managed", 4), ("shared", 2)]
)
async def test_a_collapse_puts_one_leaf_over_a_table_wherever_kvm_kept_one(
    host: Host, design: str, collapses: int
) -> None:
    """Twice; what iommufdd had mapped of the page went as the host took it away, tables of KVM's stay."""
    counts = await counted(host, "huge-pages", design, mib=2, storm=0)
    assert those(counts, "splits", "collapses") == (0, collapses)


# -- messages and kicks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("design", "faults", "groups", "messages"),
    [
        ("pinned", 0, 0, 0),
        ("mirror", 33, 17, 33),
        ("notifier", 1, 1, 1 + 33 * 2),
        ("managed", 1, 1, 1),
        ("shared", 1, 1, 1),
    ],
)
async def test_a_group_is_asked_and_answered_once_a_page_looked_up_once_and_a_note_looked_at_once(
    host: Host, design: str, faults: int, groups: int, messages: int
) -> None:
    """Two buffers of 16 pages, a page of each copied at once: a group of two; and the page of records.  A
    page is a message, a note and its look are one each, and a group's response is a kick.
    """
    counts = await counted(host, "dmatest", design, buf_kib=64)
    assert those(counts, "io_faults", "io_groups", "messages") == (faults, groups, messages)
    assert counts["kicks"] == groups


@pytest.mark.parametrize("design", UNPINNED)
async def test_an_invalidation_is_a_message_to_who_keeps_the_table_and_a_kick_of_the_unit(
    host: Host, design: str
) -> None:
    """Where the table is iommufdd's, a fault of the device's that looks again asks again."""
    counts = await counted(host, "balloon", design, pages=32, rounds=1, share=100)
    asked = counts["io_faults"] + 2 * counts["notes"]
    again = 16 if design in ON_DEMAND else 0
    assert counts["messages"] == counts["invalidations"] + asked + again
    assert counts["kicks"] == counts["io_groups"] + counts["invalidation_waits"]


# -- clearing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", UNPINNED)
async def test_pages_are_allocated_by_whose_fault_came_first(host: Host, design: str) -> None:
    """The CPU's ten, the device's thirty and the record's; the faults that come after allocate nothing."""
    counts = await counted(host, "device-first", design, pages=40, cpu_first=25, ram_mib=32)
    allocated = ("pages_allocated", "pages_allocated_cpu", "pages_allocated_io")
    assert those(counts, *allocated) == (41, 10, 31)


async def test_pinned_pages_are_allocated_by_no_fault(host: Host) -> None:
    counts = await counted(host, "device-first", "pinned", pages=40, ram_mib=32)
    assert those(counts, "pages_allocated_cpu", "pages_allocated_io") == (0, 0)


# -- the same work -----------------------------------------------------------------------------------------


def compared(runs: Sequence[Run]) -> WorkloadFigures:
    (workload,) = compare(runs, default_costs(), "-").workloads
    return workload


async def test_a_design_that_does_less_is_found_out_though_it_is_a_byte(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest of one of three leaves a page untouched."""
    touch = GuestMemory.touch
    runs = []
    for design in ("notifier", "managed", "shared"):

        async def too_few(memory: GuestMemory, gpas: Sequence[int], few: bool = design == "managed") -> None:
            await touch(memory, gpas[: len(gpas) - few])

        monkeypatch.setattr(GuestMemory, "touch", too_few)
        small = {"pages": 8, "untouched": 2, "ram_mib": 32}
        runs.append(await run_scenario(host, WORKLOADS["boot-touch"], DESIGNS[design], 1, small))
    workload = compared(runs)
    assert undeclared(workload.designs, workload.unranked) == ["managed"]
    assert workload.unranked["managed"].startswith("it did other work and refused nothing: cpu_bytes ")
