"""Faults are answers of a strategy: never by default, at the opportunity it says, once, only in between."""

from __future__ import annotations

import array
import select
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from device_sim.core.iotlb import Iotlb, IotlbEntry
from device_sim.core.pri import PageAccess
from device_sim.core.traits import InvalidateCompletion
from kvmd.core.mm.frames import Frames
from kvmd.core.mm.locked import LockedVm
from protocol.errors import UapiError
from protocol.hw.qi import ResponseCode
from protocol.pt.bits import RWX
from protocol.units import LEVEL_4K, Hpa, IovaPfn
from simulator.faults.kinds import FAULTS, UnknownFaults, drawn_among, kinds_of
from simulator.faults.plan import Faults
from simulator.faults.seams import FAILING, NOTED, injected
from simulator.kernel.files import StreamEnd
from simulator.kernel.process import SimHost, SimProcess
from simulator.search.option import Option, Touch
from simulator.world.scheduler import World
from tests.kit.silicon import Silicon
from tests.unit.simulator.world.toys import Script


class Answers:
    """Given one after the other, then 0."""

    watches = False

    def __init__(self, *answers: int) -> None:
        self._answers = list(answers)
        self.asked: list[list[str]] = []

    def choose(self, options: Sequence[Option]) -> int:
        self.asked.append([option.label for option in options])
        return self._answers.pop(0) if self._answers else 0

    def took(self, step: Option) -> None: ...

    def ended(self, failed: bool) -> bool:
        return False


def begun(kind: str, *answers: int) -> Faults:
    """In a world with one process, which is what asks."""
    world, faults = World(Answers(*answers)), Faults([kind])
    faults.put_into(world)
    world.run(world.spawn(SimProcess(world.host, "qemu_shim"), faults.begin))
    return faults


@pytest.mark.parametrize(
    ("answers", "at"),
    [((0,), None), ((1,), 0), ((2,), 1), ((3, 0), 2), ((3, 1), 3), ((4, 1, 0), 6), ((4, 1, 1), 7)],
)
def test_the_strategy_says_at_which_opportunity(answers: tuple[int, ...], at: int | None) -> None:
    faults = begun("evict", *answers)
    assert [faults.due("evict") for _ in range(16)] == [n == at for n in range(16)]
    assert faults.met["evict"] == (at is not None)


@pytest.mark.parametrize("kind", ["full", "full:each"])
@pytest.mark.parametrize(("answer", "requests"), [(0, 1), (1, 4)])
def test_a_queue_has_no_room_for_one_request_or_for_four_in_a_row(
    kind: str, answer: int, requests: int
) -> None:
    found: list[bool] = []
    world, faults = World(Answers(2, answer) if kind == "full" else Answers(0, 1, answer)), Faults([kind])
    faults.put_into(world)

    def meets() -> None:
        faults.begin()
        found.extend(faults.is_full() for _ in range(7))

    world.run(world.spawn(SimProcess(world.host, "device_sim"), meets))
    assert found == [1 <= n <= requests for n in range(7)]
    assert faults.met["full"] == 1


def test_what_has_no_room_at_the_end_has_some_behind_it() -> None:
    faults = begun("full", 1, 1)
    assert faults.is_full()
    faults.end()
    assert not faults.is_full()


def test_nothing_fails_before_it_begins_nor_after_it_ends() -> None:
    faults = Faults(["evict"])
    assert not faults.due("evict")
    faults = begun("evict", 1)
    faults.end()
    assert not faults.due("evict")
    assert not faults.met


def test_kinds_are_asked_for_by_name() -> None:
    assert kinds_of("sigkill,evict") == ["evict", "sigkill"]
    assert kinds_of("") == []
    assert kinds_of("enomem,evict:each") == ["evict:each", "enomem"]
    assert drawn_among("enomem,evict:each") == "evict:each, enomem (the first 16)"
    with pytest.raises(UnknownFaults, match="no faults are called rain; there are evict, "):
        kinds_of("evict,rain")
    with pytest.raises(UnknownFaults, match="sigkill:each: that kind is drawn beforehand"):
        kinds_of("evict:each,sigkill:each")


def of_two(kind: str, *words: str) -> tuple[list[bool], list[Option]]:
    """Three opportunities of the one process, with that answered, and what its steps were."""
    world, faults = World(strategy := Script(*words)), Faults([kind])
    faults.put_into(world)
    failed = []

    def meets() -> None:
        faults.begin()
        for _ in range(3):
            world.point("comes to one")
            failed.append(faults.due("evict"))
        faults.end()
        assert not faults.due("evict")

    world.spawn(SimProcess(world.host, "other"), lambda: None)
    world.run(world.spawn(SimProcess(world.host, "one"), meets))
    return failed, strategy.taken


HERE = ("fault", "evict")


def test_what_is_asked_for_at_each_opportunity_goes_by_whether_there_was_one() -> None:
    failed, steps = of_two("evict:each", "one: begins", "not yet", "now")
    assert failed == [False, True, False]
    touched = [[touch.writes for touch in step.touches if touch.place == HERE] for step in steps]
    picks = [step.label for step in steps if step.actor == "one/fault evict"]
    assert picks == ["not yet", "now"]
    (said,) = (place for place, step in enumerate(steps) if step.label == "now")
    assert True in touched[said], "whoever comes to one behind it is not asked"
    assert all(True not in writes for writes in touched[:said] + touched[said + 1 :])
    assert touched[-1] == [False], "and goes by that"


def test_one_that_is_drawn_is_before_all_that_anybody_does_and_each_opportunity_counts() -> None:
    failed, steps = of_two("evict", "one: begins", "at its 2.")
    assert failed == [False, True, False]
    (drawn,) = (step for step in steps if step.actor == "one/fault evict")
    assert {Touch(("process", name), True) for name in ("one", "other")} < drawn.touches
    comes = [step for step in steps if step.label == "comes to one"]
    assert all(Touch(HERE, True) in step.touches for step in comes)


# -- what each is ----------------------------------------------------------------------------------------


@contextmanager
def failing(kind: str) -> Iterator[Faults]:
    """At its first opportunity."""
    faults = begun(kind, 1)
    with injected(faults):
        yield faults


def test_an_iotlb_forgets_what_it_is_asked_for() -> None:
    iotlb, page = Iotlb(), IovaPfn(5)
    entry = IotlbEntry(Hpa(0x1000), LEVEL_4K, RWX, 0)
    iotlb.fill(1, page, entry)
    with failing("evict"):
        assert iotlb.lookup(1, page, RWX) is None
        iotlb.fill(1, page, entry)
        assert iotlb.lookup(1, page, RWX) is entry


def test_a_daemon_gets_no_fd_and_a_vmm_does() -> None:
    with failing("enomem"):
        SimProcess(SimHost(), "qemu_shim").reserve()
        daemon = SimProcess(SimHost(), "kvmd")
        with pytest.raises(OSError, match="Too many open files"):
            daemon.reserve()
        daemon.reserve()


def test_who_may_lock_no_more_has_locked_nothing_of_it() -> None:
    locked = LockedVm("the user", None)
    with failing("enomem"):
        with pytest.raises(UapiError, match="ENOMEM"):
            locked.charge(2)
        assert locked.pages == 0
        locked.charge(2)
    assert locked.pages == 2


def test_of_fds_that_come_none_is_given_behind_one_that_finds_no_place() -> None:
    """As Linux gives them [net/core/scm.c scm_detach_fds], whose table stays as full as it is."""
    vmm, daemon = SimProcess(host := SimHost(), "qemu_shim"), SimProcess(host, "kvmd")
    ours, theirs = vmm.socketpair()
    fd = daemon.install(vmm.file(theirs.fileno()))
    passed = array.array("i", [vmm.reserve() for _ in range(3)])
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
    with failing("enomem"):
        got = daemon.socket_of(fd).recvmsg_into([memoryview(bytearray(1))], socket.CMSG_SPACE(12))
    assert got == (1, [], socket.MSG_CTRUNC, None)
    assert daemon.fds == 1


def test_who_has_no_fd_for_it_does_not_connect() -> None:
    host, path = SimHost(), Path("kvmd.sock")
    listening = SimProcess(host, "kvmd").listen(path, None)
    with failing("enomem"):
        daemon = SimProcess(host, "iommufdd")
        with pytest.raises(OSError, match="Too many open files"):
            daemon.connect(path)
        with pytest.raises(BlockingIOError):
            listening.accept()
        daemon.connect(path)
    listening.accept()


def test_a_process_hangs_up_at_a_message_once() -> None:
    with failing("hangup"):
        one, other = SimProcess(SimHost(), "kvmd").socketpair()
        into = memoryview(bytearray(8))
        other.send(b"message")
        with pytest.raises(ConnectionResetError):
            one.recvmsg_into([into])
        assert one.recvmsg_into([into])[0] == 7


def test_a_message_is_late_once_and_what_is_behind_it_waits_and_what_was_before_it_does_not() -> None:
    faults = begun("delay", 2, 1)
    world = faults._world
    assert world is not None
    process = SimProcess(world.host, "kvmd")
    one, other = process.socketpair()
    told: list[tuple[int, bytes]] = []

    def body() -> None:
        poller = process.poller()
        poller.register(other.fileno(), select.EPOLLIN)
        one.send(b"in time")
        one.send(b"late,")
        one.send(b"behind")
        one.close()
        assert poller.poll(0.0, 1) == [(other.fileno(), select.EPOLLIN)], "nor is it told of the end"
        end = process.file(other.fileno())
        assert isinstance(end, StreamEnd)
        assert (end.unread, end.peek(64)) == (7, b"in time")
        assert other.recv(64) == b"in time"
        with pytest.raises(BlockingIOError):
            other.recv(1)
        poller.poll(60.0, 1)
        told.append((world.now_ns() // 10**9, other.recv(64)))
        assert other.recv(1) == b""

    with injected(faults):
        world.run(world.spawn(process, body))
    assert world.failures == []
    assert told == [(5, b"late,behind")]


def test_a_message_behind_one_that_is_late_from_the_schedule_before_is_no_opportunity() -> None:
    world = World(Script("at its 1.", "longer than a time-out", "at its 1.", "a moment"))
    faults = Faults(["delay"])
    faults.put_into(world)
    process = SimProcess(world.host, "qemu_shim")
    one, other = process.socketpair()
    told: list[tuple[int, bytes]] = []

    def body() -> None:
        faults.begin()
        one.send(b"late,")
        assert faults.struck
        faults.end()
        faults.next_schedule()
        faults.begin()
        one.send(b"behind")
        poller = process.poller()
        poller.register(other.fileno(), select.EPOLLIN)
        poller.poll(60.0, 1)
        told.append((world.now_ns() // 10**9, other.recv(64)))

    with injected(faults):
        world.run(world.spawn(process, body))
    assert world.failures == []
    assert told == [(5, b"late,behind")]
    assert not faults.struck


def test_a_host_has_no_frame() -> None:
    frames = Frames(Hpa(0), memoryview(bytearray(1 << 30)), lambda offset, size: None)
    with failing("enomem"):
        with pytest.raises(UapiError, match="ENOMEM"):
            frames.allocate(LEVEL_4K, 1)
        frames.allocate(LEVEL_4K, 1)


def test_a_device_completes_an_invalidation_late_once() -> None:
    silicon = Silicon()
    function = silicon.function
    with failing("ite"):
        assert not function.invalidate_translations(IovaPfn(0), 1)
        assert function.traits.invalidate_completion is InvalidateCompletion.IN_TIME
        assert function.invalidate_translations(IovaPfn(0), 1)


def test_a_device_completes_no_invalidation_any_more() -> None:
    function, faults = Silicon().function, begun("ite", 1, 1)
    with injected(faults):
        assert not function.invalidate_translations(IovaPfn(0), 1)
        assert not function.invalidate_translations(IovaPfn(0), 1)
    assert faults.is_silent
    assert faults.excuses


@pytest.mark.parametrize("met", [True, False])
def test_a_device_that_was_answered_with_response_failure_asks_no_more(met: bool) -> None:
    silicon, faults = Silicon(), begun("enomem", int(met))
    silicon.attach()
    pri = silicon.function.pri
    silicon.start(pri.request([PageAccess(IovaPfn(7), True)]))
    with injected(faults):
        faults.due("enomem")
        pri.respond(0, ResponseCode.FAILURE)
    assert not pri.enabled
    faults.next_schedule()
    assert faults.excuses == met, "its machine goes on with it; without a fault it is a bug"


def test_only_what_is_on_is_wrapped_and_all_is_taken_out_again() -> None:
    before = {(owner, name): vars(owner)[name] for owner, name, _ in FAILING}
    with injected(Faults(["ite"])):
        wrapped = {seam for seam, was in before.items() if vars(seam[0])[seam[1]] is not was}
        assert wrapped == {(owner, name) for owner, name, kind in FAILING if kind in ("ite", NOTED)}
    with injected(Faults(list(FAULTS))):
        pass
    assert {(owner, name): vars(owner)[name] for owner, name, _ in FAILING} == before


# -- stops and deaths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigkill", "sigstop"])
def test_a_daemon_meets_its_fate_at_the_step_that_was_said(kind: str) -> None:
    world, faults = World(Script("qemu_shim: begins", "at its 3. to")), Faults([kind])
    steps: list[int] = []
    faults.put_into(world)

    def works() -> None:
        for n in range(6):
            world.point(f"step {n}")
            steps.append(n)

    daemon = world.spawn(SimProcess(world.host, "kvmd"), works)
    world.run(world.spawn(SimProcess(world.host, "qemu_shim"), faults.begin))
    world.run(daemon)
    faults.end()
    assert faults.met == {kind: 1}
    if kind == "sigkill":
        assert len(steps) < 6
        assert faults.killed == {"kvmd"}
        assert faults.excuses
        faults.next_schedule()
        assert faults.excuses, "it stays dead"
    else:
        assert len(steps) == 6
        assert world.now_ns() > 1_000_000
        assert not faults.excuses
