"""`make schedules`: a small run of it, what it keeps, and what it says when something broke."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from simulator.campaign import CampaignEnd
from simulator.clean import Sums
from simulator.command import find
from simulator.search.explore import Found, RunEnd, Tally
from simulator.world.schedule import Judged

STORY_NAMES = ("migrate", "swap", "asleep")  # the last cannot be played where all is pinned


def run(where: Path, *names: str) -> tuple[int, str]:
    words = "--schedules 24 --seeds 0 --design pinned --workers 1 --record r.json --story"
    argv = [sys.executable, "-m", "simulator.clean", *words.split(" "), *names]
    ran = subprocess.run(argv, cwd=where, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def test_each_story_of_a_design_has_its_share_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    code, told = run(tmp_path, *STORY_NAMES)
    assert code == 0, told
    (pinned,) = json.loads((tmp_path / "r.json").read_text())["designs"]
    assert pinned["schedules"] == 24
    assert 1 < pinned["traces"] <= 24
    assert pinned["failed"] == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "build" / "schedules").iterdir()}
    assert len(kept) == 2
    assert run(tmp_path, *STORY_NAMES)[0] == 0
    assert {path: path.read_bytes() for path in kept} == kept, "what is run again is written behind the rest"


def test_what_breaks_is_told_with_the_line_that_repeats_it() -> None:
    sums = Sums()
    found = Found(3, 17, RunEnd("I6", "a page in two hands"), (0, 1), 5)
    sums.add(Judged(find, "slot", "mirror"), CampaignEnd(Tally(schedules=100, found=[found]), "done"))
    assert (sums.schedules, sums.failed) == (100, 1)
    assert sums.repeats == ["I6: qemu-shim sim slot --design mirror --seed 3 --schedules 17"]


def test_a_design_without_a_schedule_is_not_said_to_hold(tmp_path: Path) -> None:
    code, told = run(tmp_path, "asleep")
    assert (code, "none of asleep can be played on pinned" in told) == (2, True)
    assert not (tmp_path / "r.json").exists()
