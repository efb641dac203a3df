"""The same seed is the same run, byte for byte: in other processes, with other hashes, on another Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simulator.stories.library import STORIES
from tests.integration.simulator import digests, other_pythons
from tests.integration.simulator.drawn import SMALL
from tests.patience import WHOLE_RUN_S
from tests.told import TOLD

Tell = Callable[[str, object], None]
HASH_SEEDS = ("0", "77")  # sets and dicts of strings are iterated in another order, addresses are others

BY_HASH = """
from qemu_shim.vmm.designs import SHARED
from simulator.search.excerpt import Excerpt
from simulator.stories.library import STORIES
from simulator.world.journal import Journal
from simulator.world.system import play
from tests.integration.simulator.drawn import Drawn

class ByHash(Drawn):
    def choose(self, options):
        return hash(options[-1].label) % len(options)

excerpt, journal = Excerpt(ByHash(None)), Journal()
play(STORIES["discard"].scenario(excerpt), SHARED, excerpt, journal=journal)
print(journal.digest)
"""


def told_by(python: str | Path, hash_seed: str, *words: str) -> list[str]:
    return subprocess.run(
        [python, *words],
        cwd=other_pythons.ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        text=True,
        timeout=WHOLE_RUN_S,
        check=True,
    ).stdout.splitlines()


def digests_by(python: str | Path, hash_seed: str) -> list[str]:
    return told_by(python, hash_seed, "-m", digests.__name__)


@pytest.fixture(scope="module")
def first() -> list[str]:
    return digests_by(sys.executable, HASH_SEEDS[0])


def test_every_story_on_every_design_and_each_small_scenario_is_among_them(first: list[str]) -> None:
    stories = [line.split()[1:3] for line in first if line.startswith(digests.STORY)]
    assert stories == [[name, design] for name, story in STORIES.items() for design in story.playable]
    scenarios = [line.split()[1:] for line in first if line.startswith("scenario ")]
    assert [words[0] for words in scenarios] == list(SMALL)
    assert all(words[3:] == ["[]"] for words in scenarios), "one had problems"
    of_runs = re.findall(r"\b[0-9a-f]{32}\b", "\n".join(first))
    assert len(set(of_runs)) == len(stories) + len(scenarios), "two of them are the same run"


def test_whatever_ran_in_a_process_before_leaves_no_trace(first: list[str]) -> None:
    """This one has run tests; and each again, behind itself."""
    for name in ("discard", "slot"):
        for _ in range(2):
            assert f"{digests.STORY} {name} shared {digests.story_digest(name, 'shared')}" in first
    assert f"found {digests.found()}" in first


def test_another_process_with_other_hashes_does_the_same(first: list[str], record_property: Tell) -> None:
    """On another Python, which says both at once; on this one where there is none."""
    here = f"3.{sys.version_info.minor}"
    others = other_pythons.others()
    compared = 0
    if not others:
        record_property(TOLD, f"Python {here} was not compared: no other supported Python here")
    for minor, python in others.items():
        try:
            inside = other_pythons.with_packages(minor, python)
        except other_pythons.NoPackagesError as error:
            record_property(TOLD, f"Python {here} was not compared with 3.{minor}: {error}")
            continue
        assert digests_by(inside, HASH_SEEDS[1]) == first, f"Python 3.{minor} and {here} differ"
        record_property(TOLD, f"Pythons {here} and 3.{minor} do the same: {len(first)} runs")
        compared += 1
    if not compared:
        assert digests_by(sys.executable, HASH_SEEDS[1]) == first


def test_that_nothing_was_compared_is_said_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def refused(*_: object) -> Path:
        raise other_pythons.NoPackagesError("no network")

    def tell(_: str, what: object) -> None:
        told.append(what)

    monkeypatch.setattr(other_pythons, "with_packages", refused)
    monkeypatch.setitem(globals(), "digests_by", lambda *_: [])
    for there in ({}, {19: "python3.19"}):
        monkeypatch.setattr(other_pythons, "others", lambda there=there: there)
        test_another_process_with_other_hashes_does_the_same([], tell)
    nobody, nothing = map(str, told)
    assert nobody.endswith("was not compared: no other supported Python here")
    assert nothing.endswith("was not compared with 3.19: no network")


def test_a_choice_by_hash_would_be_seen() -> None:
    """Planted: what leaks from the interpreter decides once, and the digests differ."""
    one, other = (told_by(sys.executable, seed, "-c", BY_HASH) for seed in HASH_SEEDS)
    assert one != other
