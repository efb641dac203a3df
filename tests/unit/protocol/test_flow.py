"""Flows against a log of what ran when."""

from __future__ import annotations

import pytest

from protocol.flow import Flows, RwLock, Wait, done


class Log(list[str]):
    async def step(self, name: str, *waits: Wait[int]) -> int:
        """Logs its name, then its name and each result it waited for."""
        self.append(name)
        total = 0
        for wait in waits:
            total += await wait
            self.append(f"{name}{total}")
        return total


def test_a_flow_runs_to_its_first_wait_at_once_and_no_further() -> None:
    log, flows, gate = Log(), Flows(), Wait[int]()
    over = flows.start(log.step("a", gate))
    assert (log, over.done, flows.waiting) == (["a"], False, 1)
    gate.set(1)
    assert (log, flows.has_ready) == (["a"], True), "setting a Wait runs nobody"
    flows.run_ready()
    assert (log, over.result(), flows.waiting) == (["a", "a1"], 1, 0)


def test_flows_run_in_the_order_they_were_made_ready() -> None:
    log, flows = Log(), Flows()
    gates = [Wait[int]() for _ in range(4)]
    for name, gate in zip("abcd", gates, strict=True):
        flows.start(log.step(name, gate))
    for i in (2, 0, 3, 1):
        gates[i].set(i)
    flows.run_ready()
    assert log[4:] == ["c2", "a0", "d3", "b1"]


def test_all_waiters_of_one_wait_run_in_the_order_they_came() -> None:
    log, flows, gate = Log(), Flows(), Wait[int]()
    for name in "abc":
        flows.start(log.step(name, gate))
    gate.set(7)
    flows.run_ready()
    assert log[3:] == ["a7", "b7", "c7"]


def test_a_wait_that_is_set_makes_nobody_wait() -> None:
    log, flows = Log(), Flows()
    assert flows.start(log.step("a", done(3), done(4))).result() == 7
    assert not flows.has_ready


def test_a_flow_that_sets_its_neighbours_wait_is_not_interrupted_by_it() -> None:
    log, flows, gate = Log(), Flows(), Wait[int]()

    async def setter() -> None:
        gate.set(1)
        log.append("set")
        await done(None)
        log.append("still me")

    flows.start(log.step("a", gate))
    flows.start(setter())
    assert log == ["a", "set", "still me"]
    flows.run_ready()
    assert log[3:] == ["a1"]


def test_run_ready_runs_what_becomes_ready_meanwhile() -> None:
    log, flows, first, second = Log(), Flows(), Wait[int](), Wait[int]()

    async def relay() -> None:
        second.set(await first)

    flows.start(log.step("a", second))
    flows.start(relay())
    first.set(5)
    flows.run_ready()
    assert log == ["a", "a5"]


def test_a_flow_awaits_another_and_gets_its_exception() -> None:
    flows, gate = Flows(), Wait[None]()

    async def fails() -> None:
        await gate
        raise ValueError("inner")

    async def outer() -> str:
        try:
            await flows.start(fails())
        except ValueError as error:
            return f"caught {error}"
        return "nothing"

    over = flows.start(outer())
    gate.set(None)
    flows.run_ready()
    assert over.result() == "caught inner"


def test_a_failed_wait_raises_in_the_flow_that_awaits_it() -> None:
    log, flows, gate = Log(), Flows(), Wait[int]()
    over = flows.start(log.step("a", gate))
    gate.fail(KeyError("gone"))
    flows.run_ready()
    with pytest.raises(KeyError, match="gone"):
        over.result()


@pytest.mark.parametrize("late", [False, True])
def test_a_spawned_flow_that_crashes_is_handed_over_and_the_others_go_on(late: bool) -> None:
    crashes: list[BaseException] = []
    log, flows, gate = Log(), Flows(crashes.append), Wait[int]()

    async def crash() -> None:
        if late:
            await gate
        raise ZeroDivisionError

    flows.spawn(crash())
    flows.start(log.step("a", gate))
    gate.set(1)
    flows.run_ready()
    assert [type(crash) for crash in crashes] == [ZeroDivisionError]
    assert log == ["a", "a1"]


def test_without_anybody_to_tell_a_crash_surfaces() -> None:
    async def crash() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Flows().spawn(crash())


def test_close_ends_every_flow_at_its_await_and_runs_its_cleanup() -> None:
    log, flows, never, ready = Log(), Flows(), Wait[None](), Wait[None]()

    async def tidy(name: str, wait: Wait[None]) -> None:
        try:
            await wait
            log.append(f"{name} went on")
        finally:
            log.append(f"{name} cleaned up")

    flows.start(tidy("waiting", never))
    flows.start(tidy("ready", ready))
    ready.set(None)
    flows.close()
    flows.run_ready()
    never.set(None)
    flows.run_ready()
    assert sorted(log) == ["ready cleaned up", "waiting cleaned up"]
    assert flows.waiting == 0


def test_a_wait_is_set_once() -> None:
    wait = done(1)
    with pytest.raises(AssertionError, match="set once"):
        wait.set(2)
    with pytest.raises(AssertionError, match="set once"):
        wait.fail(ValueError())
    assert wait.result() == 1


def test_a_result_before_its_time_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="before"):
        Wait[int]().result()


def test_callbacks_run_once_in_order_and_late_ones_at_once() -> None:
    wait, seen = Wait[int](), list[str]()
    wait.on_done(lambda w: seen.append(f"a{w.result()}"))
    wait.on_done(lambda w: seen.append(f"b{w.result()}"))
    wait.set(1)
    wait.on_done(lambda w: seen.append(f"c{w.result()}"))
    assert seen == ["a1", "b1", "c1"]


def test_awaiting_anything_but_a_wait_is_a_bug() -> None:
    class Foreign:
        def __await__(self):  # type: ignore[no-untyped-def]
            yield "something else"

    async def flow() -> None:
        await Foreign()

    with pytest.raises(AssertionError, match="only a Wait"):
        Flows().start(flow())


def test_a_subclass_may_pick_another_order() -> None:
    class Lifo(Flows):
        def _pick(self):  # type: ignore[no-untyped-def]
            return self._ready.pop()

    log, flows, gate = Log(), Lifo(), Wait[int]()
    for name in "abc":
        flows.start(log.step(name, gate))
    gate.set(1)
    flows.run_ready()
    assert log[3:] == ["c1", "b1", "a1"]


def test_a_lock_lets_readers_in_together_and_everybody_in_the_order_they_came() -> None:
    flows, lock, log = Flows(), RwLock(), list[str]()
    doors = {name: Wait[None]() for name in ("r1", "r2", "w1", "r3", "w2")}

    async def user(name: str) -> None:
        await lock.acquire(write=name.startswith("w"))
        log.append(f"+{name}")
        await doors[name]
        log.append(f"-{name}")
        lock.release()

    for name in doors:
        flows.spawn(user(name))
    assert log == ["+r1", "+r2"]  # r3 could share with them, but w1 came before it
    for name in doors:
        doors[name].set(None)
        flows.run_ready()
    assert log == ["+r1", "+r2", "-r1", "-r2", "+w1", "-w1", "+r3", "-r3", "+w2", "-w2"]


def test_a_lock_released_more_often_than_acquired_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="more often"):
        RwLock().release()
