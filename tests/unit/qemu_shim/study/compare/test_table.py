"""The table as a terminal shows it."""

from __future__ import annotations

import pytest

from qemu_shim.scenarios.run import Run
from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.figures import compare
from qemu_shim.study.compare.rows import bytes_text, us_text
from qemu_shim.study.compare.schema import Comparison
from qemu_shim.study.compare.table import as_text
from qemu_shim.vmm.designs import DESIGNS
from tests.unit.qemu_shim.study.compare.runs import all_made_up, made_up


def shown(comparison: Comparison) -> list[str]:
    return as_text(comparison).splitlines()


def compared(runs: list[Run]) -> Comparison:
    return compare(runs, default_costs(), "-")


@pytest.mark.parametrize("pages", [512, 1 << 21, 1 << 40])
def test_no_line_is_longer_than_100_columns(pages: int) -> None:
    lines = shown(compared([made_up(design, pages=pages) for design in DESIGNS]))
    assert max(map(len, lines)) <= 100


def test_a_column_a_design_and_a_block_a_workload() -> None:
    lines = shown(compared(all_made_up()))
    headings = [line.split() for line in lines if "mirror" in line and "shared" in line]
    assert headings[:1] == [["pinned", "mirror", "notifier", "managed", "shared"]]
    assert len([line for line in lines if line.strip().startswith("modelled time")]) == 10


def test_figures_stand_under_their_design() -> None:
    (row,) = (
        line for line in shown(compared([made_up("mirror"), made_up("shared")])) if "IO page faults" in line
    )
    assert row.split()[-2:] == ["515", "3"]


def test_a_refusal_is_a_footnote_and_a_failure_is_told() -> None:
    run = made_up("shared", "balloon")
    run.problems.append("I8: 1 page request waits")
    text = shown(compared([made_up("pinned", "balloon"), run]))
    assert "pinned¹" in text[1]
    lines = [line.strip() for line in text]
    assert "¹ pinned refused: reclaim: every page is pinned: nothing can be swapped out" in lines
    assert "FAILED, shared: I8: 1 page request waits" in lines


def test_a_design_that_did_nothing_has_an_empty_column() -> None:
    lines = shown(compared([Run("boot-touch", "mirror", 1, {}, problems=["down"]), made_up("shared")]))
    (row,) = (line for line in lines if "EPT violations" in line)
    assert row.split()[-2:] == ["-", "512"]


def test_what_has_no_source_is_named() -> None:
    text = " ".join(shown(compared([made_up("shared")])))
    assert "Constants without a source: cpu_fault, group_page, fault_retry" in text


def test_columns_without_room_follow_below() -> None:
    lines = shown(compared([made_up(design, pages=1 << 45) for design in DESIGNS]))
    words = [line.replace("¹", "").split() for line in lines]
    heads = [of_line for of_line in words if of_line and set(of_line) <= DESIGNS.keys()]
    assert [name for head in heads for name in head] == list(DESIGNS)
    assert len(heads) > 1


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0.00 us"),
        (0.055, "0.06 us"),
        (999.4, "999 us"),
        (999.6, "1.00 ms"),
        (12345, "12.3 ms"),
        (2.5e6, "2.50 s"),
    ],
)
def test_times_have_three_digits(us: float, text: str) -> None:
    assert us_text(us) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (4096, "4.00 KiB"), (1 << 21, "2.00 MiB"), (513 << 20, "513 MiB")]
)
def test_bytes_are_binary(number: int, text: str) -> None:
    assert bytes_text(number) == text
