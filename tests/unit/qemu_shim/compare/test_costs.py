"""The cost model against sums done by hand, and the sources of its constants against docs/references.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_shim.compare.costs import (
    GIVEN,
    TERMS,
    UNITS,
    CostError,
    Payer,
    default_costs,
    events_of,
    paid,
    read_costs,
)
from tests.tidy.test_shape import reference_tags

# Which events a constant prices: written down a second time, so that a slip in TERMS is one here too.
PRICES = {
    "cpu_fault": {"cpu_faults", "io_faults"},
    "io_fault_factor": {"io_faults"},
    "fault_retry": {"fault_retries"},
    "swap_in": {"cpu_faults_major", "io_faults_major", "swap_ins_besides"},
    "swap_out": {"swap_outs"},
    "pin_gib": {
        *("pages_pinned", "cleared_for_cpu", "cleared_for_io", "cleared_for_host", "table_pages_new"),
    },
    "clear_share": {
        *("pages_pinned", "cleared_for_cpu", "cleared_for_io", "cleared_for_host", "table_pages_new"),
    },
    "map_page": {"cpu_faults_mapped_twice", "io_faults_mapped_twice", "notes_mapped"},
    "unmap_page": {"invalidations"},
    "split_leaf": {"splits", "collapses"},
    "note": {"notes"},
    "notifier_call": {"notifier_calls"},
    "tlb_flush": {"flushes"},
    "qi_message": {"qi_messages"},
    "iotlb_invalidation": {"iotlb_invalidations"},
    "devtlb_invalidation": {"devtlb_invalidations"},
    "message": {"messages"},
    "migrated_page": {"pages_reported"},
    "cpu_gib": {"cpu_bytes"},
    "dma_gib": {"dma_bytes"},
    "descriptor": {"descriptors"},
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "costs.toml"
    path.write_text(text)
    return path


def test_a_step_costs_what_a_hand_works_out() -> None:
    events = events_of(
        {"cpu_faults": 10, "cpu_faults_major": 1, "io_faults": 4, "io_faults_major": 1, "swap_ins": 3}
        | dict.fromkeys(("flushes", "qi_messages", "iotlb_invalidations", "devtlb_invalidations"), 2)
        | {"invalidations": 2, "dma_bytes": 1 << 20, "descriptors": 5},
        {},
        {"pinned_pages": 0},
    )
    bill = paid(events, default_costs().values())
    assert bill[Payer.VCPU] == pytest.approx(10 * 2 + 700)
    assert bill[Payer.DEVICE] == pytest.approx(4 * 2 * 10 + 700)
    assert bill[Payer.HOST] == pytest.approx(700 + 2 * 2 + 2 * 0.5 + 2 * 1 + 2 * 5 + 2 * 0.077)
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
    assert paid(there_before, default_costs().values())[Payer.HOST] == pytest.approx(0.245e6 * (1 - 0.786))


def test_a_cleared_page_is_paid_by_the_pin_else_by_who_faulted() -> None:
    events = events_of({"cpu_faults": 3, "io_faults": 1, "pages_allocated": 10, "pages_pinned": 2}, {}, {})
    assert (events["cleared_for_host"], events["cleared_for_cpu"], events["cleared_for_io"]) == (2, 6, 2)
    nobody = events_of({"pages_allocated": 10}, {}, {})
    assert (nobody["cleared_for_host"], nobody["cleared_for_cpu"], nobody["cleared_for_io"]) == (10, 0, 0)


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


def test_no_term_is_priced_by_nothing() -> None:
    assert {event for events in PRICES.values() for event in events} == {term.events for term in TERMS}


def test_every_constant_is_sourced_or_assumed_and_says_what_it_is() -> None:
    for constant in default_costs().constants.values():
        assert constant.unit in UNITS, constant
        assert constant.why.endswith("."), constant
        for source in filter(None, constant.source.split("; ")):
            assert source.split()[0] in reference_tags(), f"{constant.name}: {source}"
    assert default_costs().constants["cpu_fault"].source == ""  # nobody published it


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
