"""docs/results/comparison.*: what is generated there is what the figures beside it render to, and what is
said of them there and in the README is true.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict

import pytest

from qemu_shim.study.compare.costs import default_costs
from qemu_shim.study.compare.documents import FIGURES_BLOCK, filled
from qemu_shim.study.compare.report import render
from qemu_shim.study.compare.schema import VERSION, Comparison, DesignFigures
from qemu_shim.vmm.designs import DESIGNS
from tests.integration.test_designs_counts import PUBLISHED
from tests.tidy.claims import CLAIMS, PAGE, README, Claim, Read

AGAIN = "qemu-shim compare --from docs/results/comparison.json --docs docs/results writes it again"
SIZE_MAX = 300_000
# Numbers in a sentence that are no figure's: names, a kernel, one of 512 entries in per cent, and counts that
# another test holds.
NUMBERS = {"0011", "4K", "6.7", "0.2", *(str(faults) for _, _, faults in PUBLISHED)}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison.model_validate_json(PAGE.with_suffix(".json").read_bytes())


def test_the_page_has_the_figures_of_the_json(comparison: Comparison) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text, comparison) == text, AGAIN


def test_the_report_has_the_figures_of_the_json(comparison: Comparison) -> None:
    page = PAGE.with_suffix(".html").read_text(encoding="utf-8")
    assert render(comparison) == page, AGAIN
    assert len(page.encode()) < SIZE_MAX


def test_the_figures_were_priced_with_the_constants_of_today(comparison: Comparison) -> None:
    assert comparison.version == VERSION
    today = [asdict(constant) for constant in default_costs().constants.values()]
    assert [cost.model_dump() for cost in comparison.costs] == today, "run make comparison"


def test_a_changed_figure_is_seen(comparison: Comparison) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text.replace("| `boot-touch` |", "| `boot-tuch` |"), comparison) == text
    assert filled(text, comparison.model_copy(update={"command": "other"})) != text


# -- counts that hang together -----------------------------------------------------------------------------


def cases(comparison: Comparison) -> list[tuple[str, DesignFigures]]:
    return [(workload.workload, it) for workload in comparison.workloads for it in workload.designs]


def kicks_of(it: DesignFigures) -> int:
    """Of a unit: one to answer each group, one for each submission of invalidations."""
    return it.faults.io_groups + it.told.invalidation_waits


def messages_of(it: DesignFigures) -> range:
    """KVM is asked for each page of a group; a table of iommufdd's own is looked at first, so that nobody is
    asked for what it has or what no area shows, and asks again what the host overtook.  A note is one, its
    look another, an invalidation one.  Of the retries the figures do not say which were the device's.
    """
    faults, told = it.faults, it.told
    ours = it.design in ("mirror", "notifier")
    asked = faults.io - ours * (faults.io_spurious + faults.io_failed)
    least = asked + 2 * told.notes + told.invalidations
    return range(least, least + ours * faults.retries + 1)


def test_kicks_and_messages_are_what_a_hand_works_out_of_faults_notes_and_invalidations(
    comparison: Comparison,
) -> None:
    for name, it in cases(comparison):
        assert it.told.kicks == kicks_of(it), (name, it.design)
        assert it.told.messages in messages_of(it), (name, it.design)


@pytest.mark.parametrize("count", ["kicks", "messages"])
def test_one_kick_or_message_more_would_be_seen(comparison: Comparison, count: str) -> None:
    it = next(it for name, it in cases(comparison) if (name, it.design) == ("streaming", "shared"))
    told = it.told.model_copy(update={count: getattr(it.told, count) + 1})
    wrong = it.model_copy(update={"told": told})
    assert told.kicks != kicks_of(wrong) or told.messages not in messages_of(wrong)


# -- sentences ---------------------------------------------------------------------------------------------


def said(claim: Claim) -> str:
    return claim.sentence


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("claim", CLAIMS, ids=said)
def test_a_sentence_stands_there_and_is_true_of_the_figures(comparison: Comparison, claim: Claim) -> None:
    for path in claim.where:
        assert words(claim.sentence) in words(path.read_text(encoding="utf-8")), path
    assert claim.holds(Read(comparison)), "the figures say something else now: change the sentence"


def renamed(comparison: Comparison, names: Mapping[str, str]) -> Comparison:
    """The figures of each design under another one's name."""
    document = comparison.model_dump()
    for workload in document["workloads"]:
        for it in workload["designs"]:
            it["design"] = names[it["design"]]
        workload["order"] = [[names[name] for name in tier] for tier in workload["order"]]
        workload["unranked"] = {names[name]: why for name, why in workload["unranked"].items()}
    return Comparison.model_validate(document)


@pytest.mark.parametrize("claim", CLAIMS, ids=said)
def test_a_sentence_that_is_not_true_would_be_seen(comparison: Comparison, claim: Claim) -> None:
    turned = [dict(zip(DESIGNS, [*list(DESIGNS)[n:], *list(DESIGNS)[:n]], strict=True)) for n in range(1, 5)]
    assert not all(claim.holds(Read(renamed(comparison, names))) for names in turned)


def test_no_sentence_of_the_page_has_a_number_that_nothing_holds() -> None:
    """What is generated apart, and code, links and citations."""
    text = FIGURES_BLOCK.sub("", PAGE.read_text(encoding="utf-8"))
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|\[[^\]]*\]", " ", text)
    assert {number.rstrip(".,") for number in re.findall(r"\b\d[\d.,]*\w*", prose)} <= NUMBERS


def test_the_readme_has_the_designs_in_their_own_words() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(tuple(f"- `{name}`: " for name in DESIGNS))] == [
        f"- `{design.name}`: {design.summary}" for design in DESIGNS.values()
    ]
