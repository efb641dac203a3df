"""What each design costs in faults, pins and tables, counted on real daemons; every expectation is exact.

The device touches one page beside those of the story, that of the completion records: it writes it first and
the CPU reads it then.  Descriptors reach the device by its portal and lie in no memory.
"""

from __future__ import annotations

import pytest

from protocol.hw.dsa import COMPLETION_SIZE, WORK_DESCRIPTOR_SIZE, Descriptor, Flag, Opcode, Status
from protocol.units import GIB, MIB, PAGE_SIZE, Gpa, Iova
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.counters import tables
from qemu_shim.scenarios.recorder import Recorder
from qemu_shim.scenarios.run import Run, Sample
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.machine import Host, Machine, MachineConfig, connect_host, machine
from tests.kit.daemons import system

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
    run = await run_scenario(host, WORKLOADS[workload], DESIGNS[design], seed, small | params)
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

# Two buffers of 1 MiB mapped page by page, and of 10 MiB with 512 pages mapped at once [IOPF 0/8].
PUBLISHED = [(MIB, 1, 518), (10 * MIB, 512, 13)]
MALLOC_HEADER = 16  # a large buffer begins so far into a page
DEPTH, BATCH = 128, 32  # descriptors in the ring; those handed over at once


@pytest.mark.parametrize(("size", "premap", "published"), PUBLISHED)
async def test_a_run_of_the_published_shape_gives_the_published_fault_counts(
    size: int, premap: int, published: int
) -> None:
    """The publication gives totals; one shape gives both.  malloc's buffers do not begin on a page, so that
    each reaches into one page more than its size (257 pages; 2561, or 6 windows of 512).  The driver's rings
    are one coherent piece of 4 pages, here 2 of descriptors, 1 of their completion records, 1 of the batches'
    own (1 window).  2 x 257 + 4 = 518; 2 x 6 + 1 = 13.  The device asks for all pages of a descriptor at
    once: those that came with the window of the first are no further fault.
    """
    pages_of_a_buffer = (MALLOC_HEADER + size - 1) // PAGE_SIZE + 1
    windows_of_a_buffer, windows_of_rings = -(-pages_of_a_buffer // premap), -(-4 // premap)
    assert 2 * windows_of_a_buffer + windows_of_rings == published
    config = MachineConfig(ram_bytes=64 * MIB, design=DESIGNS["mirror"])
    with system({"iommufdd": ["--premap-pages", str(premap)]}) as running:
        async with connect_host(running.directory) as host, machine(host, config) as guest:
            await copy_by_a_ring(guest, size)
            stats = await host.iommufdd.stats()
    assert stats["page_requests"] - stats["io_faults_spurious"] == published


async def copy_by_a_ring(guest: Machine, size: int) -> None:
    """From one buffer to the other, in `DEPTH` descriptors one after the other; rings and buffers as above,
    and far enough apart that no window of 512 pages over one of them reaches the next.
    """
    memory = guest.memory
    ring = memory.allocate(3)
    queue = IdxdWorkQueue(guest.portal, memory, block_on_fault=True)
    assert queue.record_page == ring + 3 * PAGE_SIZE
    await memory.write(ring, bytes(4 * PAGE_SIZE))  # as dma_alloc_coherent gives it
    await queue.enable()
    src, dst = (memory.allocate(size // PAGE_SIZE + 1, 2 * HUGE) + MALLOC_HEADER for _ in range(2))
    piece, records = size // DEPTH, ring + 2 * PAGE_SIZE
    data = bytes(range(256)) * (size // 256)
    await memory.write(src, data)
    children = [
        Descriptor(
            opcode=Opcode.MEMMOVE,
            flags=Flag.CRAV | Flag.RCR | Flag.BOF | (Flag.FENCE if n else Flag(0)),
            src=src + n * piece,
            dst=dst + n * piece,
            size=piece,
            completion_addr=Iova(records + n * COMPLETION_SIZE),
        ).to_bytes()
        for n in range(DEPTH)
    ]
    await memory.write(ring, b"".join(children))
    for n in range(0, DEPTH, BATCH):
        record = await queue.run(Opcode.BATCH, src=ring + n * WORK_DESCRIPTOR_SIZE, size=BATCH)
        assert record.status is Status.SUCCESS
    assert await memory.read(dst, size) == data


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
