"""The cost model: what counted events would have cost on hardware, every constant named in `costs.toml`.

The cost of a step is a sum of terms, each a number of events times a price; a price is a product of
constants, so the modelled time is linear in every single one.  Each term says who pays it: the vCPU that
faulted, the device whose DMA waits, the host, or nobody in particular for the work itself, the bytes.
Steps follow one another and nothing overlaps, but not all that takes time is counted, so that the modelled
time is no bound in either direction: it is for comparing designs.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from protocol.units import GIB, PAGE_SIZE

Values = Mapping[str, float]
Counts = Mapping[str, int]

S = 1e6  # in us, the unit of every modelled time
UNITS = {"us": 1.0, "ratio": 1.0, "share": 1.0, "s/GiB": S / GIB}
MAX = {"us": 1e9, "ratio": 1e6, "share": 1.0, "s/GiB": 1e6}
GIVEN = "--costs"  # the source of what the user set


class CostError(ValueError):
    """A file of costs that cannot be used; the text says where."""


class Payer(StrEnum):
    VCPU = "vcpu"
    DEVICE = "device"
    HOST = "host"
    WORK = "work"


@dataclass(frozen=True, slots=True)
class Constant:
    """`value` and the range of it, low..high, in `unit`; no source means that it is assumed."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    source: str
    why: str

    @property
    def ranged(self) -> bool:
        return self.low < self.high


@dataclass(frozen=True, slots=True)
class Term:
    """`events` of a step at `price` each, in us."""

    payer: Payer
    events: str
    price: Callable[[Values], float]


def _of(*names: str) -> Callable[[Values], float]:
    return lambda values: math.prod(values[name] for name in names)


def _pin(values: Values) -> float:
    """Of one page, without what clearing it takes."""
    return values["pin_gib"] * PAGE_SIZE * (1 - values["clear_share"])


def clear_page(values: Values) -> float:
    return values["pin_gib"] * PAGE_SIZE * values["clear_share"]


# `events` are counts of a Sample, or those that `events_of` derives.
TERMS = (
    Term(Payer.VCPU, "cpu_faults", _of("cpu_fault")),
    Term(Payer.VCPU, "cpu_faults_major", _of("swap_in")),
    Term(Payer.VCPU, "cleared_for_cpu", clear_page),
    Term(Payer.VCPU, "cpu_faults_mapped_twice", _of("map_page")),
    Term(Payer.DEVICE, "io_groups", _of("cpu_fault", "io_fault_factor")),
    Term(Payer.DEVICE, "io_pages_besides", _of("group_page")),
    Term(Payer.DEVICE, "io_faults_major", _of("swap_in")),
    Term(Payer.DEVICE, "cleared_for_io", clear_page),
    Term(Payer.DEVICE, "io_faults_mapped_twice", _of("map_page")),
    Term(Payer.HOST, "fault_retries", _of("fault_retry")),
    Term(Payer.HOST, "swap_ins_besides", _of("swap_in")),
    Term(Payer.HOST, "swap_outs", _of("swap_out")),
    Term(Payer.HOST, "pages_pinned", _pin),
    Term(Payer.HOST, "cleared_for_host", clear_page),
    Term(Payer.HOST, "table_pages_new", clear_page),
    Term(Payer.HOST, "notes", _of("note")),
    Term(Payer.HOST, "notes_mapped", _of("map_page")),
    Term(Payer.HOST, "splits", _of("split_leaf")),
    Term(Payer.HOST, "collapses", _of("split_leaf")),
    Term(Payer.HOST, "notifier_calls", _of("notifier_call")),
    Term(Payer.HOST, "flushes", _of("tlb_flush")),
    Term(Payer.HOST, "invalidations", _of("unmap_page")),
    Term(Payer.HOST, "invalidation_waits", _of("invalidation_wait")),
    Term(Payer.HOST, "iotlb_invalidations", _of("iotlb_invalidation")),
    Term(Payer.HOST, "devtlb_invalidations", _of("devtlb_invalidation")),
    Term(Payer.HOST, "kicks", _of("kick")),
    Term(Payer.HOST, "messages", _of("message")),
    Term(Payer.HOST, "pages_reported", _of("migrated_page")),
    Term(Payer.WORK, "cpu_bytes", _of("cpu_gib")),
    Term(Payer.WORK, "dma_bytes", _of("dma_gib")),
    Term(Payer.WORK, "work_descriptors", _of("work_descriptor")),
)


def events_of(grown: Counts, before: Counts, after: Counts) -> dict[str, float]:
    """What a step is charged for: `grown` counts, and what follows from gauges `before` and `after` it.

    A page is cleared for who allocated it, one that is read back from swap for nobody [mm memory.c,
    do_swap_page].  What no fault allocated or read back (a pin, the host's own access) is the host's.  Where
    KVM keeps a second root, a fault sets an entry in both.
    """

    def count(name: str) -> int:
        return grown.get(name, 0)

    cpu, io = count("cpu_faults"), count("io_faults")
    for_cpu = max(0, count("pages_allocated_cpu") - count("cpu_faults_major"))
    for_io = max(0, count("pages_allocated_io") - count("io_faults_major"))
    for_all = max(0, count("pages_allocated") - count("swap_ins"))
    twice = any(pages for name, pages in after.items() if name.startswith("table_pages.iommu."))
    tables = [name for name in after if name.startswith("table_pages.")]
    return {
        **grown,
        "cleared_for_cpu": for_cpu,
        "cleared_for_io": for_io,
        "cleared_for_host": max(0, for_all - for_cpu - for_io),
        "io_pages_besides": max(0, io - count("io_groups")),
        "swap_ins_besides": max(0, count("swap_ins") - count("cpu_faults_major") - count("io_faults_major")),
        "cpu_faults_mapped_twice": twice * max(0, cpu - count("cpu_faults_spurious")),
        "io_faults_mapped_twice": twice
        * max(0, io - count("io_faults_spurious") - count("io_faults_failed")),
        "table_pages_new": sum(max(0, after[name] - before.get(name, 0)) for name in tables),
    }


@dataclass(frozen=True, slots=True)
class Costs:
    """The constants in force."""

    constants: Mapping[str, Constant]

    def values(self, **changed: float) -> dict[str, float]:
        """In us (or as they are, ratios); `changed` are given in the constant's own unit."""
        return {
            name: changed.get(name, constant.value) * UNITS[constant.unit]
            for name, constant in self.constants.items()
        }

    def with_values(self, changed: Values) -> Costs:
        return Costs(
            {
                name: replaced(constant, changed[name]) if name in changed else constant
                for name, constant in self.constants.items()
            }
        )


def replaced(constant: Constant, value: float) -> Constant:
    """With the user's value; a range widens to hold it."""
    low, high = (constant.low, constant.high) if constant.ranged else (value, value)
    return replace(constant, value=value, low=min(low, value), high=max(high, value), source=GIVEN)


def paid(events: Mapping[str, float], values: Values) -> dict[Payer, float]:
    """What one step costs each payer, in us."""
    bill = dict.fromkeys(Payer, 0.0)
    for term in TERMS:
        bill[term.payer] += events.get(term.events, 0) * term.price(values)
    return bill


@cache
def default_costs() -> Costs:
    text = files("qemu_shim.study.compare").joinpath("costs.toml").read_text(encoding="utf-8")
    return Costs({name: _constant(name, row) for name, row in tomllib.loads(text).items()})


def _constant(name: str, row: Mapping[str, Any]) -> Constant:
    low, high = row.get("range", (row["value"], row["value"]))
    if not low <= row["value"] <= high or row["unit"] not in UNITS:
        raise CostError(f"{name}: {row['value']} {row['unit']}, range {low}..{high}")
    return Constant(name, row["value"], row["unit"], low, high, row.get("source", ""), row["why"])


def read_costs(path: Path | None) -> Costs:
    """The defaults, with those overridden that the file names: `name = number`, in the default's unit."""
    costs = default_costs()
    if path is None:
        return costs
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CostError(f"{path}: {error}") from error
    changed = {}
    for name, value in given.items():
        if name not in costs.constants:
            raise CostError(f"{path}: no constant is named {name!r}; there are {', '.join(costs.constants)}")
        # bool is an int to Python, and nan is in no range
        number = isinstance(value, int | float) and not isinstance(value, bool)
        unit = costs.constants[name].unit
        if not number or not 0 <= value <= MAX[unit]:
            raise CostError(f"{path}: {name} = {value!r} is not a number of {unit} from 0 to {MAX[unit]:g}")
        changed[name] = float(value)
    return costs.with_values(changed)
