"""A file of a user in the simulator: its stories and scenarios, and what is said of one that has none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import run

import pytest

from qemu_shim.cli import main
from simulator.planted.registry import PLANTED
from simulator.search.story import Story, to_text

TWO = '''
"""A device stores to a page, alone and beside a discard of it."""

import trio

from qemu_shim.api import Context, Design, scenario
from simulator.api import Excerpt, story


@scenario()
async def alone(ctx: Context) -> None:
    guest = await ctx.boot_for(16)
    await guest.fill(guest.pages(1)[0])


@story(designs=("mirror", "shared"))
async def beside(ctx: Context, excerpt: Excerpt) -> None:
    guest = await ctx.boot_for(16)
    (page,) = guest.pages(1)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, page)
                await guest.discard(page)


@story()
async def not_twice(ctx: Context, excerpt: Excerpt) -> None:
    guest = await ctx.boot_for(16)
    for _ in excerpt.rounds():
        with excerpt:
            await guest.write(guest.pages(1)[0], b"store")
    ctx.expect(trio.current_time() < 10, "I0: is well only once")


@story()
async def sleeps(ctx: Context, excerpt: Excerpt) -> None:
    guest = await ctx.boot_for(16)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, guest.pages(1)[0])
                await trio.sleep(20e-6)


@story()
async def waits(ctx: Context, excerpt: Excerpt) -> None:
    guest = await ctx.boot_for(16)
    for _ in excerpt.rounds():
        with excerpt:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.fill, guest.pages(1)[0])
                await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("two.py").write_text(TWO, encoding="utf-8")
    return "two.py"


@pytest.mark.parametrize(("name", "design"), [("alone", "managed"), ("beside", "mirror")])
def test_both_kinds_are_played(name: str, design: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--design", design, "--schedules", "3", "--workers", "1"]
    assert main(["sim", f"{file}:{name}", *words]) == 0
    assert f"two.py:{name}: 3 schedules by mixed, 3 traces, " in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["mixed", "exhaustive"])
def test_what_shows_when_all_is_played_again_is_found_shrunk_and_replayed(
    strategy: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{file}:not-twice", "--strategy", strategy, "--faults", "enomem", "--schedules", "120"]
    assert main(["sim", *words, "--workers", "1", "--story", "it.story"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: I0: " in out
    assert "its story, 0 answers that are not the default" in out
    assert main(["sim", "--replay", "it.story"]) == 1
    assert "I0: is well only once" in capsys.readouterr().out


def test_a_replay_that_nobody_can_end_says_so_and_no_more(file: str) -> None:
    """In a process of its own: what is cut off in the middle goes when the interpreter likes it to."""
    Path("it.story").write_text(to_text(Story(f"{file}:waits", "shared", 1, (), 0)), encoding="utf-8")
    words = [sys.executable, "-m", "qemu_shim", "sim", "--replay", "it.story"]
    ended = run(words, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1].startswith("stuck: ")
    assert ended.stderr == ""


WRONG = [
    (
        ["{file}"],
        "two.py has 5 scenarios: say two.py:alone or two.py:beside or ",
    ),
    (["{file}:other"], "two.py has no scenario 'other', only alone, beside, not-twice, sleeps, waits"),
    (
        ["{file}:alone", "--strategy", "exhaustive"],
        "alone with --strategy exhaustive: a search that ends is of a small story",
    ),
    (["unmap", "--strategy", "delay"], "unmap with --strategy delay: a search that ends is of a small story"),
    (["none.py"], "none.py: there is no such file"),
    (["my own.py"], "'my own.py': a story names its scenario in one word: call the file otherwise"),
    (["{file}:beside", "--design", "pinned"], "cannot be played on design pinned; it can on mirror, shared"),
    (
        ["{file}:beside", "--plant", "R7-no-device"],
        "no planted bug is called 'R7-no-device'; there are R7-",
    ),
]


@pytest.mark.parametrize(("words", "why"), WRONG, ids=[why for _, why in WRONG])
def test_what_is_wrong_is_a_sentence(
    words: list[str], why: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sim", *(word.format(file=file) for word in words)])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_story_that_goes_by_the_clock_is_not_searched_to_an_end(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sim", f"{file}:sleeps", "--strategy", "exhaustive"]) == 1
    said = capsys.readouterr().err
    assert "qemu-shim: two.py:sleeps cannot be searched to an end: qemu_shim<timer is on offer beside" in said
    assert "--strategy mixed plays whatever there is" in said


def test_a_story_without_its_file_says_who_has_it(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sent.story").write_text(to_text(Story("mine.py", "shared", 1, (), 0)), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["sim", "--replay", "sent.story"])
    assert "mine.py: there is no such file; who sent the story has the file" in capsys.readouterr().err


def test_list_says_which_bugs_can_be_planted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--planted"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PLANTED)
    assert main(["list", "--planted", "--json"]) == 0
    assert {it["id"]: it["invariant"] for it in json.loads(capsys.readouterr().out)} == {
        name: plant.invariant for name, plant in PLANTED.items()
    }
