"""Runs made up from the rules of the designs, for what works on runs: no daemon counted them."""

from __future__ import annotations

from collections import Counter

from qemu_shim.scenarios.run import Refusal, Run, Sample
from qemu_shim.vmm.designs import DESIGNS

WORKLOADS = (
    *("boot-touch", "device-first", "ring", "streaming", "balloon"),
    *("migration", "hotplug", "hugepages", "overcommit", "dmatest"),
)
RECLAIMED = ("streaming", "balloon", "overcommit")  # what is pinned has no part in it


def made_up(
    design: str, workload: str = "boot-touch", *, pages: int = 512, steps: int = 8, seed: int = 1
) -> Run:
    """CPU, then device, touch `pages` in `steps`; at the end some are read from swap."""
    run = Run(workload, design, seed, {"pages": pages})
    counts, gauges = Counter[str](), Counter[str]()
    pinned = design == "pinned"

    def sample(step: str) -> None:
        for owner in DESIGNS[design].owners:
            filled = pages if pinned else counts["cpu_faults"] + counts["io_faults"]
            gauges.update(dict.fromkeys((f"table_pages.{owner}.{n}" for n in (1, 2, 3, 4)), 0))
            gauges[f"table_pages.{owner}.1"] = -(-filled // 512)
            gauges[f"table_pages.{owner}.2"] = gauges[f"table_pages.{owner}.3"] = filled > 0
            gauges[f"table_pages.{owner}.4"] = 1
        run.samples.append(Sample(step, dict(counts), {name: int(n) for name, n in gauges.items()}))

    if pinned:
        counts.update(pages_pinned=pages, pages_allocated=pages)
        gauges["pinned_pages"] = pages
    sample("start")
    each = pages // steps
    for number in range(steps):
        allocated = 0 if pinned else each
        counts.update(cpu_faults=each, cpu_bytes=each * 4096, cpu_pages=each)
        counts.update(pages_allocated=allocated, pages_allocated_cpu=allocated)
        counts.update(notes=each * (design == "notifier"), notes_mapped=each * (design == "notifier") // 2)
        sample(f"touch {number}")
    for number in range(steps):
        counts.update(dma_bytes=each * 4096, dma_pages=each, work_descriptors=each)
        faults = {"mirror": each, "notifier": each - each // 2}.get(design, 0)
        counts.update(io_faults=faults, io_groups=-(-faults // 8))
        sample("first dma" if not number else f"dma {number}")
    if pinned and workload in RECLAIMED:
        run.refusals.append(Refusal("reclaim", "every page is pinned: nothing can be swapped out"))
    elif not pinned:
        counts.update(
            dict.fromkeys(("swap_ins", "swap_outs", "flushes", "invalidations"), 3),
            io_faults=3,
            io_groups=3,
            io_faults_major=3,
            invalidation_waits=3,
            kicks=6,
            iotlb_invalidations=3,
            devtlb_invalidations=3,
            notifier_calls=3 * len(DESIGNS[design].owners),
        )
    sample("reclaim")
    return run


def all_made_up(**how: int) -> list[Run]:
    return [
        made_up(design, workload, pages=512 * (number + 1), **how)
        for number, workload in enumerate(WORKLOADS)
        for design in DESIGNS
    ]
