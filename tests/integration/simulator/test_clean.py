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
from simulator.stories.library import STORIES
from simulator.world.schedule import Judged


def run(where: Path) -> tuple[int, str]:
    words = [
        "--schedules",
        "24",
        "--seeds",
        "0",
        "--design",
        "pinned",
        "--workers",
        "1",
        "--record",
        "r.json",
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "simulator.clean", *words],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_each_story_of_a_design_has_its_share_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    code, told = run(tmp_path)
    assert code == 0, told
    stories = sum("pinned" in story.playable for story in STORIES.values())
    (pinned,) = json.loads((tmp_path / "r.json").read_text())["designs"]
    assert pinned["schedules"] == stories * -(-24 // stories)
    assert stories <= pinned["traces"] <= pinned["schedules"]
    assert pinned["failed"] == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "build" / "schedules").iterdir()}
    assert len(kept) == stories
    assert run(tmp_path)[0] == 0
    assert {path: path.read_bytes() for path in kept} == kept, "what is run again is written behind the rest"


def test_what_breaks_is_told_with_the_line_that_repeats_it() -> None:
    sums = Sums()
    found = Found(3, 17, RunEnd("I6", "a page in two hands"), (0, 1), 5)
    sums.add(Judged(find, "slot", "mirror"), CampaignEnd(Tally(schedules=100, found=[found]), "done"))
    assert (sums.schedules, sums.failed) == (100, 1)
    assert sums.repeats == ["I6: qemu-shim sim slot --design mirror --seed 3 --schedules 17"]
