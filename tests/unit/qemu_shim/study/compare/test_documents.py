"""The document: what is generated, and that nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.documents import FIGURES, DocumentError, check_places, filled, write_documents
from qemu_shim.study.compare.figures import compare
from qemu_shim.study.compare.rows import changes_of
from qemu_shim.study.compare.schema import Comparison
from tests.unit.qemu_shim.study.compare.runs import all_made_up, made_up

PLACES = "\n".join(f"<!-- figures: {name} -->\n<!-- end -->" for name in FIGURES)
TEXT = f"# By hand\n\n{PLACES}\n\nA sentence | with a bar.\n"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(all_made_up(), default_costs(), "qemu-shim compare --seed 1")


def test_figures_are_filled_in_and_sentences_stay(comparison: Comparison) -> None:
    text = filled(TEXT, comparison)
    assert text.startswith(
        "# By hand\n\n<!-- figures: command -->\n    qemu-shim compare --seed 1\n<!-- end -->\n"
    )
    assert text.endswith("<!-- end -->\n\nA sentence | with a bar.\n")
    assert "| `boot-touch` | 512 + 0 | 512 + 515 in 67 | 512 + 259 in 35 | 512 + 3 | 512 + 3 |" in text
    assert "- `balloon`, pinned: reclaim: every page is pinned: nothing can be swapped out" in text


def test_every_change_of_order_is_told_once(comparison: Comparison) -> None:
    assert any(workload.changes for workload in comparison.workloads)
    for workload in comparison.workloads:
        texts = changes_of(workload, comparison.costs)
        assert sum(text.count(",") + 1 for text in texts) == len(workload.changes)
        for it in workload.changes:
            side = f"{it.constant} {'above' if it.above else 'below'} {it.at:.3g}"
            (text,) = (t for t in texts if t.startswith(side) and f": {it.overtakes} leads " in t)
            assert it.overtaken in text.partition(" leads ")[2].split(", ")
            assert text in FIGURES["changes"](comparison)


def test_filling_twice_changes_nothing(comparison: Comparison) -> None:
    assert filled(filled(TEXT, comparison), comparison) == filled(TEXT, comparison)


def test_old_figures_go() -> None:
    first = filled(TEXT, compare([made_up("mirror")], default_costs(), "-"))
    second = filled(first, compare([made_up("shared")], default_costs(), "-"))
    assert "515" in first
    assert "515" not in second


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("figures: told", "figures: talk"),
        TEXT.replace("<!-- figures: told -->\n<!-- end -->", ""),
        TEXT + "<!-- figures: told -->\n<!-- end -->\n",
    ],
)
def test_a_document_without_a_place_for_each_figure_is_refused(text: str) -> None:
    with pytest.raises(DocumentError, match=r"comparison\.md has places for command, swept, ties"):
        check_places(text)


def test_all_three_are_written(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "comparison.md").write_text(TEXT)
    write_documents(comparison, tmp_path)
    assert Comparison.model_validate_json((tmp_path / "comparison.json").read_text()) == comparison
    assert (tmp_path / "comparison.html").read_text().endswith("</html>\n")
    assert (tmp_path / "comparison.md").read_text() == filled(TEXT, comparison)
