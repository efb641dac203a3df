"""The whole system in one process: the daemons and a VMM that plays a scenario, on one virtual host."""

from __future__ import annotations

import atexit
import gc
import logging
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import trio

from device_sim import config as device_sim_config
from device_sim.service import DeviceSim
from iommufdd import config as iommufdd_config
from iommufdd.service.door import Iommufdd
from kvmd import config as kvmd_config
from kvmd.core.mm.frames import Reuse
from kvmd.service.door import Kvmd
from protocol.daemon import serve
from protocol.rpc.loop import Loop
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.run import Run
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.daemons import DAEMONS, DaemonSpec, Places
from qemu_shim.vmm.designs import Design
from qemu_shim.vmm.machine import Host, connect_host
from simulator.kernel.process import SimProcess
from simulator.search.excerpt import Excerpt
from simulator.search.option import Strategy
from simulator.world import trio_run
from simulator.world.fate import Fate
from simulator.world.journal import Journal
from simulator.world.outside import held
from simulator.world.process import SimFlows, run
from simulator.world.scheduler import World
from simulator.world.thread import SimThread

CLIENTS = Path("/run/tdp")
PLACES = Places(CLIENTS, Path("/run/tdp-drivers"), Path("/run/tdp-admin"))
SMALL: Mapping[str, Sequence[str]] = {"kvmd": ("--ram", "4G", "--table-ram", "64M")}

NEAR_WRAP = 2**64 - 3

REST = "rest"
REST_S = 0.1  # longer than anybody polls, shorter than watchdogs go round


def _kvmd_config(argv: list[str] | None) -> tuple[Any, Any]:
    """A stale translation is not to become true again (0026), nor a sequence to be far from its wrap (R2)."""
    given, settings = kvmd_config.parse(argv)
    return given, replace(settings, reuse=Reuse.LATE, seq_start=NEAR_WRAP)


_BUILD: Mapping[str, tuple[Callable[[list[str] | None], tuple[Any, Any]], Callable[[Loop, Any], Any]]] = {
    "kvmd": (_kvmd_config, Kvmd),
    "iommufdd": (iommufdd_config.parse, Iommufdd),
    "device_sim": (device_sim_config.parse, DeviceSim),
}


@cache
def _parsed(spec: DaemonSpec, options: tuple[str, ...]) -> tuple[Any, Any]:
    """A machine after the other is started with the same words."""
    return _BUILD[spec.name][0]([*spec.argv(PLACES)[1:], *options])


@dataclass(slots=True)
class Daemon:
    process: SimProcess
    thread: SimThread | None = None
    stop: Callable[[], None] | None = None
    """As SIGTERM does; from outside."""

    @property
    def has_died(self) -> bool:
        return self.thread is not None and self.thread.over


@dataclass(slots=True)
class System:
    """`crashes` are bugs that surfaced in a daemon's flows; `left`: who has ended with fds open, a sentence
    each, which may come of whatever else went wrong.
    """

    world: World
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    daemons: dict[str, Daemon] = field(default_factory=dict)
    crashes: list[tuple[str, BaseException]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    killed: set[str] = field(default_factory=set)  # daemons, by request

    def start(self, options: Mapping[str, Sequence[str]], fates: Mapping[str, Fate] | None = None) -> None:
        self.options = options
        for spec in DAEMONS:
            self.daemons[spec.name] = self._start(spec, (fates or {}).get(spec.name))

    def restart(self) -> list[str]:
        """Daemons that died are started again, as they were; their names."""
        died = [spec for spec in DAEMONS if self.daemons[spec.name].has_died]
        for spec in died:
            self.daemons[spec.name] = self._start(spec, None)
        return [spec.name for spec in died]

    def _start(self, spec: DaemonSpec, fate: Fate | None) -> Daemon:
        world, process = self.world, SimProcess(self.world.host, spec.name)
        daemon = Daemon(process)
        given, settings = _parsed(spec, tuple(self.options.get(spec.name, ())))
        build = _BUILD[spec.name][1]

        async def main() -> None:
            loop = Loop(process, SimFlows(world, lambda error: self.crashes.append((spec.name, error))))
            stop, token = trio.Event(), trio.lowlevel.current_trio_token()
            daemon.stop = lambda: token.run_sync_soon(stop.set)
            await serve(spec.name, loop, build(loop, settings), given.socket, stop)
            loop.close()
            self._ended(process)

        daemon.thread = world.spawn(process, lambda: run(world, process, main), fate)
        return daemon

    async def _kill(self, name: str) -> None:
        self.kill(name)

    def kill(self, name: str) -> None:
        """As SIGKILL does.  LookupError: there is no such daemon."""
        daemon = self.daemons.get(name)
        if daemon is None or daemon.thread is None:
            raise LookupError(f"no {name} runs; there are {', '.join(self.daemons)}")
        self.killed.add(name)
        self.world.kill(daemon.thread)

    def client(self, work: Callable[[Host], Awaitable[None]]) -> SimThread:
        """A VMM that will do `work`."""
        world, process = self.world, SimProcess(self.world.host, "qemu_shim")

        async def main() -> None:
            async with connect_host(CLIENTS, kernel=process, flows=partial(SimFlows, world)) as host:
                host.killer = self._kill
                await work(host)
            self._ended(process)

        return world.spawn(process, lambda: run(world, process, main))

    def _ended(self, process: SimProcess) -> None:
        """It began with no fd."""
        if left := process.open_files():
            fds = ", ".join(f"{fd} ({file.name})" for fd, file in left.items())
            self.left.append(f"I14: {process.name} has ended, and has fds open: {fds}")

    def rest(self, seconds: float) -> None:
        """Whatever is under way comes to its end."""
        world = self.world
        world.run(world.spawn(SimProcess(world.host, REST), lambda: world.wait((), seconds)))

    def problems(self) -> list[str]:
        """Bugs that surfaced."""
        return [
            *(_said(error) for error in self.world.crashes()),
            *(f"{name}: {_said(error)}" for name, error in self.crashes),
        ]

    def forget(self) -> None:
        """The world is closed.  What its processes left behind goes now, and not in the next one, where it
        would run."""
        self.daemons.clear()
        self.crashes.clear()

    def stop(self) -> None:
        """All daemons, in an orderly way: none in the middle of what a VMM that has gone left it to do."""
        self.rest(REST_S)
        for spec in reversed(DAEMONS):
            daemon = self.daemons[spec.name]
            assert daemon.thread is not None
            if daemon.stop is not None and not daemon.thread.over:
                daemon.stop()
            self.world.run(daemon.thread)


def _said(error: BaseException) -> str:
    """With what it came of: an assert says which invariant it is of."""
    said = f"{type(error).__name__}: {error}"
    return said if error.__cause__ is None else f"{said}: {_said(error.__cause__)}"


_unfinished: list[bool] = []
"""The last world was: what its callers still held of it when it was closed has to go before the next one, in
which it would run."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Garbage that does something when it goes (an asynchronous generator is closed, a weak reference calls)
    goes between runs: in the middle of one, when it goes depends on all that the interpreter ever did.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def system(
    strategy: Strategy,
    options: Mapping[str, Sequence[str]] = SMALL,
    journal: Journal | None = None,
    fates: Mapping[str, Fate] | None = None,
) -> Iterator[System]:
    """The daemons run, or will when they are chosen; `fates` by their names."""
    clear_away()
    world = World(strategy, journal)

    def by_choice(tasks: list[trio.lowlevel.Task]) -> list[trio.lowlevel.Task]:
        if world.picks_first():
            return tasks
        ordered = []
        while len(tasks) > 1:
            labels = [f"{n} {task.name}" for n, task in enumerate(tasks)]
            ordered.append(tasks.pop(world.pick("task", labels)))
        return [*ordered, *tasks]

    with trio_run.ordered(by_choice), uncollected():
        made = System(world)
        made.start(options, fates)
        try:
            yield made
        finally:
            if world.unfinished:
                _unfinished.append(True)
                with _unheard():
                    world.close()
                    made.forget()


def clear_away() -> None:
    """What is left of systems that were cut off in the middle, once nobody holds them any more."""
    if _unfinished:
        with _unheard():
            _unfinished.clear()


@atexit.register
def _goes_unheard() -> None:
    """What was interrupted was held to the end: by the exception, or by who has told of it."""
    gc.unfreeze()
    with _unheard():
        _unfinished.clear()


@contextmanager
def _unheard() -> Iterator[None]:
    """What is cut off in the middle complains of it, and would take a signal's exception along."""
    hook, generators = sys.unraisablehook, logging.getLogger("trio.async_generator_errors")
    sys.unraisablehook, generators.disabled = lambda _: None, True
    try:
        with held(), catch_warnings():
            simplefilter("ignore")
            yield
            gc.collect()
    finally:
        sys.unraisablehook, generators.disabled = hook, False


def options_of(scenario: Scenario) -> Mapping[str, Sequence[str]]:
    """What daemons are started with for it, by their names."""
    own = scenario.options
    return {name: (*SMALL.get(name, ()), *own.get(name, ())) for name in {**SMALL, **own}}


@dataclass(slots=True)
class Played:
    """`problems`: bugs that surfaced, and then what the scenario makes of them."""

    run: Run | None
    report: Report
    problems: list[str]
    decisions: int


def refusals(report: Report) -> list[str]:
    """A small story has none: what was to be searched would not have happened."""
    return [f"the story ended here: {refused}" for refused in report.ended]


def playing(
    scenario: Scenario,
    design: Design,
    strategy: Strategy,
    seed: int = 1,
    params: Mapping[str, int] | None = None,
    journal: Journal | None = None,
) -> Generator[list[str], None, Played]:
    """One run of a scenario, which stands still between the rounds of an excerpt; yields its problems so far.
    Stuck, Stopped.
    """
    report = Report(scenario.name)
    runs: list[Run] = []

    async def work(host: Host) -> None:
        runs.append(await run_scenario(host, scenario, design, seed, params, report))

    with system(strategy, options_of(scenario), journal) as made:
        world = made.world
        if isinstance(strategy, Excerpt):
            strategy.between = world.pause

        client = made.client(work)
        while not world.run(client):
            yield [*made.problems(), *report.problems]
        if report.ended:
            made.left.clear()  # of a VMM that was cut short
        made.stop()
        run = runs[0] if runs else None
        problems = [*made.problems(), *report.problems]
        if isinstance(strategy, Excerpt):
            problems += refusals(report)
        return Played(run, report, problems or made.left, world.decisions)


def play(
    scenario: Scenario,
    design: Design,
    strategy: Strategy,
    seed: int = 1,
    params: Mapping[str, int] | None = None,
    journal: Journal | None = None,
) -> Played:
    """One run of a scenario under one schedule, to its end.  Stuck, Stopped."""
    run = playing(scenario, design, strategy, seed, params, journal)
    while True:
        try:
            next(run)
        except StopIteration as ended:
            played: Played = ended.value
            return played
