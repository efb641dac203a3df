"""Toy programs whose interleavings can be enumerated in full: the oracle of the strategies.

A few processes, each one sequence of operations on words, locks and channels; what a channel delivers runs a
handler in its receiver, when that is idle, as a daemon's loop does.  `every_run` takes every answer at every
choice; `order_of` is a run's Mazurkiewicz trace by its definition, pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from simulator.search.explore import RunEnd
from simulator.search.option import STOP, Option, Strategy, Touch, dependent


@dataclass(frozen=True)
class Op:
    """`what`: load, store, skip_if_zero, send, store_send, store_pick, lock, unlock, pick,
    sleep: until nobody else can do anything, and everybody who sleeps for less has been woken; or
    cut: a store in which the run ends, so that nobody is told of it.
    """

    what: str
    on: str = ""
    value: int = 0  # to store; how many operations to skip; of how many to pick; how long to sleep
    to: str = (
        ""  # store_send: the channel, however full; store_pick: the word, with what is picked behind its name
    )


@dataclass(frozen=True)
class ToyChannel:
    receiver: str
    handler: tuple[Op, ...]
    capacity: int = 8


@dataclass(frozen=True)
class Program:
    processes: dict[str, tuple[Op, ...]]
    channels: dict[str, ToyChannel] = field(default_factory=dict)


class ToyMachine:
    """A program under way."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.left = {name: list(ops) for name, ops in program.processes.items()}
        self.loaded = dict.fromkeys(program.processes, 0)
        self.words: dict[str, int] = {}
        self.holder: dict[str, str] = {}
        self.waiting = dict.fromkeys(program.channels, 0)
        self.picked: list[int] = []
        self.running = ""
        self.cut = False
        self.inside: tuple[str, Op] | None = None  # of a step that goes on in one of several ways, at once
        self.seen: list[tuple[str, str, int]] = []  # process, word, value: what a judge looks at

    def options(self) -> list[Option]:
        """Who took the last step may stay; behind it processes, then channels, in order."""
        if self.inside:
            name, op = self.inside
            ways = range(op.value)
            return [Option(name + "/pick", f"{op.to} {way}", _touched((name, True))) for way in ways]
        found = []
        for name, ops in self.left.items():
            if ops and self._may(name, ops[0]):
                found += self._options_of(name, ops[0])
        for name, channel in self.program.channels.items():
            if self.waiting[name] and not self.left[channel.receiver]:
                touches = _touched((name, True), (channel.receiver, True))
                found.append(Option(f"{channel.receiver}<{name}", "deliver", touches))
        if self._sleeps:
            found = [option._replace(touches=option.touches | _TIME_STANDS) for option in found]
        return sorted(found, key=lambda option: option.actor != self.running) or self._timer()

    @property
    def _sleeps(self) -> bool:
        return any(op.what == "sleep" for ops in self.program.processes.values() for op in ops)

    def _timer(self) -> list[Option]:
        asleep = [(ops[0].value, name) for name, ops in self.left.items() if ops and ops[0].what == "sleep"]
        return [
            Option(f"{name}<timer", "time is up", _touched((name, True), ("clock", True)))
            for _, name in sorted(asleep)[:1]
        ]

    def _may(self, name: str, op: Op) -> bool:
        if op.what == "lock":
            return op.on not in self.holder
        if op.what == "sleep":
            return False
        return op.what != "send" or self.waiting[op.on] < self.program.channels[op.on].capacity

    def _options_of(self, name: str, op: Op) -> list[Option]:
        own = (name, True)
        label = f"{op.what} {op.on}"
        match op.what:
            case "load":
                return [Option(name, label, _touched(own, (op.on, False)))]
            case "store" | "cut" | "lock" | "unlock" | "send":
                return [Option(name, f"{label} {op.value}", _touched(own, (op.on, True)))]
            case "store_send" | "store_pick":  # that it sends as well is told afterwards
                return [Option(name, f"{label} {op.value}", _touched(own, (op.on, True)))]
            case "pick":
                return [Option(name, f"{label} {value}", _touched(own)) for value in range(op.value)]
        return [Option(name, label, _touched(own))]

    def take(self, option: Option) -> Option:
        """Takes the step; returns it with all it touched."""
        self.running = option.actor
        if self.inside:
            (name, op), self.inside = self.inside, None
            word = op.to + option.label.split()[-1]
            self.words[word] = 2
            return Option(option.actor, option.label, option.touches | _touched((word, True)))
        receiver, _, name = option.actor.partition("<")
        if name == "timer":
            self.left[receiver].pop(0)
            return option
        if name:
            channel = self.program.channels[name]
            self.waiting[name] -= 1
            self.left[receiver] = list(channel.handler)
            return option
        name, op = option.actor, self.left[option.actor].pop(0)
        match op.what:
            case "load":
                self.loaded[name] = self.words.get(op.on, 0)
                self.seen.append((name, op.on, self.loaded[name]))
            case "store" | "cut":
                self.words[op.on] = op.value
                self.cut = op.what == "cut"
            case "store_send":
                self.words[op.on] = op.value
                self.waiting[op.to] += 1
                return Option(name, option.label, option.touches | _touched((op.to, True)))
            case "store_pick":
                self.words[op.on] = 1
                self.inside = name, op
            case "skip_if_zero":
                if not self.loaded[name]:
                    del self.left[name][: op.value]
            case "send":
                self.waiting[op.on] += 1
            case "lock":
                self.holder[op.on] = name
            case "unlock":
                del self.holder[op.on]
            case "pick":
                self.picked.append(int(option.label.split()[-1]))
                self.words[f"picked by {name}"] = self.picked[-1]
        return option

    def outcome(self) -> tuple[object, ...]:
        return (sorted(self.words.items()), sorted(self.waiting.items()), sorted(self.loaded.items()))


def _touched(*places: tuple[str, bool]) -> frozenset[Touch]:
    return frozenset(Touch(place, writes) for place, writes in places)


_TIME_STANDS = _touched(("clock", False))


@dataclass
class ToyRun:
    steps: list[Option]
    answers: list[int]
    machine: ToyMachine
    stopped: bool = False
    failed: bool = False


Judge = Callable[[ToyMachine], bool]


def play(program: Program, strategy: Strategy, judge: Judge = lambda machine: False) -> ToyRun:
    """One run under `strategy`; `judge` says at each step whether an invariant is broken."""
    machine = ToyMachine(program)
    run = ToyRun([], [], machine)
    while options := machine.options():
        answer = 0
        if len(options) > 1:
            answer = strategy.choose(options)
            if answer == STOP:
                run.stopped = True
                return run
            run.answers.append(answer)
        step = machine.take(options[answer])
        run.steps.append(step)
        if machine.cut:
            return run
        if strategy.watches:
            strategy.took(step)
        if judge(machine):
            run.failed = True
            return run
    return run


def every_schedule(
    program: Program, strategy: Strategy, judge: Judge = lambda machine: False, limit: int = 100_000
) -> Iterator[ToyRun]:
    """All runs that `strategy` wants."""
    for _ in range(limit):
        run = play(program, strategy, judge)
        yield run
        if not strategy.ended(run.failed):
            return
    raise AssertionError(f"{limit} runs, and still another one")


class Given:
    """Strategy: answers, then 0; how many there were to choose from."""

    watches = False

    def __init__(self, answers: Sequence[int]) -> None:
        self.answers, self.widths = answers, list[int]()

    def choose(self, options: Sequence[Option]) -> int:
        self.widths.append(len(options))
        place = len(self.widths) - 1
        return self.answers[place] if place < len(self.answers) else 0

    def took(self, step: Option) -> None: ...

    def ended(self, failed: bool) -> bool:
        return False

    def others(self) -> Iterator[list[int]]:
        """Answers of the runs that leave this one behind the answers it was given."""
        for place in range(len(self.answers), len(self.widths)):
            zeros = [0] * (place - len(self.answers))
            for answer in range(1, self.widths[place]):
                yield [*self.answers, *zeros, answer]


def every_run(program: Program, judge: Judge = lambda machine: False) -> Iterator[ToyRun]:
    """Brute force: each answer at each choice."""
    todo: list[list[int]] = [[]]
    while todo:
        answers = todo.pop()
        given = Given(answers)
        yield play(program, given, judge)
        todo += given.others()


Order = frozenset[tuple[tuple[str, int, str], tuple[str, int, str]] | tuple[str, int, str]]


def order_of(steps: Sequence[Option]) -> Order:
    """Each step, by actor, number and label; and each pair of dependent ones, in their order."""
    named, counts = [], dict[str, int]()
    for step in steps:
        counts[step.actor] = counts.get(step.actor, 0) + 1
        named.append((step.actor, counts[step.actor], step.label))
    pairs = [
        (named[one], named[other])
        for one, other in combinations(range(len(steps)), 2)
        if steps[one].actor == steps[other].actor or dependent(steps[one].touches, steps[other].touches)
    ]
    return frozenset([*named, *pairs])


def stuck(run: ToyRun) -> bool:
    """Is somebody left waiting who never got to go on?"""
    return any(run.machine.left.values()) or any(run.machine.waiting.values())


LOCKED_STORE = (Op("lock", "L"), Op("store", "y", 1), Op("unlock", "L"))
PROGRAMS: dict[str, tuple[Program, int]] = {
    "writers of one word: n!": (Program({name: (Op("store", "x", 1),) for name in "ABC"}), 6),
    "readers of one word": (Program({name: (Op("load", "x"),) for name in "ABC"}), 1),
    "each its own word": (Program({name: (Op("store", name.lower()),) * 2 for name in "ABC"}), 1),
    "a reader beside two stores": (
        Program({"A": (Op("store", "x", 1), Op("store", "x", 2)), "B": (Op("load", "x"),)}),
        3,
    ),
    "store buffering": (
        Program({"A": (Op("store", "x", 1), Op("load", "y")), "B": (Op("store", "y", 1), Op("load", "x"))}),
        3,
    ),
    "one lock, three holders": (Program(dict.fromkeys("ABC", LOCKED_STORE)), 6),
    "the lock is asked for late": (Program({"A": LOCKED_STORE, "B": (Op("store", "z"), *LOCKED_STORE)}), 2),
    "two channels of one process": (
        Program(
            {"A": (Op("send", "c"),), "B": (Op("send", "d"),), "C": ()},
            {"c": ToyChannel("C", (Op("store", "x", 1),)), "d": ToyChannel("C", (Op("store", "x", 2),))},
        ),
        2,
    ),
    "one channel keeps its order": (
        Program({"A": (Op("send", "c"),) * 3, "C": ()}, {"c": ToyChannel("C", (Op("store", "x", 1),))}),
        5,  # three deliveries, each behind its send: Catalan's number
    ),
    "a full channel": (
        Program(
            {"A": (Op("send", "c"),), "B": (Op("send", "c"),), "C": ()},
            {"c": ToyChannel("C", (Op("load", "x"),), capacity=1)},
        ),
        2,
    ),
    "two ways to go on within a step": (
        Program({"A": (Op("store_pick", "x", 2, to="y"),), "B": (Op("store", "y0", 7), Op("load", "x"))}),
        5,  # three places for the step where it goes on to y0, and else two
    ),
    "one way races, the other does not": (
        Program(
            {
                "A": (Op("load", "y0"), Op("load", "y"), Op("store_pick", "y0", 2, to="y")),
                "B": (Op("load", "x"), Op("load", "y1"), Op("store", "y1")),
                "C": (Op("load", "y1"), Op("load", "y1")),
            }
        ),
        21,
    ),
    "all ways of a step asleep": (
        Program(
            {"A": (Op("send", "c"), Op("store_pick", "x", 2, to="y")), "B": (Op("load", "x"),)},
            {"c": ToyChannel("B", (Op("load", "x"),))},
        ),
        6,
    ),
    "two ways to go on": (Program({"A": (Op("pick", "", 3), Op("pick", "", 2)), "B": (Op("load", "x"),)}), 6),
    "nothing comes from behind a timer": (
        Program(
            {"A": (Op("store", "x", 1), Op("sleep", "", 1), Op("store", "x", 2)), "B": (Op("load", "x"),)}
        ),
        2,
    ),
    "behind a timer the others are there again": (
        Program(
            {
                "A": (Op("store", "x", 1), Op("sleep", "", 2), Op("send", "c"), Op("store", "x", 2)),
                "B": (Op("load", "x"),),
            },
            {"c": ToyChannel("B", (Op("load", "x"),))},
        ),
        4,
    ),
    "two timers": (
        Program(
            {name: (Op("store", "x"), Op("sleep", "", n), Op("store", "x")) for n, name in enumerate("AB")}
        ),
        2,
    ),
    "the run is cut in its last step": (
        Program({"A": (Op("cut", "x", 1),), "B": (Op("store", "x", 2),)}),
        2,
    ),
    "a word that only the bad schedule touches": (
        Program(
            {
                "A": (Op("load", "x"), Op("skip_if_zero", "", 1), Op("store", "z", 1)),
                "B": (Op("store", "x", 1), Op("load", "z")),
            }
        ),
        3,
    ),
}


@dataclass(frozen=True, slots=True)
class Anew:
    """A player of which each schedule has a machine of its own."""

    play: Callable[[Strategy], RunEnd]

    def __call__(self, strategy: Strategy) -> RunEnd:
        return self.play(strategy)

    def finish(self) -> RunEnd:
        return RunEnd()

    def renew(self) -> None: ...
