"""The cost model against sums done by hand, and the sources of its constants against docs/references.md."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from qemu_shim.study.compare.costs import (
    GIVEN,
    TERMS,
    UNITS,
    CostError,
    Payer,
    clear_page,
    default_costs,
    events_of,
    paid,
    read_costs,
)
from tests.tidy.test_shape import reference_tags

CLEAR, PIN = 0.245e6 / 262144 * 0.8527, 0.245e6 / 262144 * (1 - 0.8527)
# Who pays what for one event: written down a second time, so that a slip in TERMS is one here too.
BILL: dict[str, tuple[Payer, float]] = {
    "cpu_faults": (Payer.VCPU, 2.0),
    "cpu_faults_major": (Payer.VCPU, 700.0),
    "cleared_for_cpu": (Payer.VCPU, CLEAR),
    "cpu_faults_mapped_twice": (Payer.VCPU, 0.055),
    "io_groups": (Payer.DEVICE, 20.0),
    "io_pages_besides": (Payer.DEVICE, 1.0),
    "io_faults_major": (Payer.DEVICE, 700.0),
    "cleared_for_io": (Payer.DEVICE, CLEAR),
    "io_faults_mapped_twice": (Payer.DEVICE, 0.055),
    "fault_retries": (Payer.HOST, 1.0),
    "swap_ins_besides": (Payer.HOST, 700.0),
    "swap_outs": (Payer.HOST, 5.0),
    "pages_pinned": (Payer.HOST, PIN),
    "cleared_for_host": (Payer.HOST, CLEAR),
    "table_pages_new": (Payer.HOST, CLEAR),
    "notes": (Payer.HOST, 0.1),
    "notes_mapped": (Payer.HOST, 0.055),
    "splits": (Payer.HOST, 0.782),
    "collapses": (Payer.HOST, 0.782),
    "notifier_calls": (Payer.HOST, 0.5),
    "flushes": (Payer.HOST, 2.0),
    "invalidations": (Payer.HOST, 0.069),
    "invalidation_waits": (Payer.HOST, 0.5),
    "iotlb_invalidations": (Payer.HOST, 1.0),
    "devtlb_invalidations": (Payer.HOST, 5.0),
    "kicks": (Payer.HOST, 0.0),
    "messages": (Payer.HOST, 0.0),
    "pages_reported": (Payer.HOST, 1.3),
    "cpu_bytes": (Payer.WORK, 0.1e6 / (1 << 30)),
    "dma_bytes": (Payer.WORK, 0.033e6 / (1 << 30)),
    "work_descriptors": (Payer.WORK, 1.0),
}
CLEARED = {"cleared_for_cpu", "cleared_for_io", "cleared_for_host", "table_pages_new"}
# Which events a constant prices; of several constants a price is the product.
PRICES = {
    "cpu_fault": {"cpu_faults", "io_groups"},
    "io_fault_factor": {"io_groups"},
    "group_page": {"io_pages_besides"},
    "fault_retry": {"fault_retries"},
    "swap_in": {"cpu_faults_major", "io_faults_major", "swap_ins_besides"},
    "swap_out": {"swap_outs"},
    "pin_gib": {"pages_pinned", *CLEARED},
    "clear_share": {"pages_pinned", *CLEARED},
    "map_page": {"cpu_faults_mapped_twice", "io_faults_mapped_twice", "notes_mapped"},
    "unmap_page": {"invalidations"},
    "split_leaf": {"splits", "collapses"},
    "note": {"notes"},
    "notifier_call": {"notifier_calls"},
    "tlb_flush": {"flushes"},
    "invalidation_wait": {"invalidation_waits"},
    "iotlb_invalidation": {"iotlb_invalidations"},
    "devtlb_invalidation": {"devtlb_invalidations"},
    "kick": {"kicks"},
    "message": {"messages"},
    "migrated_page": {"pages_reported"},
    "cpu_gib": {"cpu_bytes"},
    "dma_gib": {"dma_bytes"},
    "work_descriptor": {"work_descriptors"},
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "costs.toml"
    path.write_text(text)
    return path


def test_a_step_costs_what_a_hand_works_out() -> None:
    events = events_of(
        {"cpu_faults": 10, "cpu_faults_major": 1, "io_faults": 4, "io_groups": 2}
        | {"io_faults_major": 1, "swap_ins": 3}
        | dict.fromkeys(("flushes", "invalidation_waits", "iotlb_invalidations", "devtlb_invalidations"), 2)
        | {"invalidations": 2, "dma_bytes": 1 << 20, "work_descriptors": 5},
        {},
        {"pinned_pages": 0},
    )
    bill = paid(events, default_costs().values())
    assert bill[Payer.VCPU] == pytest.approx(10 * 2 + 700)
    assert bill[Payer.DEVICE] == pytest.approx(2 * 2 * 10 + 2 * 1 + 700)
    assert bill[Payer.HOST] == pytest.approx(700 + 2 * 2 + 2 * 0.5 + 2 * 1 + 2 * 5 + 2 * 0.069)
    assert bill[Payer.WORK] == pytest.approx(0.033e6 / 1024 + 5)


def test_pinning_a_gib_of_new_memory_costs_what_was_measured() -> None:
    pages = (1 << 30) // 4096
    events = events_of({"pages_pinned": pages, "pages_allocated": pages}, {}, {})
    assert paid(events, default_costs().values()) == {
        Payer.VCPU: 0,
        Payer.DEVICE: 0,
        Payer.HOST: pytest.approx(0.245e6),
        Payer.WORK: 0,
    }
    there_before = events_of({"pages_pinned": pages}, {}, {})
    assert paid(there_before, default_costs().values())[Payer.HOST] == pytest.approx(0.245e6 * (1 - 0.8527))


@pytest.mark.parametrize("event", sorted(BILL))
def test_an_event_is_paid_once_by_the_one_who_pays_it(event: str) -> None:
    payer, price = BILL[event]
    bill = paid({event: 3}, default_costs().values())
    assert bill == {it: pytest.approx(3 * price if it is payer else 0) for it in Payer}


def test_no_event_is_priced_in_two_terms_and_none_that_the_bill_does_not_know() -> None:
    assert sorted(term.events for term in TERMS) == sorted(BILL)


@pytest.mark.parametrize(("constant", "event"), [("message", "messages"), ("kick", "kicks")])
def test_what_a_kernel_has_for_nothing_has_a_price_where_somebody_gives_it_one(
    constant: str, event: str
) -> None:
    """By default it has none, so that the bill above would not see who pays it."""
    values = default_costs().values(**{constant: 7.0})
    assert paid({event: 2}, values) == {it: 14 if it is Payer.HOST else 0 for it in Payer}


def test_clearing_costs_the_same_before_and_after_the_pages_were_batched() -> None:
    """The source prints shares of both; what clears a page was not touched by the patch."""
    assert pytest.approx(0.245 * 0.8527, rel=0.02) == 0.27 * 0.7863
    assert clear_page(default_costs().values()) == pytest.approx(0.797, abs=5e-4)
    assert paid({"pages_pinned": 1}, default_costs().values())[Payer.HOST] == pytest.approx(0.138, abs=5e-4)


def test_a_cleared_page_is_paid_by_whose_fault_allocated_it_else_by_the_host() -> None:
    """A device's one fault that allocates a huge page pays for all of it, however often the CPU faulted."""
    grown = {"cpu_faults": 512, "io_faults": 1, "pages_allocated": 512 + 10}
    events = events_of(grown | {"pages_allocated_cpu": 7, "pages_allocated_io": 512}, {}, {})
    assert (events["cleared_for_cpu"], events["cleared_for_io"], events["cleared_for_host"]) == (7, 512, 3)


def test_a_page_read_back_from_swap_is_cleared_for_nobody() -> None:
    allocated = {"pages_allocated": 9, "pages_allocated_cpu": 5, "pages_allocated_io": 3}
    events = events_of(
        allocated | {"cpu_faults_major": 5, "io_faults_major": 1, "swap_ins": 7}, {}, {"pinned_pages": 0}
    )
    assert (events["cleared_for_cpu"], events["cleared_for_io"], events["cleared_for_host"]) == (0, 2, 0)
    assert events["swap_ins_besides"] == 1


def test_a_group_has_one_response_and_its_further_pages_are_apart() -> None:
    eight = events_of({"io_faults": 8, "io_groups": 1}, {}, {})
    alone = events_of({"io_faults": 8, "io_groups": 8}, {}, {})
    values = default_costs().values()
    assert paid(eight, values)[Payer.DEVICE] == pytest.approx(20 + 7 * 1)
    assert paid(alone, values)[Payer.DEVICE] == pytest.approx(8 * 20)


def test_a_second_root_of_kvm_is_filled_by_every_fault_that_fills_one() -> None:
    grown = {"cpu_faults": 5, "cpu_faults_spurious": 1, "io_faults": 4, "io_faults_failed": 1}
    one = events_of(grown, {}, {"table_pages.shared.1": 1})
    two = events_of(grown, {}, {"table_pages.cpu.1": 1, "table_pages.iommu.1": 1})
    assert (one["cpu_faults_mapped_twice"], one["io_faults_mapped_twice"]) == (0, 0)
    assert (two["cpu_faults_mapped_twice"], two["io_faults_mapped_twice"]) == (4, 3)


def test_new_table_pages_are_counted_where_they_grew() -> None:
    before = {"table_pages.cpu.1": 5, "table_pages.iommufd.1": 2}
    after = {"table_pages.cpu.1": 3, "table_pages.iommufd.1": 6, "pinned_pages": 9}
    assert events_of({}, before, after)["table_pages_new"] == 4


@pytest.mark.parametrize("name", sorted(default_costs().constants))
def test_a_constant_changes_the_terms_it_prices_and_no_other(name: str) -> None:
    costs = default_costs()
    before, after = costs.values(), costs.values(**{name: costs.constants[name].value / 2 + 0.1})
    changed = {term.events for term in TERMS if term.price(before) != term.price(after)}
    assert changed == PRICES[name]


def test_every_constant_is_sourced_or_assumed_and_says_what_it_is() -> None:
    for constant in default_costs().constants.values():
        assert constant.unit in UNITS, constant
        assert constant.why.endswith("."), constant
        for source in filter(None, constant.source.split("; ")):
            assert source.split()[0] in reference_tags(), f"{constant.name}: {source}"
    assert default_costs().constants["cpu_fault"].source == ""  # nobody published it


def test_every_sourced_constant_says_what_stands_there_or_that_it_was_not_read_again() -> None:
    text = files("qemu_shim.study.compare").joinpath("costs.toml").read_text(encoding="utf-8")
    for name, row in tomllib.loads(text).items():
        assert ("source" in row) == ("read" in row), name
        assert "not read again" in row.get("read", "not read again") or re.search(r"\d", row["read"]), name


def test_a_file_overrides_what_it_names(tmp_path: Path) -> None:
    costs = read_costs(written(tmp_path, "io_fault_factor = 90\nnote = 0.25\n"))
    changed = {
        name: (constant.value, constant.source)
        for name, constant in costs.constants.items()
        if constant != default_costs().constants[name]
    }
    assert changed == {"io_fault_factor": (90.0, GIVEN), "note": (0.25, GIVEN)}
    assert costs.constants["io_fault_factor"].high == 90.0, "the range holds the value"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("iofault = 3", "no constant is named 'iofault'; there are cpu_fault, io_fault_factor"),
        ("note = -1", "note = -1 is not a number of us from 0 to 1e+09"),
        ("note = nan", "note = nan is not a number"),
        ("note = true", "note = True is not a number"),
        ('note = "3"', "note = '3' is not a number"),
        ("clear_share = 1.5", "clear_share = 1.5 is not a number of share from 0 to 1"),
        ("[note]\nvalue = 1", "note = {'value': 1} is not a number"),
        ("note = ", "costs.toml: Invalid value"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(CostError) as error:
        read_costs(written(tmp_path, text))
    assert complaint in str(error.value)
    assert "costs.toml" in str(error.value)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CostError, match="No such file"):
        read_costs(tmp_path / "none.toml")
