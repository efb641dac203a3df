"""One run of a workload on a design, as data: what was counted after each step, and what was refused.

Counts are what the daemons count (STATS), never a time: the same workload, design and seed give the same
run on any machine.  What it would have cost is `costs`' to say.

`counts` grow from the machine's start: `Counters` (`counters.py`) has their names, units and meanings.
`gauges` are what is there at the end of a step: pinned_pages, resident_pages, table_pages.<owner>.<level>,
owner `cpu`, `iommu` (KVM's second root), `shared` or `iommufd`, level 1 (the tables of 4K leaves) to 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SEED_MAX = (1 << 63) - 1  # from 0: chance knows no sign, -1 would be 1 again


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known when the step called `step` is over."""

    step: str
    counts: dict[str, int]
    gauges: dict[str, int]


@dataclass(frozen=True, slots=True)
class Refusal:
    what: str
    why: str


@dataclass(slots=True)
class Run:
    """The first sample, `start`, is of the machine as it came up; the first DMA ends a step `first dma`."""

    workload: str
    design: str
    seed: int
    params: dict[str, int]
    samples: list[Sample] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # invariants that did not hold
    options: dict[str, str] = field(default_factory=dict)  # of its daemons, beside the workload's own
