"""One blow: a story is played, at one call something befalls one process, and everybody is judged."""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from unittest.mock import patch

import trio

from protocol.errors import PeerError, UapiError, leaves
from qemu_shim.scenarios import recorder
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.vmm.designs import DESIGNS
from qemu_shim.vmm.interrupt import EXIT_FAILED
from qemu_shim.vmm.machine import connect_host
from tests.patience import PATIENCE_S
from tests.torture.calls import DEATHS, SINKS, Fault
from tests.torture.daemons import SPECS, StruckDaemons
from tests.torture.doors import Silent, doors_of
from tests.torture.holdings import Holdings, all_holdings, holdings
from tests.torture.judges import bare_errors, judged
from tests.torture.stories import PROOF, QUIET_S, STORIES, ShortStory

VMM = "qemu_shim"
PROCESSES = (*SPECS, VMM)
START = "start"  # the story of a daemon that is stopped in order and started again
CANNOT_START = 2
LOOK_S = 0.005
# No reason, but what must not happen.
LOST = re.compile(r"^(FAILED: )?I\d+|holds foreign|from byte \d+ on, expected|data error")


class How(StrEnum):
    SURVIVED = "survived"
    REFUSED = "refused"  # with a reason
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Blow:
    """`at` counts the calls of the victim at which the fault can befall it; `errno_index`: see Order."""

    story: str
    victim: str
    fault: Fault
    at: int
    errno_index: int = 0


@dataclass(frozen=True, slots=True)
class Aftermath:
    """`call`: where it was; None: the victim made fewer calls, and nothing befell it."""

    call: str | None
    how: How
    why: str = ""


class Torture:
    """StruckDaemons to be struck; after each blow all of them live again."""

    def __init__(self, daemons: StruckDaemons) -> None:
        self._daemons = daemons
        self._before: dict[str, Holdings] = {}

    async def begin(self) -> None:
        """Everybody has been of use once, and has what it keeps for good."""
        for name in ("sharing", "mirror", "sharing"):
            how, why = await self._play(STORIES[name])
            assert how is How.SURVIVED, why
        await self._rest()
        self._before = await self._held()

    async def _held(self) -> dict[str, Holdings]:
        """With a door open to each daemon, as there is while they are judged."""
        async with doors_of(self._daemons, list(SPECS)) as doors:
            await doors.stats()
            return all_holdings(self._daemons) | {"the VMM": holdings(os.getpid())}

    async def _rest(self) -> None:
        wrong = await judged(self._daemons, {})
        assert not wrong, wrong

    async def strike(self, blow: Blow) -> Aftermath:
        if blow.fault in SINKS:
            return await self._strike_sink(blow)
        order = self._daemons.orders[blow.victim]
        with self._limits(blow.victim):
            order.give(blow.fault, blow.at, blow.errno_index)
            how, why = await self._played(blow)
            order.withdraw()
            if blow.fault is Fault.NO_FDS:
                await come(lambda: order.done)  # or it shuts behind us what we open again
            met = order.met
        if met and blow.fault in DEATHS and blow.victim != VMM:
            self._daemons.running[blow.victim].ended()
        if how is How.FAILED:
            return Aftermath(met, how, why)
        wrong = bare_errors(why) + await judged(self._daemons, self._before)
        wrong += await self._restart(blow)
        if wrong:
            return Aftermath(met, How.FAILED, "; ".join(wrong))
        return Aftermath(met, how, why)

    async def _strike_sink(self, blow: Blow) -> Aftermath:
        """Nobody sees what it says, so at last it is asked to stop: the status tells of its bugs."""
        name = blow.victim
        await self._start_with(name, blow.fault)
        how, why = await self._played(blow)
        if how is How.FAILED:
            return Aftermath("start", how, why)
        wrong = bare_errors(why) + await judged(self._daemons, self._before)
        wrong += await self._start_with(name, Fault.NOTHING)
        wrong += await self._restart(blow)
        return Aftermath("start", How.FAILED if wrong else how, "; ".join(wrong) or why)

    async def _start_with(self, name: str, sink: Fault) -> list[str]:
        """In the place of the one that runs."""
        running = self._daemons.running[name]
        running.signal(signal.SIGTERM)
        status = running.ended()
        self._daemons.launch(name, sink)
        await come(lambda: self._daemons.ready(name))
        how, why = await self._play(STORIES[PROOF])
        self._before[name] = (await self._held())[name]
        wrong = [] if how is How.SURVIVED else [f"started again: {why}"]
        return [*wrong, f"{name} ended with status {status}"] if status else wrong

    @contextmanager
    def _limits(self, victim: str) -> Iterator[None]:
        """After the blow it goes on, and may open again what it was kept from."""
        yield
        running = self._daemons.running.get(victim)
        if running is not None and running.status is None:
            running.signal(signal.SIGCONT)  # it was stopped behind the end of the story
            with suppress(ProcessLookupError):  # it is dying
                limits = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.prlimit(running.pid, resource.RLIMIT_NOFILE, limits)

    async def _played(self, blow: Blow) -> tuple[How, str]:
        played = How.FAILED, ""
        with trio.move_on_after(PATIENCE_S) as patience:
            async with trio.open_nursery() as nursery:
                watching: list[str] = []
                if blow.fault is Fault.STOP:
                    nursery.start_soon(self._let_go_on, blow.victim, watching)
                if blow.story == START:
                    played = await self._start_again(blow.victim)
                elif blow.victim == VMM:
                    played = await self._play_apart(STORIES[blow.story])
                else:
                    played = await self._play(STORIES[blow.story])
                nursery.cancel_scope.cancel()
        if patience.cancelled_caught:
            return How.FAILED, f"the story never ends: {await self._who_is_silent()}"
        return (How.FAILED, "; ".join(watching)) if watching else played

    async def _play(self, story: ShortStory) -> tuple[How, str]:
        """By a VMM in this process."""
        report = Report(story.scenario.name)
        ended: list[str] = []
        bugs: list[str] = []
        try:
            async with connect_host(self._daemons.directory) as host:
                with patch.object(recorder, "PATIENCE_S", QUIET_S):
                    await run_scenario(
                        host, story.scenario, DESIGNS[story.design], params=story.params, report=report
                    )
        except* (UapiError, PeerError, OSError) as group:
            ended = [str(error) for error in leaves(group)]
        except* Exception as group:
            bugs = [f"the VMM met a bug: {error!r}" for error in leaves(group)]
        if bugs:
            return How.FAILED, "; ".join(bugs)
        return verdict([*ended, *report.ended, *report.problems], report.lines)

    async def _play_apart(self, story: ShortStory) -> tuple[How, str]:
        """By a VMM of its own process: it is the one to be struck."""
        argv = ["run", *story.argv, "--attach", str(self._daemons.directory)]
        vmm = self._daemons.running[VMM] = self._daemons.spawn(VMM, argv)
        try:
            await come(lambda: vmm.status is not None)
        finally:
            vmm.signal(signal.SIGKILL)
            vmm.ended()
            del self._daemons.running[VMM]
        said = [line for line in self._daemons.log_path(VMM).read_text().splitlines() if line]
        if vmm.status == -signal.SIGKILL:
            return How.REFUSED, "killed"
        if vmm.status not in (0, EXIT_FAILED):
            return How.FAILED, f"the VMM ended with status {vmm.status}: {'; '.join(said[-3:])}"
        return (How.SURVIVED, "") if vmm.status == 0 else verdict(said[-3:], said)

    async def _start_again(self, name: str) -> tuple[How, str]:
        """Stopped in order and started; the blow may come in either."""
        running = self._daemons.running[name]
        running.signal(signal.SIGTERM)
        await come(lambda: running.status is not None)
        if running.status:
            return self._ended(name, running.status)
        started = self._daemons.launch(name)
        await come(lambda: self._daemons.socket(name).exists() or started.status is not None)
        try:
            async with doors_of(self._daemons, [name]) as doors:
                await doors.stats()
        except Silent as error:
            # It hung up on the first who came; or its name, which nobody could be heard under, goes again.
            await come(lambda: self._daemons.socket(name).exists() or started.status is not None)
            if started.status is None:
                return How.REFUSED, str(error)
        return (How.SURVIVED, "") if started.status is None else self._ended(name, started.status)

    def _ended(self, name: str, status: int) -> tuple[How, str]:
        said = self._daemons.log_path(name).read_text().splitlines()
        if status == -signal.SIGKILL:
            return How.REFUSED, "killed"
        if status == CANNOT_START:
            return How.REFUSED, said[-1]
        return How.FAILED, f"{name} ended with status {status}: {said[-1]}"

    async def _let_go_on(self, victim: str, wrong: list[str]) -> None:
        """While it is stopped the others answer; then it goes on."""
        running = self._daemons.running
        await come(lambda: victim in running and running[victim].stopped)
        try:
            async with doors_of(self._daemons, [name for name in SPECS if name != victim]) as doors:
                await doors.stats()
        except Silent as error:
            wrong.append(f"while {victim} is stopped: {error}")
        running[victim].signal(signal.SIGCONT)

    async def _who_is_silent(self) -> str:
        silent = []
        for name in self._daemons.alive:
            try:
                async with doors_of(self._daemons, [name]) as doors:
                    await doors.stats()
            except Silent as error:
                silent.append(str(error))
        return "; ".join(silent) or "all daemons answer STATS, and one owes the VMM an answer"

    async def _restart(self, blow: Blow) -> list[str]:
        """The dead are started again, and everybody serves as before."""
        wrong = []
        dead = [name for name in SPECS if name not in self._daemons.alive]
        for name in dead:
            status = self._daemons.running[name].status
            refused = blow.story == START and status == CANNOT_START
            killed = blow.fault in DEATHS and status == -signal.SIGKILL
            if name != blow.victim or not (refused or killed):
                wrong.append(f"{name} ended with status {status}")
            self._daemons.start(name)
        how, why = await self._play(STORIES[PROOF])
        if how is not How.SURVIVED:
            wrong.append(f"afterwards: {why}")
        wrong += await judged(self._daemons, {k: v for k, v in self._before.items() if k not in dead})
        if dead:
            held = await self._held()
            self._before |= {name: held[name] for name in dead}
        return wrong


async def come(holds: Callable[[], bool]) -> None:
    """Whoever calls has set the time."""
    while True:
        if holds():
            return
        await trio.sleep(LOOK_S)


def verdict(said: list[str], told: Sequence[str] = ()) -> tuple[How, str]:
    """What a story that ended so came to: nothing is wrong, or there is a reason; never a lost byte, be it in
    what it only `told`.
    """
    lost = [line for line in (*said, *told) if LOST.search(line)]
    if lost:
        return How.FAILED, "; ".join(lost)
    return (How.REFUSED, said[0]) if said else (How.SURVIVED, "")
