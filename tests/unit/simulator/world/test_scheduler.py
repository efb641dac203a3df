"""Threads of toy processes on the kernel in memory: who goes on when, and what time it is."""

from __future__ import annotations

import select
import socket
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from protocol.kernel.port import SharedEvent
from protocol.rpc.session import Kind, header
from protocol.units import PAGE_SIZE
from simulator.kernel.process import SimProcess
from simulator.search.excerpt import Excerpt
from simulator.search.option import STOP, Option, Strategy, Touch, dependent, is_within
from simulator.search.replay import Replay
from simulator.world import scheduler
from simulator.world.fate import Fate
from simulator.world.journal import Journal
from simulator.world.limits import LIMIT_NS, LIMIT_STEPS, Stopped, Stuck
from simulator.world.scheduler import STEP_NS, World
from tests.unit.simulator.world.toys import Script, finish, made


def test_by_default_who_runs_goes_on() -> None:
    told: list[str] = []
    world = World(Script())

    def body(process: SimProcess) -> None:
        for n in range(3):
            world.point(f"point {n}")
            told.append(f"{process.name}{n}")

    made(world, a=body, b=body)
    finish(world)
    assert told == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_another_comes_between_where_the_strategy_says() -> None:
    told: list[str] = []
    world = World(Script("b: begins", "a: point 1"))

    def body(process: SimProcess) -> None:
        for n in range(3):
            told.append(f"{process.name}{n}")
            world.point(f"point {n}")

    made(world, a=body, b=body)
    finish(world)
    assert told == ["b0", "b1", "b2", "a0", "a1", "a2"] or told[:1] == ["b0"]
    assert sorted(told) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def listener(process: SimProcess) -> None:
    sock = process.listen(Path("/run/here"), None)
    poller = process.poller()
    poller.register(sock.fileno(), select.EPOLLIN)
    assert poller.poll(10.0, 8), "somebody connects in time"
    peer, _ = sock.accept()
    poller.register(peer.fileno(), select.EPOLLIN)
    assert [fd for fd, _ in poller.poll(10.0, 8)] == [peer.fileno()]
    assert peer.recv(100) == b"hello"
    peer.send(b"welcome")
    peer.close()


def caller(process: SimProcess) -> None:
    sock = process.connect(Path("/run/here"))
    sock.send(b"hello")
    poller = process.poller()
    poller.register(sock.fileno(), select.EPOLLIN)
    assert poller.poll(10.0, 8)
    assert sock.recv(100) == b"welcome"
    sock.close()


def test_a_message_wakes_who_waits_for_it_and_costs_no_time_to_speak_of() -> None:
    world = World(Script())
    made(world, server=listener, client=caller)
    finish(world)
    assert 0 < world.now_ns() < 1_000_000


def test_what_is_ready_is_told_one_by_one_in_the_order_of_the_strategy() -> None:
    told: list[int] = []
    strategy = Script("event3")
    world = World(strategy)
    made(world, a=lambda process: _three_events(process, told))
    finish(world)
    assert told == [3, 1, 2]
    assert strategy.offered[0] == [f"a<a.event{n}: is told" for n in (1, 2, 3)]


def _three_events(process: SimProcess, told: list[int]) -> None:
    events: list[SharedEvent] = [process.event() for _ in range(3)]
    poller = process.poller()
    for event in events:
        poller.register(event.fd, select.EPOLLIN)
        event.signal()
    for _ in events:
        ((fd, _),) = poller.poll(1.0, 8)
        told.append(1 + [event.fd for event in events].index(fd))
        events[told[-1] - 1].drain()


def test_time_jumps_to_the_first_deadline_when_nothing_can_happen() -> None:
    woken: list[tuple[str, int]] = []
    world = World(Script())

    def sleeper(seconds: float) -> Callable[[SimProcess], None]:
        def body(process: SimProcess) -> None:
            assert process.poller().poll(seconds, 8) == []
            woken.append((process.name, process.monotonic_ns() // 10**9))

        return body

    made(world, late=sleeper(5.0), early=sleeper(2.0))
    finish(world)
    assert woken == [("early", 2), ("late", 5)]


def test_who_can_never_go_on_is_told_of() -> None:
    world = World(Script())
    made(world, a=lambda process: world.wait([], None))
    with pytest.raises(Stuck, match="a waits"):
        finish(world)
    world.close()


def test_the_step_behind_which_nobody_can_go_on_is_told_of() -> None:
    world = World(strategy := Script())

    def body(process: SimProcess) -> None:
        world.point("last")
        world.touch({Touch("place", True)})
        world.wait([], None)

    made(world, a=body)
    with pytest.raises(Stuck):
        finish(world)
    assert strategy.taken[-1].label == "last"
    assert Touch("place", True) in strategy.taken[-1].touches
    world.close()


def test_rounds_of_watchdogs_end_with_the_hour() -> None:
    world = World(Script())

    def watchdog(process: SimProcess) -> None:
        while True:
            world.wait([], 60.0)

    made(world, a=watchdog)
    with pytest.raises(Stuck):
        finish(world)
    assert world.now_ns() <= LIMIT_NS
    world.close()


def test_a_strategy_that_wants_no_more_is_obeyed() -> None:
    class Enough(Script):
        def choose(self, options: Sequence[Option]) -> int:
            return STOP

    world = World(Enough())
    ended: list[str] = []

    def body(process: SimProcess) -> None:
        try:
            world.point("one")
        finally:
            ended.append(process.name)

    made(world, a=body, b=body)
    with pytest.raises(Stopped):
        finish(world)
    world.close()
    assert set(ended) <= {"a", "b"}
    assert world.failures == []


def test_who_is_given_up_in_the_middle_of_a_step_behind_a_pause_is_the_last_to_take_one() -> None:
    """A schedule in a machine that stood still: whoever else could go on does not."""

    class Enough(Script):
        def choose(self, options: Sequence[Option]) -> int:
            return STOP if is_within(options[0].actor) else 0

    world = World(Enough())
    told: list[str] = []

    def pauses(process: SimProcess) -> None:
        world.pause()
        world.pick("way", ("one", "other"))
        told.append(process.name)

    made(world, a=pauses, b=lambda process: told.append(process.name))
    first = world.threads[0]
    assert not world.run(first)
    with pytest.raises(Stopped):
        world.run(first)
    assert told == []
    world.close()


def test_a_process_that_raises_is_a_failure_and_the_others_go_on() -> None:
    world = World(Script())

    def bad(process: SimProcess) -> None:
        raise AssertionError("a bug")

    made(world, bad=bad, server=listener, client=caller)
    for thread in list(world.threads):
        world.run(thread)
    assert [str(error) for error in world.failures] == ["a bug"]


FRAMES = b"".join(header(Kind.NOTIFY, 2, 0) + body for body in (b"xx", b"yy"))


@pytest.mark.parametrize(("answer", "portions"), [("one frame", [10, 10]), ("all frames", [20])])
def test_how_many_frames_a_receive_gets_is_a_choice(answer: str, portions: list[int]) -> None:
    got: list[int] = []
    strategy = Script(answer)
    world = World(strategy)

    def body(process: SimProcess) -> None:
        one, other = process.socketpair()
        one.send(FRAMES)
        while sum(got) < len(FRAMES):
            got.append(other.recvmsg_into([memoryview(bytearray(100))])[0])

    made(world, a=body)
    finish(world)
    assert got == portions


def test_steps_say_which_channels_they_touched() -> None:
    """That is what a search that leaves equivalent orders out lives on."""
    strategy = Script()
    world = World(strategy)
    made(world, server=listener, client=caller)
    finish(world)
    places = [frozenset(touch.place for touch in step.touches) for step in strategy.taken]
    channel = ("channel", "client.here#1")
    assert sum(channel in each for each in places) >= 2, "by who sends and by who is told"
    assert any(Touch(channel, True) in step.touches for step in strategy.taken)


def test_the_journal_tells_runs_apart_by_their_bytes() -> None:
    one, other, again = Journal(), Journal(keep=True), Journal()
    one.add("a send", b"1")
    other.add("a send", b"2")
    again.add("a send", b"1")
    assert one.digest == again.digest != other.digest
    assert other.lines == ["a send (1 bytes)"]


def test_who_dies_in_the_middle_is_hung_up_on_and_never_goes_on() -> None:
    told: list[str] = []
    world = World(Script())
    server, client = SimProcess(world.host, "server"), SimProcess(world.host, "client")

    def serve() -> None:
        sock = server.listen(Path("/run/here"), None)
        poller = server.poller()
        poller.register(sock.fileno(), select.EPOLLIN)
        poller.poll(10.0, 8)
        peer, _ = sock.accept()
        world.point("about to answer")
        told.append("the dead speak")
        peer.send(b"welcome")

    def call() -> None:
        sock = client.connect(Path("/run/here"))
        poller = client.poller()
        poller.register(sock.fileno(), select.EPOLLIN)
        assert poller.poll(10.0, 8)
        told.append(f"hung up: {sock.recv(10)!r}")

    victim = world.spawn(server, serve, Fate(3))
    world.run(world.spawn(client, call))
    assert told == ["hung up: b''"]
    assert victim.over
    assert server.fds == 0
    world.close()
    assert world.failures == []


def test_who_is_stopped_goes_on_later_and_the_others_do_meanwhile() -> None:
    world = World(Script())
    at: dict[str, int] = {}

    def body(process: SimProcess) -> None:
        for n in range(3):
            world.point(f"point {n}")
        at[process.name] = world.now_ns()

    one, other = SimProcess(world.host, "one"), SimProcess(world.host, "other")
    world.spawn(one, lambda: body(one), Fate(2, stops_s=3.0))
    world.spawn(other, lambda: body(other))
    finish(world)
    assert at["other"] < 1_000_000
    assert at["one"] >= 3 * 10**9


def test_who_goes_round_in_circles_is_told_of() -> None:
    world = World(Script())

    def circles(process: SimProcess) -> None:
        while True:
            world.point("again")

    made(world, a=circles)
    with pytest.raises(Stuck, match="a goes round in circles: again"):
        finish(world)
    world.close()


def test_who_goes_round_in_circles_where_nobody_is_asked_is_told_of_unless_there_is_a_choice() -> None:
    world = World(Excerpt(Script()))
    turns: list[int] = []

    def circles(process: SimProcess) -> None:
        for turn in range(LIMIT_STEPS + 1):
            turns.append(turn)
            world.point("again")

    def circles_for_ever(process: SimProcess) -> None:
        while True:
            world.point("again")

    made(world, a=circles, b=circles_for_ever)
    with pytest.raises(Stuck, match="b goes round in circles: again"):
        finish(world)
    assert turns[-1] == LIMIT_STEPS, "the other could go on"
    world.close()


def test_two_that_go_round_in_circles_by_turns_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "LIMIT_CHOICES", 100)
    world = World(Script())

    def circles(process: SimProcess) -> None:
        while True:
            world.point("again")

    made(world, a=circles, b=circles)
    with pytest.raises(Stuck, match="all go round in circles: a stands: again; b stands: begins"):
        finish(world)
    assert world.decisions == 101
    world.close()


def test_who_stood_still_once_and_waits_is_stuck_like_anybody() -> None:
    world = World(Script())
    process = SimProcess(world.host, "a")

    def body() -> None:
        world.point("stands still")
        world.wait((), None)

    thread = world.spawn(process, body, Fate(2, stops_s=0.001))
    with pytest.raises(Stuck, match="a waits"):
        world.run(thread)
    world.close()


def test_two_directions_of_a_channel_are_two_places_and_a_hang_up_is_both() -> None:
    strategy = Script()
    world = World(strategy)

    def talk(process: SimProcess) -> None:
        one, other = process.socketpair()
        one.send(b"there")
        other.send(b"and back")
        other.close()

    made(world, a=talk, b=lambda process: None)
    finish(world)
    one, other = ("channel", "a.pair1"), ("channel", "a.pair1'")
    touched = [{touch.place for touch in step.touches} & {one, other} for step in strategy.taken]
    assert [found for found in touched if found] == [{other}, {one}, {one, other}]


def test_who_closes_touches_the_other_end_and_those_of_what_nobody_has_received() -> None:
    strategy = Script()
    world = World(strategy)

    def talk(process: SimProcess) -> None:
        one, other = process.socketpair()
        sent, kept = process.socketpair()
        one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [sent.fileno()]))])
        sent.close()
        world.point("closes")
        other.close()
        world.point("has closed")
        assert kept.recv(1) == b"", "it was hung up on"

    made(world, a=talk, b=lambda process: None)
    finish(world)
    (closes,) = (step for step in strategy.taken if step.label == "closes")
    channels = {("channel", f"a.{name}") for name in ("pair1", "pair1'", "pair2", "pair2'")}
    assert {touch.place for touch in closes.touches} - {("process", "a")} == channels


def settled(strategy: Strategy, journal: Journal | None = None, fate: Fate | None = None) -> World:
    """One process does nothing for a second; a slow one works, then sleeps for less; another one waits."""
    world = World(strategy, journal)
    fd, ours = (one := SimProcess(world.host, "works")).memfd("tdp-tables", PAGE_SIZE, peer_writes=False)
    (other := SimProcess(world.host, "looks")).map_peer(
        other.install(one.file(fd)), PAGE_SIZE, writable=False
    )

    def work() -> None:
        for _ in range(3):
            ours.view.cast("Q")[0] = 1
        world.pick("flow", ["the first", "the second"])
        world.wait((), 0.5)
        ours.view.cast("Q")[0] = 2

    world.spawn(SimProcess(world.host, "rests"), lambda: world.settle(1))
    world.spawn(one, work, fate)
    world.spawn(other, lambda: world.wait((), 0.7))
    finish(world)
    return world


@pytest.mark.parametrize("fate", [None, *(Fate(step, stops_s) for step in (2, 4) for stops_s in (None, 0.1))])
def test_where_nobody_is_asked_all_is_as_by_default(fate: Fate | None) -> None:
    journals = Journal(keep=True), Journal(keep=True)
    asked = settled(Replay(()), journals[0], fate)
    unasked = settled(Excerpt(Script("looks")), journals[1], fate)
    assert journals[0].lines == journals[1].lines
    assert asked.now_ns() == unasked.now_ns()
    assert [thread.taken for thread in asked.threads] == [thread.taken for thread in unasked.threads]


@pytest.mark.parametrize("most", [1, 2])
def test_steps_that_are_forgotten_are_made_again(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, forgot = Journal(keep=True), Journal(keep=True)
    settled(Replay(()), kept)
    monkeypatch.setattr("simulator.world.thread.MADE", most)
    world = settled(Replay(()), forgot)
    assert forgot.lines == kept.lines
    assert {len(each.made) for each in world.threads} <= set(range(most + 1))


def test_while_one_settles_time_passes_where_nothing_else_can_happen() -> None:
    strategy = Script("rests")
    assert settled(strategy).now_ns() == pytest.approx(10**9, abs=10 * STEP_NS)
    assert [step.actor for step in strategy.taken if step.actor.endswith("<timer")] == [
        "works<timer",
        "looks<timer",
        "rests<timer",
    ]


def test_while_one_settles_each_access_is_a_step_whoever_else_is_about() -> None:
    """Or runs that differ by nothing would be told apart by what was on offer meanwhile."""
    strategy = Script("rests")
    settled(strategy)
    assert [step.label for step in strategy.taken].count("stores works.tdp-tables1[0]") == 4


def test_while_one_settles_a_timer_is_behind_all_that_came_before_it() -> None:
    strategy = Script("rests")
    settled(strategy)
    during = strategy.taken[1:-1]
    timers = [step for step in during if step.actor.endswith("<timer")]
    assert timers
    assert all(dependent(one.touches, other.touches) for one in timers for other in during)
