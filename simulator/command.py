"""`qemu-shim sim`: a scenario under many schedules, and a failure that one line or a file repeats."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from qemu_shim.scenarios.files import BadFile, is_file, of_file
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.designs import DESIGNS, SHARED
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED
from simulator.campaign import NOTHING_PLAYED, Campaign, CampaignRefused, Progress, run_campaign
from simulator.faults.kinds import FAULTS, UnknownFaults, is_searched, kinds_of
from simulator.narrator import Narrator, diagram
from simulator.options import one_or_more
from simulator.planted.__main__ import described, listing
from simulator.planted.registry import PLANTED, UnknownPlant, plant_of
from simulator.search.exhaustive import HiddenDependenceError
from simulator.search.explore import Found, Player, Tally, nth, replayed, smallest
from simulator.search.replay import Replay
from simulator.search.story import Story, StoryError, from_text, to_text
from simulator.search.strategies import DEFAULT, STRATEGIES
from simulator.settle import settle
from simulator.stories.library import STORIES
from simulator.stories.story import SmallStory
from simulator.world.forked import Forked
from simulator.world.schedule import Judged, Onlooker

_KINDS: tuple[type[Scenario | SmallStory], ...] = (Scenario, SmallStory)
PLAYED: Mapping[str, Scenario | SmallStory] = {**STORIES, **WORKLOADS, **SCENARIOS}
SCHEDULES_OF_SHARD = (
    10  # a schedule of a whole scenario takes a second, and who waits for a failure wants it soon
)
OF_SMALL_SHARD = 100  # in one machine, which takes as long to bring up as ten to play
EXIT_FOUND = 1
NOT_AGAIN = "its story as it was played, not shrunk: played again by itself it does not fail like that"
MAY_BE_PLAYED = f"--strategy {DEFAULT} plays whatever there is"
_CUT_SHORT = {"interrupted": "; interrupted", "time": "; the --seconds are over"}


def find(name: str) -> Scenario | SmallStory:
    """A small story, a scenario or workload of the library, or a file's.  BadFile."""
    return of_file(name, _KINDS) if is_file(name) else PLAYED[name]


def main(argv: list[str]) -> int:
    """Exit status: 1 if a schedule broke an invariant, or none was played, or a worker died."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.replay is not None:
        if options.json:
            parser.error("--json is of a search: a replay is told as a diagram")
        return _replayed(parser, options.replay, options.trace)
    if options.trace is not None:
        parser.error("--trace is of a story: name it with --replay (--story FILE writes a failure's)")
    if options.scenario is None:
        parser.error("name a SCENARIO, or a story to --replay")
    judged = _judged(parser, options)
    small = isinstance(find(judged.scenario), SmallStory)
    campaign = Campaign(
        options.strategy,
        options.schedules,
        options.seed,
        shard=OF_SMALL_SHARD if small else SCHEDULES_OF_SHARD,
    )
    compares = not STRATEGIES[options.strategy].seeded  # one schedule with another
    try:
        ended = run_campaign(
            campaign,
            partial(begin_forks if compares and small else begin, judged),
            workers=options.workers,
            seconds=options.seconds,
            failures_max=options.failure,
            progress=_show if sys.stderr.isatty() else lambda progress: None,
        )
    except CampaignRefused as refused:
        print(f"qemu-shim: {refused}", file=sys.stderr)
        return EXIT_FAILED
    except HiddenDependenceError as error:
        print(
            f"qemu-shim: {judged.scenario} cannot be searched to an end: {error}; {MAY_BE_PLAYED}",
            file=sys.stderr,
        )
        return EXIT_FAILED
    tally = ended.tally
    if options.json:
        print(json.dumps(_document(judged, options, tally, ended.why), indent=1))
    else:
        counted = f"{tally.schedules:,} schedules by {options.strategy}, {len(tally.traces):,} traces"
        covered = f"{len(tally.covered):,} transitions and races, {len(tally.found):,} failed"
        print(f"{_told(judged)}: {counted}, {covered}{_CUT_SHORT.get(ended.why, '')}")
        if tally.summary:
            print(tally.summary)
        if tally.found:
            _report(judged, options, tally.found)
    if tally.found:
        return EXIT_FOUND
    if ended.why == "interrupted":
        return EXIT_INTERRUPTED
    if not tally.schedules:
        print(f"qemu-shim: {NOTHING_PLAYED}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def list_planted(*, as_json: bool) -> int:
    """`qemu-shim list --planted`."""
    planted = [described(plant) for plant in PLANTED.values()]
    print(json.dumps(planted, indent=1) if as_json else listing())
    return 0


def begin(judged: Judged, rounds: int, onlooker: Onlooker | None = None) -> Player:
    """In each process."""
    settle()
    return judged(rounds, onlooker)


def begin_forks(judged: Judged, _schedules: int) -> Player:
    """The same, where each schedule is to begin in the very same state: its machine is its own."""
    settle()
    return Forked(judged)


def faults_of(text: str) -> tuple[str, ...]:
    """As options have them."""
    try:
        return tuple(kinds_of(text))
    except UnknownFaults as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def searched_faults(text: str) -> tuple[str, ...]:
    """Of a search that compares schedules."""
    kinds = faults_of(text)
    if refused := _not_searched(kinds):
        raise argparse.ArgumentTypeError(refused)
    return kinds


def _not_searched(kinds: Sequence[str]) -> str:
    """Why a search that ends cannot have these; empty: it can."""
    others = ", ".join(kind for kind in kinds if not is_searched(kind))
    return others and f"{others}: a search that ends can have no such faults"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qemu-shim sim", description="A scenario in one process, under schedules that are chosen."
    )
    parser.add_argument(
        "scenario",
        nargs="?",
        metavar="SCENARIO | FILE.py",
        help="or a workload, or a small story: " + ", ".join(STORIES),
    )
    parser.add_argument(
        "--design", default=SHARED.name, metavar="D", help=f"{', '.join(DESIGNS)}, or one of FILE.py's own"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the strategy")
    parser.add_argument(
        "--schedules", type=one_or_more, default=200, metavar="N", help="at most so many (200)"
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="end after so many")
    parser.add_argument(
        "--failure", type=one_or_more, default=1, metavar="N", help="end at the N-th, and tell of that (1)"
    )
    parser.add_argument(
        "--strategy", choices=tuple(STRATEGIES), default=DEFAULT, help=f"what chooses them ({DEFAULT})"
    )
    parser.add_argument(
        "--plant",
        type=_plant,
        metavar="ID",
        help="with a bug put in (`qemu-shim list --planted`)",
    )
    parser.add_argument(
        "--faults",
        type=faults_of,
        default=(),
        metavar="KIND,...",
        help="at most one each a schedule, and once a machine has had its schedules all is played again "
        "without: " + "; ".join(f"{name}: {kind.what}" for name, kind in FAULTS.items()),
    )
    parser.add_argument(
        "--set", dest="param", action="append", default=[], metavar="NAME=N", help="of the scenario"
    )
    parser.add_argument("--workers", type=one_or_more, metavar="N", help="processes (one a core)")
    parser.add_argument("--story", type=Path, metavar="FILE", help="where to write a failure's story")
    parser.add_argument("--json", action="store_true", help="what it came to, as one JSON document")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="play a story")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="of a replay: every step, message and tracepoint, a line each",
    )
    return parser


def _plant(name: str) -> str:
    try:
        return plant_of(name).id
    except UnknownPlant as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _judged(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Judged:
    name = options.scenario
    if not is_file(name) and name not in PLAYED:
        parser.error(f"no scenario is called {name!r}; there are {', '.join(PLAYED)}")
    if len(name.split()) != 1:
        parser.error(f"{name!r}: a story names its scenario in one word: call the file otherwise")
    try:
        scenario = find(name)
    except BadFile as error:
        parser.error(str(error))
    if options.design not in scenario.playable:
        parser.error(
            f"{name} cannot be played on design {options.design}; it can on {', '.join(scenario.playable)}"
        )
    params = {}
    for given in options.param:
        param, _, value = given.partition("=")
        if refused := _not_set(scenario, param, value):
            parser.error(f"--set {given}: {refused}")
        params[param] = int(value)
    if not STRATEGIES[options.strategy].seeded:
        if isinstance(scenario, Scenario):
            parser.error(
                f"{name} with --strategy {options.strategy}: a search that ends is of a small story: "
                "in a whole scenario many wait by the clock, and go first or last by the steps of others"
            )
        for whose, kinds in (("--faults", options.faults), (f"the faults of {name}", scenario.faults)):
            if refused := _not_searched(kinds):
                parser.error(f"{whose} with --strategy {options.strategy}: {refused}")
    return Judged(find, name, options.design, params=params, plant=options.plant or "", faults=options.faults)


def _not_set(scenario: Scenario | SmallStory, name: str, value: str) -> str:
    """Why the parameter cannot be that; empty: it can."""
    if not scenario.params:
        return f"{scenario.name} has no parameters"
    param = scenario.params.get(name)
    if param is None:
        return f"NAME=N, where NAME is one of {', '.join(scenario.params)}"
    if not value.isdecimal():
        return f"{value!r} is not a number"
    return "" if param.low <= int(value) <= param.high else f"{value} is not in {param.low}..{param.high}"


def _are_kinds(text: str) -> bool:
    try:
        kinds_of(text)
    except UnknownFaults:
        return False
    return True


def _told(judged: Judged) -> str:
    """As a story has it."""
    return " ".join([judged.scenario, *(f"{name}={value}" for name, value in judged.params.items())])


def _show(progress: Progress) -> None:
    print(f"\r{progress.line()}", end="", file=sys.stderr, flush=True)


def repeat(judged: Judged, strategy: str, found: Found, among: Sequence[Found]) -> str:
    """The line that does; `among`: all that were found."""
    words = [f"--design {judged.design}", f"--strategy {strategy}", f"--seed {found.seed}"]
    words += [f"--schedules {found.schedule}", *(f"--set {name}={n}" for name, n in judged.params.items())]
    words += [f"--plant {judged.plant}"] if judged.plant else []
    words += [f"--faults {','.join(judged.faults)}"] if judged.faults else []
    words += [f"--failure {number}"] if (number := nth(found, among)) > 1 else []
    return f"qemu-shim sim {judged.scenario} {' '.join(words)}"


def _wanted(options: argparse.Namespace, among: Sequence[Found]) -> Found:
    """The failure that is told of; the last if there are fewer."""
    number: int = options.failure
    return among[min(number, len(among)) - 1]


def _report(judged: Judged, options: argparse.Namespace, among: Sequence[Found]) -> None:
    """Shrinking takes a while: what can be said before is."""
    found = _wanted(options, among)
    end, story = found.result, options.story
    print(f"FAILED: {end.invariant}: {end.sentence}")
    print(f"repeat: {repeat(judged, options.strategy, found, among)}")
    small, replays = smallest(partial(begin, judged), found)
    shrunk = found if small is None else small
    if small is None:
        print(f"{NOT_AGAIN}:")
    else:
        print(f"its story, {shrunk.chosen} answers that are not the default (after {replays} replays):")
    if shrunk.result.sentence != end.sentence:
        print(f"which says: {shrunk.result.sentence}")
    text = story_text(judged, shrunk)
    print(text, end="")
    if story is not None and _written(story, text):
        print(f"replay: qemu-shim sim --replay {story}")


def _document(judged: Judged, options: argparse.Namespace, tally: Tally, ended: str) -> dict[str, Any]:
    """What `--json` prints: of failures one; `ended` as of CampaignEnd."""
    said: dict[str, Any] = {
        "scenario": judged.scenario,
        "design": judged.design,
        "params": judged.params,
        "plant": judged.plant,
        "faults": judged.faults,
        "strategy": options.strategy,
        "seed": options.seed,
        "schedules": tally.schedules,
        "traces": len(tally.traces),
        "transitions_and_races": len(tally.covered),
        "failed": len(tally.found),
        "ended": ended,
        "summary": tally.summary,
    }
    if tally.found:
        found = _wanted(options, tally.found)
        small, _ = smallest(partial(begin, judged), found)
        shrunk = found if small is None else small
        said["failure"] = {
            "invariant": found.result.invariant,
            "sentence": found.result.sentence,
            "repeat": repeat(judged, options.strategy, found, tally.found),
            "fails_again": small is not None,
            "story": (text := story_text(judged, shrunk)),
            "story_says": shrunk.result.sentence,
        }
        if options.story is not None:
            _written(options.story, text)
    return said


def _written(story: Path, text: str) -> bool:
    try:
        story.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"qemu-shim: --story {story}: {error.strerror}", file=sys.stderr)
        return False
    return True


def story_text(judged: Judged, found: Found) -> str:
    """What `--replay` plays."""
    return to_text(
        Story(
            _told(judged),
            judged.design,
            judged.seed,
            found.answers,
            found.trace,
            judged.plant,
            found.result.invariant,
            found.before,
            ",".join(judged.faults),
        )
    )


def _replayed(parser: argparse.ArgumentParser, path: Path, trace: Path | None) -> int:
    try:
        story = from_text(path.read_text(encoding="utf-8"))
    except (StoryError, OSError) as error:
        parser.error(f"--replay {path}: {error}")
    judged = _judged_again(parser, path, story)
    narrator = Narrator(Replay(story.answers))
    with nullcontext() if trace is None else narrator.journal.tracing():
        end = replayed(partial(begin, judged, onlooker=narrator), story.before, narrator)
    if trace is not None:
        try:
            trace.write_text("".join(f"{event}\n" for event in narrator.events), encoding="utf-8")
        except OSError as error:
            parser.error(f"--trace {trace}: {error.strerror}")
    print(diagram(narrator), end="")
    if narrator.trace != story.trace:
        print("the trace is another one: the code is not what it was when the story was written")
    if end.invariant and story.invariant and end.invariant != story.invariant:
        print(f"it breaks {end.invariant}, and not {story.invariant} as the story says")
    print(f"{end.invariant}: {end.sentence}" if end.invariant else "all invariants held")
    return EXIT_FOUND if end.invariant else 0


def _judged_again(parser: argparse.ArgumentParser, path: Path, story: Story) -> Judged:
    """What the story is of; its text is somebody else's."""
    name, *given = story.scenario.split() or [""]
    try:
        playable = find(name).playable  # a file's designs are known from here on
    except KeyError:
        playable = []
    except BadFile as error:
        parser.error(f"--replay {path}: {error}; who sent the story has the file")
    known = [
        (bool(playable), f"scenario {name!r}"),
        (story.design in playable, f"design {story.design!r} of it"),
        (not story.plant or story.plant in PLANTED, f"planted bug {story.plant!r}"),
        (_are_kinds(story.faults), f"faults {story.faults!r}"),
        (all(word.partition("=")[2].isdigit() for word in given), f"parameters {' '.join(given)!r}"),
    ]
    for is_there, what in known:
        if not is_there:
            parser.error(
                f"--replay {path}: this program has no {what}: ask its sender which version it is of"
            )
    params = {param: int(value) for param, _, value in (word.partition("=") for word in given)}
    return Judged(find, name, story.design, story.seed, params, story.plant, tuple(kinds_of(story.faults)))
