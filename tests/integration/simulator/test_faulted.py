"""Stories under faults: whatever fails, what must hold holds, and all of it is served again behind it."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from qemu_shim.api import Context
from qemu_shim.cli import main
from simulator.command import find
from simulator.faults import plan
from simulator.faults.kinds import FAULTS
from simulator.faults.plan import Faults
from simulator.search.excerpt import Excerpt
from simulator.search.explore import Tally, explore
from simulator.search.replay import Recorded
from simulator.search.strategies import STRATEGIES
from simulator.search.walk import RandomWalk
from simulator.stories.story import SmallStory
from simulator.world.schedule import Judged
from simulator.world.scheduler import World
from tests.kit.refusals import may_refuse

FEW = 3
ROUNDS = 10
puts = Faults.put_into


SEED_OF_A_HANG_UP = {
    "R28-kvm-waits-for-the-lease": 1,
    "R28-hung-up-on-and-walking": 2,
    "domain-id-free-while-memory-is-taken-back": 5,
}


def played(
    story: str, design: str, faults: tuple[str, ...], schedules: int, plant: str = "", seed: int = 1
) -> Tally:
    """Until the first that fails."""
    run_one = Judged(find, story, design, plant=plant, faults=faults)(ROUNDS)
    return explore(run_one, STRATEGIES["random"].make(seed), seed, schedules, lambda tally: bool(tally.found))


@pytest.mark.parametrize("design", ["shared", "mirror"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_story_holds_whatever_fails(kind: str, design: str) -> None:
    assert played("migrate", design, (kind,), FEW).found == []


def test_a_daemon_that_died_or_stood_still_is_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Faults] = []

    def put_into(faults: Faults, world: World) -> None:
        made.append(faults)
        puts(faults, world)

    monkeypatch.setattr(Faults, "put_into", put_into)
    assert played("both", "shared", ("sigkill", "sigstop"), 12).found == []
    assert {kind for faults in made for kind in faults.met} == {"sigkill", "sigstop"}


@pytest.mark.parametrize("story", ["driver-dies", "kvm-dies"])
def test_who_is_killed_by_the_story_did_not_end_by_himself(story: str) -> None:
    assert played(story, "shared", ("evict",), FEW).found == []


def test_a_device_that_its_story_wants_off_the_bus_is_there_again() -> None:
    assert played("never", "shared", tuple(FAULTS), 20).found == []


def test_a_mistake_where_there_is_no_memory_is_found() -> None:
    """A vCPU's root is obsolete, and there is no page for another."""
    tally = played("slot", "managed", ("enomem",), 20, "root-put-and-kept")
    assert [found.result.invariant for found in tally.found] == ["R3"]


@pytest.mark.parametrize(
    ("plant", "story", "invariant"),
    [
        ("R28-kvm-waits-for-the-lease", "discard", "R28"),
        ("R28-hung-up-on-and-walking", "hang-up", "I9"),
        ("domain-id-free-while-memory-is-taken-back", "lend-hung", "R10"),
    ],
)
def test_a_mistake_where_a_channel_breaks_and_nobody_dies_is_found(
    plant: str, story: str, invariant: str
) -> None:
    """By what it is: kvmd waits for memory that is not given back; a unit that walks has what was to go."""
    tally = played(story, "managed", ("hangup",), 90, plant, SEED_OF_A_HANG_UP[plant])
    assert [found.result.invariant for found in tally.found] == [invariant]
    clean = played(story, "managed", ("hangup",), tally.schedules, seed=SEED_OF_A_HANG_UP[plant])
    assert clean.found == []


def test_what_a_fault_excuses_is_of_its_own_schedule() -> None:
    """There is no memory once in the first, which is survived; the second is judged as if there had not been
    anything."""

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(4)
        for _ in excerpt.rounds():
            with excerpt, may_refuse(errno.EMFILE, errno.ENOMEM):
                (await guest.machine.process.userfaultfd()).close()
            ctx.expect(False, "it was denied")

    judged = Judged(lambda _: SmallStory("told", "", play, faults=("enomem",)), "told", "shared")
    ends = [explore(judged(3), RandomWalk(seed), seed, 2).found for seed in range(12)]
    schedules = [[found.schedule for found in each] for each in ends]
    assert [2] in schedules, schedules


def test_an_invariant_that_is_named_is_excused_by_nothing() -> None:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(4)
        for _ in excerpt.rounds():
            with excerpt:
                await guest.write(0, b"store")
            ctx.expect(False, "I0: at each end")

    judged = Judged(lambda _: SmallStory("told", "", play, faults=("hangup", "enomem")), "told", "shared")
    for seed in range(8):
        (found,) = explore(judged(), RandomWalk(seed), seed, 1).found
        assert found.result.invariant == "I0"


def test_who_is_refused_what_his_story_is_about_has_not_played_it() -> None:
    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(4)
        for _ in excerpt.rounds():
            with excerpt:
                await guest.discard(0)

    for faults in ((), ("evict",)):
        judged = Judged(lambda _: SmallStory("told", "", play), "told", "pinned", faults=faults)
        end = judged()(RandomWalk(0))
        assert end.invariant == "check"
        assert "the story ended here: [EOPNOTSUPP] ballooning" in end.sentence


def test_who_is_refused_where_nothing_excuses_it_has_not_played_it_either() -> None:
    """Though he would not be when all is played again."""
    plays: list[int] = []

    async def play(ctx: Context, excerpt: Excerpt) -> None:
        guest = await ctx.boot_for(4)
        plays.append(len(plays))
        for _ in excerpt.rounds():
            with excerpt:
                if len(plays) == 1:
                    await guest.discard(0)

    judged = Judged(lambda _: SmallStory("told", "", play), "told", "pinned", faults=("evict",))
    end = judged()(RandomWalk(0))
    assert (end.invariant, plays) == ("check", [0, 1])
    assert "[EOPNOTSUPP] ballooning" in end.sentence


def test_nothing_is_searched_behind_the_death_of_who_opened_the_excerpt() -> None:
    """A VMM that is killed closes nothing; that all is played again is no part of the schedule."""
    lengths = []
    for seed in range(30):
        recorded = Recorded(RandomWalk(seed), steps=True)
        Judged(find, "migrate", "shared", faults=("sigkill",))()(recorded)
        if any(step.label == "qemu_shim" for step in recorded.steps):
            lengths.append(len(recorded.steps))
    assert len(lengths) > 3
    assert min(lengths) < 10, "it dies early"
    assert max(lengths) < 300


def test_the_same_answers_are_the_same_run() -> None:
    one, other = (played("discard", "shared", tuple(FAULTS), FEW) for _ in range(2))
    assert one.traces == other.traces
    assert len(one.traces) == FEW


def test_a_mistake_that_only_a_fault_shows_is_found_repeated_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An invalidation that timed out counts as done; without a device that is late nobody sees it."""
    story = tmp_path / "late.story"
    words = [
        "migrate",
        "--plant",
        "R18-time-out-is-an-ack",
        "--workers",
        "1",
        "--strategy",
        "random",
        "--seed",
        "1",
        "--schedules",
        "10",
    ]
    assert main(["sim", *words]) == 0
    assert main(["sim", *words, "--faults", "ite", "--story", str(story)]) == 1
    out = capsys.readouterr().out
    repeat = re.search(r"^repeat: qemu-shim (sim .+)$", out, re.M)
    assert repeat is not None
    assert "--faults ite" in repeat[1]
    assert "faults ite\n" in story.read_text(encoding="utf-8")
    assert main(["sim", "--replay", str(story)]) == 1
    replayed = capsys.readouterr().out
    assert "fault ite" in replayed
    assert "the trace is another one" not in replayed


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--faults", "rain"], "no faults are called rain; there are evict, "),
        (
            ["--faults", "evict,sigkill", "--strategy", "exhaustive"],
            "exhaustive: sigkill: a search that ends can have no such faults",
        ),
    ],
)
def test_faults_that_cannot_be_are_refused(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sim", "migrate", *words])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plant", "owner"),
    [("R15-driver-without-its-fence", "iommufdd"), ("R15-unit-without-its-fence", "device_sim")],
)
def test_a_fence_that_is_left_out_is_missed(plant: str, owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner's stores wait: two submissions end at once, and one of them never does."""
    monkeypatch.setattr(plan, "BUFFERED", (owner, owner))
    for planted, found in (("", []), (plant, ["R15"])):
        run_one = Judged(find, "moves", "notifier", plant=planted)(ROUNDS)
        tally = explore(run_one, STRATEGIES["rare"].make(1), 1, 60, lambda tally: bool(tally.found))
        assert [each.result.invariant for each in tally.found] == found
