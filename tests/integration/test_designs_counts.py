"""What each design costs in faults, pins and tables, counted on real daemons; every expectation is exact.

The device touches one page beside those of the story, that of the completion records: it writes it first and
the CPU reads it then.  Descriptors reach the device by its portal and lie in no memory.
"""

from __future__ import annotations

import pytest

from protocol.units import GIB, KIB, MIB, PAGE_SIZE, Gpa
from qemu_shim.compare.run import Run, Sample
from qemu_shim.designs import DESIGNS
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.machine import Host, Machine, MachineConfig, connect_host, machine
from qemu_shim.workloads.counters import tables
from qemu_shim.workloads.library import WORKLOADS
from qemu_shim.workloads.recorder import Recorder
from qemu_shim.workloads.runner import run_workload
from tests.integration.system import system

PAGES, RECORDS = 40, 1
HUGE = 2 * MIB
OWNERS = {
    "pinned": {"cpu", "iommufd"},
    "mirror": {"cpu", "iommufd"},
    "notifier": {"cpu", "iommufd"},
    "managed": {"cpu", "iommu"},
    "shared": {"shared"},
}


async def played(host: Host, workload: str, design: str, seed: int = 1, **params: int) -> Run:
    small = {"ram_mib": 32} if "ram_mib" in WORKLOADS[workload].params else {}
    run = await run_workload(host, WORKLOADS[workload], DESIGNS[design], seed, small | params)
    assert (run.problems, run.refusals) == ([], [])
    return run


def faults(sample: Sample) -> tuple[int, int]:
    return sample.counts["cpu_faults"], sample.counts["io_faults"]


# -- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu_first", [0, 25, 50, 100])
@pytest.mark.parametrize("design", DESIGNS)
async def test_faults_of_each_design_by_the_share_of_pages_the_cpu_touches_first(
    host: Host, design: str, cpu_first: int
) -> None:
    """One table: a fault for each page, by whoever comes first.  A table each: the CPU's pages and the
    device's, but those of the device that were pinned, or that a note had mapped before it came.
    """
    run = await played(host, "device-first", design, pages=PAGES, cpu_first=cpu_first)
    by_cpu = PAGES * cpu_first // 100
    by_device = PAGES - by_cpu + RECORDS
    everything = PAGES + RECORDS
    assert (
        faults(run.samples[-1])
        == {
            "shared": (by_cpu, by_device),
            "managed": (by_cpu, by_device),
            "mirror": (everything, everything),
            "pinned": (everything, 0),
            "notifier": (everything, by_device),
        }[design]
    )


@pytest.mark.parametrize("design", ["shared", "managed", "notifier"])
async def test_buffers_that_the_cpu_touched_first_cause_no_io_page_fault(host: Host, design: str) -> None:
    """What faults is the page of completion records, and pages that nobody had touched, each once."""
    run = await played(host, "boot-touch", design, pages=PAGES, untouched=7)
    io_faults = {sample.step: sample.counts["io_faults"] for sample in run.samples}
    assert io_faults == {
        "start": 0,
        "cpu touches": 0,
        "first dma": RECORDS,
        "dma to what the cpu touched": RECORDS,
        "dma to what nobody touched": RECORDS + 7,
        "cpu again": RECORDS + 7,
    }


async def test_in_a_mirror_the_first_use_of_a_page_faults_whatever_the_cpu_did(host: Host) -> None:
    run = await played(host, "boot-touch", "mirror", pages=PAGES, untouched=7)
    assert [sample.counts["io_faults"] for sample in run.samples] == [
        0,
        0,
        2,
        PAGES + 1,
        PAGES + 8,
        PAGES + 8,
    ]


@pytest.mark.parametrize("workload", ["boot-touch", "device-first", "dmatest"])
async def test_pinned_every_page_is_pinned_from_the_start_and_nothing_faults(
    host: Host, workload: str
) -> None:
    run = await played(host, workload, "pinned")
    ram_pages = run.params.get("ram_mib", 32 + 2) * MIB // PAGE_SIZE
    for sample in run.samples:
        assert sample.counts["io_faults"] == sample.counts["io_faults_failed"] == 0, sample.step
        assert sample.gauges["pinned_pages"] == sample.counts["pages_pinned"] == ram_pages, sample.step
        assert sample.gauges["resident_pages"] == sample.counts["pages_allocated"] == ram_pages, sample.step


@pytest.mark.parametrize("design", [name for name in DESIGNS if name != "pinned"])
async def test_no_other_design_pins_anything(host: Host, design: str) -> None:
    run = await played(host, "boot-touch", design, pages=PAGES)
    assert {sample.counts["pages_pinned"] for sample in run.samples} == {0}


# -- the published fault counts ----------------------------------------------------------------------------

# Buffers of 1 MiB mapped page by page, and of 10 MiB with 512 pages mapped at once [IOPF 0/8].
PUBLISHED = [(1024, 1, 518), (10 * 1024, 512, 13)]


@pytest.mark.parametrize(("buf_kib", "premap", "published"), PUBLISHED)
async def test_the_published_fault_counts_but_for_the_pages_of_other_hardware(
    buf_kib: int, premap: int, published: int
) -> None:
    """Both are 2 x length / 4 KiB / pages mapped at once, and a constant.  Theirs is 6, in 3 windows of 512
    pages: memory of their accelerator that the publication does not list.  Ours is 1: a DSA gets descriptors
    by its portal, so that the page of completion records is all the memory it touches beside the buffers,
    and no window over it reaches into one.
    """
    buffers = 2 * buf_kib * KIB // PAGE_SIZE // premap
    assert published - buffers == {1: 6, 512: 3}[premap]
    with system({"iommufdd": ["--premap-pages", str(premap)]}) as running:
        async with connect_host(running.directory) as host:
            run = await played(host, "dmatest", "mirror", buf_kib=buf_kib)
    assert run.samples[-1].counts["io_faults"] == buffers + RECORDS
    assert run.samples[-1].counts["io_faults_spurious"] == 0


# -- tables ------------------------------------------------------------------------------------------------


async def used_by_both(host: Host, guest: Machine, step: int) -> dict[str, dict[int, int]]:
    """The pages of tables by owner and level, once CPU and device have used a page in every `step` bytes."""
    queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
    await queue.enable()
    recorder = Recorder(host)
    recorder.machines.append(guest)
    gpas = [at for slot in guest.slots for at in range(slot.gpa, slot.gpa + slot.size, step)]
    await guest.memory.touch(gpas)
    for gpa in gpas:
        await queue.fill(gpa, 0, PAGE_SIZE)
    found: dict[str, dict[int, int]] = {}
    for name, pages in tables(await recorder.look()).items():
        _, owner, level = name.split(".")
        if pages:
            found.setdefault(owner, {})[int(level)] = pages
    return found


@pytest.mark.parametrize("ram", [2 * MIB, 6 * MIB], ids="{}".format)
@pytest.mark.parametrize("design", DESIGNS)
async def test_leaves_of_4k_cost_a_table_page_for_2_mib_and_owner(host: Host, design: str, ram: int) -> None:
    """So 513 pages for each GiB, 2.004 MiB or 0.196%, and a page or two above them."""
    async with machine(host, MachineConfig(ram, design=DESIGNS[design], free_from=Gpa(0))) as guest:
        found = await used_by_both(host, guest, PAGE_SIZE)
    assert found == {owner: {1: ram // HUGE, 2: 1, 3: 1, 4: 1} for owner in OWNERS[design]}
    per_gib = GIB // HUGE + 1
    assert (per_gib, round(100 * per_gib * PAGE_SIZE / GIB, 3)) == (513, 0.196)


@pytest.mark.parametrize("gib", [1, 3])
@pytest.mark.parametrize("design", DESIGNS)
async def test_leaves_of_2m_cost_a_table_page_for_each_gib_and_owner(
    host: Host, design: str, gib: int
) -> None:
    """4 KiB for each GiB, and two pages above them: the third GiB lies above 4 GiB, as on a PC."""
    async with machine(host, MachineConfig(gib * GIB, HUGE, design=DESIGNS[design])) as guest:
        found = await used_by_both(host, guest, GIB // 2)
    assert found == {owner: {2: gib, 3: 1, 4: 1} for owner in OWNERS[design]}


# -- determinism -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["boot-touch", "device-first", "dmatest"])
@pytest.mark.parametrize("design", DESIGNS)
async def test_two_runs_with_one_seed_are_equal(host: Host, design: str, workload: str) -> None:
    params = {"buf_kib": 64} if workload == "dmatest" else {"pages": PAGES}
    first = await played(host, workload, design, **params)
    second = await played(host, workload, design, **params)
    assert first == second
    assert [sample.step for sample in first.samples][:1] == ["start"]
    assert "first dma" in [sample.step for sample in first.samples]


@pytest.mark.parametrize("design", DESIGNS)
async def test_another_seed_is_another_order_and_the_same_costs(host: Host, design: str) -> None:
    first = await played(host, "device-first", design, seed=1, pages=PAGES, cpu_first=50)
    second = await played(host, "device-first", design, seed=2, pages=PAGES, cpu_first=50)
    assert first.samples == second.samples
