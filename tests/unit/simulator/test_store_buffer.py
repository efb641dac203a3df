"""Stores that wait in a buffer: what others miss, what their owner sees, and what lets them go."""

from __future__ import annotations

import array
import select
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest

from protocol.kernel.port import Kernel, Mapping, Poller, SharedEvent, StreamSocket
from protocol.rpc.fence import full_fence
from simulator.faults.plan import VICTIMS, Faults
from simulator.faults.seams import injected
from simulator.faults.store_buffer import BUFFER_STORES, StoreBuffer, Word
from simulator.kernel.files import Memory
from simulator.kernel.process import SimProcess
from simulator.search.option import Option
from simulator.world.fate import Fate
from simulator.world.scheduler import World
from tests.integration.simulator.drawn import Drawn

MINE, THEIRS = 0, 1  # words
SCHEDULES = 40
Play = Callable[[], None]


def nothing() -> None: ...


class Even(Drawn):
    """Whoever is next, by an even coin."""

    def choose(self, options: Sequence[Option]) -> int:
        assert self._random is not None
        return self._random.randrange(len(options))


def played(seed: int, fence: Play, owner: str = "kvmd") -> tuple[list[int], StoreBuffer]:
    """Two processes store a word each and then look at the other's: what each saw, and the buffer of one."""
    world, faults = World(Even(seed)), Faults(["store-buffer"])
    faults.put_into(world)
    kvmd, iommufdd = (SimProcess(world.host, name) for name in VICTIMS[:2])
    saw: list[int] = []

    def side(process: SimProcess, fd: int, mine: int, theirs: int) -> Play:
        def body() -> None:
            words = process.map_peer(fd, 4096, writable=True).view.cast("Q")
            process.event().signal()  # both have it mapped
            words[mine] = 1
            assert words[mine] == 1, "who stored it sees it"
            fence()
            saw.append(words[theirs])
            process.event().signal()

        return body

    fd, _ = kvmd.memfd("unit 0", 4096, peer_writes=True)
    file = kvmd.file(fd)
    other = iommufdd.install(file)
    with injected(faults):
        buffer = faults.buffer = StoreBuffer(owner)
        faults._buffers = True
        threads = [
            world.spawn(kvmd, side(kvmd, fd, MINE, THEIRS)),
            world.spawn(iommufdd, side(iommufdd, other, THEIRS, MINE)),
        ]
        for thread in threads:
            world.run(thread)
    assert isinstance(file, Memory)
    assert world.failures == []
    assert list(memoryview(file.bytes)[:16].cast("Q")) == [1, 1], "behind a system call all is there"
    return saw, buffer


def test_without_a_fence_both_look_too_early_and_it_is_said() -> None:
    seen = [played(seed, nothing) for seed in range(SCHEDULES)]
    early = [buffer.missed for saw, buffer in seen if saw == [0, 0]]
    assert early
    assert all(
        "iommufdd looked at kvmd.unit 01[0] before kvmd's store to it was there" in why for why in early
    )


@pytest.mark.parametrize("owner", VICTIMS[:2])
def test_with_a_full_fence_one_of_them_sees_the_other(owner: str) -> None:
    assert all(sum(played(seed, full_fence, owner)[0]) > 0 for seed in range(SCHEDULES))


def test_as_late_as_can_be_is_behind_all_that_others_can_do() -> None:
    """By default, of the default one's: it is the buffer of which each schedule is another."""
    world, faults = World(Drawn(None)), Faults(["store-buffer:each"])
    faults.put_into(world)
    kvmd, iommufdd = (SimProcess(world.host, name) for name in VICTIMS[:2])
    fd, _ = kvmd.memfd("unit 0", 4096, peer_writes=True)
    other = iommufdd.install(kvmd.file(fd))
    told, saw = iommufdd.event(), list[int]()

    def stores() -> None:
        words = iommufdd.map_peer(other, 4096, writable=True).view.cast("Q")
        faults.begin()
        faults._buffers = True
        words[MINE] = 1
        told.signal()

    def looks() -> None:
        words = kvmd.map_peer(fd, 4096, writable=True).view.cast("Q")
        saw.extend(words[MINE] for _ in range(5))

    with injected(faults):
        for thread in (world.spawn(iommufdd, stores), world.spawn(kvmd, looks)):
            world.run(thread)
    assert world.failures == []
    assert saw == [0] * 5


def test_it_lets_go_in_order_when_it_is_full_and_when_it_is_drained() -> None:
    memory, made, buffer = Memory(1, 4096, sealed=True), list[int](), StoreBuffer("kvmd")
    words = [Word(memory, 8 * n, 8) for n in range(BUFFER_STORES + 1)]
    for n, word in enumerate(words):
        buffer.store(word, n, nothing, lambda n=n: made.append(n))  # type: ignore[misc]
    assert made == [0]
    assert buffer.forwarded(words[5]) == 5
    assert buffer.forwarded(words[0]) is None
    assert made == [0]
    assert buffer.forwarded(Word(memory, 8, 4)) is None, "half of a word is not forwarded"
    assert made == list(range(BUFFER_STORES + 1))


def test_the_last_store_to_a_word_is_what_its_owner_loads() -> None:
    memory, buffer = Memory(1, 4096, sealed=True), StoreBuffer("kvmd")
    word = Word(memory, 8, 8)
    for value in (Random(1).randrange(100), 7):
        buffer.store(word, value, nothing, nothing)
    assert buffer.forwarded(word) == 7


def test_what_is_made_while_its_owner_stands_before_it_is_made_once() -> None:
    """The next schedule begins there: later it would undo what others have stored since."""
    made, buffer = list[int](), StoreBuffer("kvmd")
    word = Word(Memory(1, 4096, sealed=True), 0, 8)
    buffer.store(word, 1, buffer.make_all, lambda: made.append(1))
    buffer.store(word, 2, nothing, lambda: made.append(2))
    buffer.drain()
    assert made == [1, 2]


class Caller:
    """A process whose store waits, with something to ask of its kernel."""

    listening: StreamSocket
    memory: int
    mapping: Mapping
    idle: int
    idle_mapping: Mapping
    frames: Mapping
    into: memoryview

    def __init__(self, kernel: SimProcess) -> None:
        self.kernel = kernel
        self.one, self.other = kernel.socketpair()
        self.other.send(b"unread")
        self.event, self.poller = kernel.event(), kernel.poller()
        self.poller.register(self.event.fd, select.EPOLLIN)
        self.listening = kernel.listen(LISTENS, None)
        self.waits = kernel.connect(LISTENS)
        self.memory, self.mapping = kernel.memfd("unit 0", 4096, peer_writes=True)
        self.idle, self.idle_mapping = kernel.memfd("unit 1", 4096, peer_writes=True)
        self.frames = kernel.memfd("tdp-frames", 4096, peer_writes=True)[1]
        self.into = memoryview(bytearray(8))

    def rights(self) -> None:
        self.one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.idle]))])


LISTENS = Path("kvmd.sock")
NO_CALLS = {"monotonic_ns", "wall_ns", "event_of", "fileno", "detach", "fd", "view", "compiled"}
CALLS: dict[str, Callable[[Caller], object]] = {
    "accept": lambda it: it.listening.accept(),
    "close": lambda it: it.kernel.close(it.idle),
    "close_received": lambda it: it.kernel.close_received(it.idle),
    "connect": lambda it: it.kernel.connect(LISTENS),
    "contents": lambda it: it.kernel.contents(it.idle),
    "cookie_of": lambda it: it.kernel.cookie_of(it.one.fileno()),
    "discard": lambda it: it.idle_mapping.discard(0, 4096),
    "drain": lambda it: it.event.drain(),
    "dup": lambda it: it.kernel.dup(it.idle),
    "event": lambda it: it.kernel.event(),
    "file_with": lambda it: it.kernel.file_with("file", [b"x"]),
    "listen": lambda it: it.kernel.listen(Path("another.sock"), None),
    "map_peer": lambda it: it.kernel.map_peer(it.idle, 4096, writable=False),
    "memfd": lambda it: it.kernel.memfd("unit 2", 4096, peer_writes=False),
    "memory_of": lambda it: it.kernel.memory_of(it.idle),
    "modify": lambda it: it.poller.modify(it.event.fd, select.EPOLLOUT),
    "poll": lambda it: it.poller.poll(0, 8),
    "poller": lambda it: it.kernel.poller(),
    "recv": lambda it: it.one.recv(1),
    "recvmsg_into": lambda it: it.one.recvmsg_into([it.into]),
    "register": lambda it: it.poller.register(it.one.fileno(), select.EPOLLIN),
    "replace_received": lambda it: it.kernel.replace_received(it.idle, it.memory),
    "reserve": lambda it: it.kernel.reserve(),
    "send": lambda it: it.one.send(b"x"),
    "sendmsg": lambda it: it.rights(),
    "setblocking": lambda it: it.one.setblocking(False),
    "shutdown": lambda it: it.one.shutdown(socket.SHUT_WR),
    "signal": lambda it: it.event.signal(),
    "socket_of": lambda it: it.kernel.socket_of(it.one.fileno()),
    "socketpair": lambda it: it.kernel.socketpair(),
    "unlisten": lambda it: it.kernel.unlisten(LISTENS),
    "unregister": lambda it: it.poller.unregister(it.event.fd),
    # of the objects of the same name
    "close a socket": lambda it: it.one.close(),
    "close an event": lambda it: it.event.close(),
    "close a poller": lambda it: it.poller.close(),
    "close a mapping": lambda it: it.idle_mapping.close(),
}
STORES: dict[str, Callable[[Caller], object]] = {
    "a store to a frame": lambda it: it.frames.view.__setitem__(slice(0, 8), bytes(8)),
    "a slice of frames": lambda it: it.frames.view[:8],
    "a store of more than a word": lambda it: it.mapping.view.__setitem__(slice(64, 128), bytes(64)),
}


def test_all_that_the_port_has_is_a_system_call_or_is_none() -> None:
    ports = (Kernel, StreamSocket, Poller, SharedEvent, Mapping)
    names = {name for port in ports for name in vars(port) if not name.startswith("_")}
    assert names == CALLS.keys() - {name for name in CALLS if " " in name} | NO_CALLS


def waiting_behind(call: Callable[[Caller], object]) -> bool:
    """A store waits; does it when that was done?"""
    world, faults = World(Drawn(None)), Faults(["store-buffer"])
    faults.put_into(world)
    kvmd = SimProcess(world.host, "kvmd")
    caller = Caller(kvmd)
    file = kvmd.file(caller.memory)
    assert isinstance(file, Memory)
    found: list[bool] = []

    def body() -> None:
        caller.mapping.view.cast("Q")[0] = 5
        assert file.bytes[0] == 0
        call(caller)
        found.append(file.bytes[0] == 0)

    with injected(faults):
        faults.buffer, faults._buffers = StoreBuffer("kvmd"), True
        world.run(world.spawn(kvmd, body))
    assert world.failures == []
    return found[0]


@pytest.mark.parametrize("call", CALLS)
def test_behind_a_system_call_nothing_waits(call: str) -> None:
    assert not waiting_behind(CALLS[call])


@pytest.mark.parametrize("store", STORES)
def test_what_is_not_buffered_is_not_seen_before_what_waits(store: str) -> None:
    assert not waiting_behind(STORES[store])


def test_behind_what_is_no_system_call_it_waits() -> None:
    assert waiting_behind(lambda it: it.kernel.monotonic_ns())
    assert waiting_behind(lambda it: it.kernel.wall_ns())


def test_a_load_of_several_words_waits_for_the_stores_to_them() -> None:
    """And is several words, of one too."""
    world, faults = World(Drawn(None)), Faults(["store-buffer"])
    faults.put_into(world)
    kvmd = SimProcess(world.host, "kvmd")
    _, mapping = kvmd.memfd("unit 0", 4096, peer_writes=False)
    seen: list[list[int]] = []

    def body() -> None:
        words = mapping.view.cast("Q")
        words[1] = 5
        assert list(words[2:4]) == [0, 0]
        seen.append(words[1:2].tolist())

    with injected(faults):
        buffer = faults.buffer = StoreBuffer("kvmd")
        faults._buffers = True
        world.run(world.spawn(kvmd, body))
        assert not buffer._waiting
    assert seen == [[5]]


def stores_to_memory() -> tuple[World, Faults, SimProcess, Mapping, Memory]:
    """Of kvmd, whose stores may wait, with memory that is mapped and the file behind it."""
    world, faults = World(Drawn(None)), Faults(["store-buffer"])
    faults.put_into(world)
    kvmd = SimProcess(world.host, "kvmd")
    fd, mapping = kvmd.memfd("unit 0", 4096, peer_writes=False)
    file = kvmd.file(fd)
    assert isinstance(file, Memory)
    return world, faults, kvmd, mapping, file


def test_a_store_that_retired_is_made_though_its_process_dies() -> None:
    world, faults, kvmd, mapping, file = stores_to_memory()

    def body() -> None:
        mapping.view.cast("Q")[0] = 5
        assert file.bytes[0] == 0
        raise KeyboardInterrupt

    with injected(faults):
        faults.buffer, faults._buffers = StoreBuffer("kvmd"), True
        world.run(world.spawn(kvmd, body))
    assert file.bytes[0] == 5


def test_a_store_waits_though_another_process_dies() -> None:
    """Its fds are closed where the owner stands, and not by it."""
    world, faults, kvmd, mapping, file = stores_to_memory()
    vmm = SimProcess(world.host, "qemu_shim")
    vmm.memfd("guest memory", 4096, peer_writes=False)
    waited: list[bool] = []

    def body() -> None:
        mapping.view.cast("Q")[0] = 5
        world.wait((), 1.0)
        waited.append(file.bytes[0] == 0)

    with injected(faults):
        faults.buffer, faults._buffers = StoreBuffer("kvmd"), True
        thread = world.spawn(kvmd, body)
        other = world.spawn(vmm, lambda: world.point("runs"), Fate(1, None))
        world.run(thread)
    assert other.over
    assert not vmm.open_files()
    assert waited == [True]


def test_a_store_that_waits_when_its_schedule_is_over_is_made() -> None:
    """Its owner stands where it stood, and goes on in the next one."""
    world, faults, kvmd, mapping, file = stores_to_memory()

    def body() -> None:
        mapping.view.cast("Q")[0] = 5
        world.pause()

    with injected(faults):
        faults.buffer, faults._buffers = StoreBuffer("kvmd"), True
        thread = world.spawn(kvmd, body)
        assert not world.run(thread)
        faults.end()
        assert file.bytes[0] == 0
        faults.next_schedule()
        assert file.bytes[0] == 5
        assert world.run(thread)
