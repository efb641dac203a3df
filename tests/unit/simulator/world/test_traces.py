"""What steps touch, against every schedule there is: no outcome is missed, and one order is one trace."""

from __future__ import annotations

import select
import socket
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from protocol.kernel.port import BACKLOG
from simulator.kernel.files import Memory
from simulator.kernel.process import SimProcess
from simulator.search.exhaustive import Exhaustive
from simulator.search.option import Strategy
from simulator.search.replay import Recorded
from simulator.world.limits import Stopped
from simulator.world.scheduler import World
from tests.unit.simulator.search.toy import Given
from tests.unit.simulator.world.toys import finish, made

Play = Callable[[World, list[object]], None]
PLACE = Path("/run/here")


def played(play: Play, strategy: Strategy) -> tuple[object, ...]:
    world, saw = World(strategy), list[object]()
    play(world, saw)
    try:
        finish(world)
    finally:
        world.close()
    return tuple(saw)


def by_force(play: Play) -> tuple[set[tuple[object, ...]], set[int]]:
    """What was seen in all schedules, and their traces."""
    todo: list[list[int]] = [[]]
    seen, traces = set[tuple[object, ...]](), set[int]()
    while todo:
        answers = todo.pop()
        given = Given(answers)
        recorded = Recorded(given)
        seen.add(played(play, recorded))
        traces.add(recorded.trace)
        todo += given.others()
    return seen, traces


def by_search(play: Play) -> list[tuple[object, ...]]:
    """What was seen in all that it does not prune."""
    search, seen = Exhaustive(), list[tuple[object, ...]]()
    goes_on = True
    while goes_on:
        try:
            found = played(play, search)
        except Stopped:
            pass
        else:
            if not search.redundant:
                seen.append(found)
        goes_on = search.ended(False)
    return seen


def test_two_that_have_nothing_in_common_make_one_trace() -> None:
    """Whoever else could go on while a store is made, and so whether it is a choice."""

    def play(world: World, saw: list[object]) -> None:
        def stores(process: SimProcess) -> None:
            fd, mapped = process.memfd("unit 0", 4096, peer_writes=True)
            process.file(fd).is_shared = True
            words = mapped.view.cast("Q")
            words[0] = 1
            words[1] = 2

        made(world, a=stores, b=lambda process: world.point("does something of its own"))

    _, traces = by_force(play)
    assert len(traces) == 1


def test_the_search_sends_before_and_behind_a_look_that_finds_nothing() -> None:
    def play(world: World, saw: list[object]) -> None:
        def looks(process: SimProcess) -> None:
            listening, poller = process.listen(PLACE, None), process.poller()
            poller.register(listening.fileno(), select.EPOLLIN)
            poller.poll(10.0, 8)
            peer, _ = listening.accept()
            poller.unregister(listening.fileno())
            poller.register(peer.fileno(), select.EPOLLIN)
            world.point("looks")
            saw.append(len(poller.poll(0, 8)))

        def sends(process: SimProcess) -> None:
            world.wait((), 0.001)
            sock = process.connect(PLACE)
            world.point("sends")
            with suppress(BrokenPipeError):  # who looked is gone
                sock.send(b"x")
            world.wait((), 5.0)

        made(world, a=looks, b=sends, rest=lambda process: world.settle(20.0))
        world._settling = True  # timers come where nothing else can

    seen, _ = by_force(play)
    assert seen == {(0,), (1,)} == set(by_search(play))


def test_the_search_stores_before_and_behind_the_first_load_of_memory_that_was_on_its_way() -> None:
    def play(world: World, saw: list[object]) -> None:
        def maps(process: SimProcess) -> None:
            listening, poller = process.listen(PLACE, None), process.poller()
            poller.register(listening.fileno(), select.EPOLLIN)
            poller.poll(10.0, 8)
            peer, _ = listening.accept()
            poller.register(peer.fileno(), select.EPOLLIN)
            poller.poll(10.0, 8)
            _, rights, _, _ = peer.recvmsg_into([memoryview(bytearray(64))], 200)
            (fd,) = array("i", rights[0][2])
            saw.append(process.map_peer(fd, 4096, writable=True).view.cast("Q")[0])

        def sends(process: SimProcess) -> None:
            world.wait((), 0.001)
            fd, mapped = process.memfd("dmar-queues", 4096, peer_writes=True)
            words = mapped.view.cast("Q")
            sock = process.connect(PLACE)
            sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))])
            words[0] = 1
            world.wait((), 5.0)

        made(world, a=maps, b=sends, rest=lambda process: world.settle(20.0))
        world._settling = True

    seen, _ = by_force(play)
    assert seen == {(0,), (1,)} == set(by_search(play))


def test_whoever_comes_between_the_loads_of_the_only_writer_comes_as_well_before_them() -> None:
    """They are no steps: all that is seen is seen without, in fewer schedules."""

    def play(only_writer: str, world: World, saw: list[object]) -> None:
        writer, reader = SimProcess(world.host, "writer"), SimProcess(world.host, "reader")
        fd, ours = writer.memfd("tdp-tables", 4096, peer_writes=False)
        memory = writer.file(fd)
        theirs = reader.map_peer(reader.install(memory), 4096, writable=False)
        assert isinstance(memory, Memory)
        assert memory.only_writer == "writer"
        memory.only_writer = only_writer

        def writes() -> None:
            words = ours.view.cast("Q")
            words[0] = 1
            words[words[0]] = words[0] + 1

        def reads() -> None:
            words = theirs.view.cast("Q")
            saw.append((words[1], words[0]))

        world.spawn(writer, writes)
        world.spawn(reader, reads)

    seen, _ = by_force(partial(play, "writer"))
    assert seen == {((0, 0),), ((0, 1),), ((2, 1),)} == set(by_search(partial(play, "writer")))
    assert by_force(partial(play, ""))[0] == seen


def test_a_load_of_what_others_may_store_to_is_a_step_of_the_writer_s_too() -> None:
    def play(world: World, saw: list[object]) -> None:
        writer, other = SimProcess(world.host, "writer"), SimProcess(world.host, "other")
        fd, ours = writer.memfd("kvm-dirty-ring", 4096, peer_writes=True)
        theirs = other.map_peer(other.install(writer.file(fd)), 4096, writable=True)

        def writes() -> None:
            words = ours.view.cast("Q")
            words[0] = 1
            saw.append(words[0])

        def stores() -> None:
            theirs.view.cast("Q")[0] = 2

        world.spawn(writer, writes)
        world.spawn(other, stores)

    seen, _ = by_force(play)
    assert seen == {(1,), (2,)} == set(by_search(play))


# -- calls that fail, and names --------------------------------------------------------------------------

Pair = tuple[Callable[[], object], Callable[[], object]]
"""What one does, and what the other does beside it, which may fail."""


def a_name_comes(process: SimProcess) -> Pair:
    return lambda: process.listen(PLACE, None), lambda: process.connect(PLACE)


def a_name_goes(process: SimProcess) -> Pair:
    process.listen(PLACE, None)
    return lambda: process.unlisten(PLACE), lambda: process.connect(PLACE)


def who_listens_goes(process: SimProcess) -> Pair:
    return process.listen(PLACE, None).close, lambda: process.connect(PLACE)


def somebody_else_listens(process: SimProcess) -> Pair:
    return lambda: process.listen(PLACE, None), lambda: process.listen(PLACE, None)


def the_name_of_the_dead_is_free(process: SimProcess) -> Pair:
    return process.listen(PLACE, None).close, lambda: process.listen(PLACE, None)


def too_many_wait(process: SimProcess) -> Pair:
    sock = process.listen(PLACE, None)
    for _ in range(BACKLOG + 1):
        process.connect(PLACE)
    return sock.accept, lambda: process.connect(PLACE)


def nobody_waits(process: SimProcess) -> Pair:
    sock = process.listen(PLACE, None)
    return lambda: process.connect(PLACE), sock.accept


def the_other_end_goes(process: SimProcess) -> Pair:
    one, other = process.socketpair()
    return one.close, lambda: other.send(b"x")


def there_is_room(process: SimProcess) -> Pair:
    one, other = process.socketpair()
    with suppress(BlockingIOError):
        while True:
            other.send(b"x")
    return lambda: one.recv(1 << 20), lambda: other.send(b"x")


def nothing_was_sent(process: SimProcess) -> Pair:
    one, other = process.socketpair()
    return lambda: one.send(b"x"), lambda: other.recv(1)


def number_of(call: Callable[[], object]) -> int | None:
    """0, or the errno it fails with."""
    try:
        call()
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.parametrize(
    "made_of",
    [
        a_name_comes,
        a_name_goes,
        who_listens_goes,
        somebody_else_listens,
        the_name_of_the_dead_is_free,
        too_many_wait,
        nobody_waits,
        the_other_end_goes,
        there_is_room,
        nothing_was_sent,
    ],
)
def test_the_search_plays_what_fails_before_and_behind_what_it_fails_for(
    made_of: Callable[[SimProcess], Pair],
) -> None:
    def play(world: World, saw: list[object]) -> None:
        does, fails = made_of(SimProcess(world.host, "whose it all is"))
        unseen: list[object] = []
        made(world, a=lambda _: unseen.append(number_of(does)), b=lambda _: saw.append(number_of(fails)))

    seen, _ = by_force(play)
    assert len(seen) == 2
    assert set(by_search(play)) == seen
