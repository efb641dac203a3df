"""What a comparison says, as data: one schema for the table, the report, the documents and `--json`.

`Comparison.version` is 4.  It grows when a field changes its meaning or goes; a new field does not change it.
Times are modelled, in us, rounded to a nanosecond; bytes are bytes; pages are of 4 KiB.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

VERSION = 4


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RefusalFigure(Model):
    what: str
    why: str


class FaultFigures(Model):
    """All of a side's faults, and of them those that read from swap, found their entry there, failed; a
    device's are pages asked for, `io_groups` the page request groups they came in.
    """

    cpu: int
    cpu_major: int
    cpu_spurious: int
    io: int
    io_groups: int
    io_major: int
    io_spurious: int
    io_failed: int
    retries: int


class Latency(Model):
    """Of what somebody waited for, a vCPU for a fault, a device for a page request group; `classes`: how many
    fell into each of CLASSES.
    """

    count: int
    classes: list[int]
    min_us: float
    max_us: float
    avg_us: float


class PinnedFigures(Model):
    pages_max: int
    pages_end: int
    page_seconds: float


class Tables(Model):
    """When there were most of them: pages by owner, of level 1 to 5, and the bytes of all."""

    pages: dict[str, list[int]]
    bytes_max: int


class Told(Model):
    """Who was told what, and how: messages between daemons, kicks of a unit whose queues lie in memory."""

    notes: int
    notes_mapped: int
    notifier_calls: int
    flushes: int
    invalidations: int
    iotlb_invalidations: int
    devtlb_invalidations: int
    invalidation_waits: int
    kicks: int
    messages: int


class Work(Model):
    """`pages_missed` were written while logged and never reported dirty."""

    cpu_bytes: int
    cpu_pages: int
    dma_bytes: int
    dma_pages: int
    work_descriptors: int
    pages_allocated: int
    pages_allocated_cpu: int
    pages_allocated_io: int
    pages_pinned: int
    swap_ins: int
    swap_outs: int
    splits: int
    collapses: int
    pages_written: int
    pages_reported: int
    pages_missed: int


class Span(Model):
    """With the swept constants at the low end of their ranges, at their values, at the high end."""

    low_us: float
    us: float
    high_us: float


class Time(Model):
    """`plane`: the total is [0] + io_fault_factor * [1] + swap_in * [2]."""

    total: Span
    first_dma: Span | None
    paid_us: dict[str, float]
    plane: list[float]


class Series(Model):
    """After each step: modelled time, faults so far, bytes there are.  Of many steps every nth."""

    step: list[str]
    us: list[float]
    cpu_faults: list[int]
    io_faults: list[int]
    table_bytes: list[int]
    pinned_bytes: list[int]


class DesignFigures(Model):
    design: str
    faults: FaultFigures
    latency: dict[str, Latency]  # of `cpu`'s faults, `io`'s, `both`
    pinned: PinnedFigures
    tables: Tables
    told: Told
    work: Work
    time: Time
    series: Series
    refusals: list[RefusalFigure]
    problems: list[str]


class RankChange(Model):
    """With `constant` past `at`, away from its value, `overtakes` is cheaper than `overtaken`, by more than a
    tie.
    """

    constant: str
    at: float
    above: bool
    overtakes: str
    overtaken: str


class WorkloadFigures(Model):
    """`options`: of the daemons, beside the workload's own; `order`: the designs that did the same work,
    cheapest first, those that tie together; `unranked`: the others, and why they are in no ranking;
    `changes`: what would change the order.
    """

    workload: str
    seed: int
    params: dict[str, int]
    options: dict[str, str]
    designs: list[DesignFigures]
    order: list[list[str]]
    unranked: dict[str, str]
    changes: list[RankChange]


class CostFigure(Model):
    name: str
    value: float
    unit: str
    low: float
    high: float
    source: str
    why: str


class Comparison(Model):
    """`command` reproduces it."""

    version: int
    command: str
    costs: list[CostFigure]
    workloads: list[WorkloadFigures]
