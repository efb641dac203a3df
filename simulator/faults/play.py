"""A scenario under faults, and what must hold all the same.

While there are faults a VMM may be denied what it asks, if one of them is a reason; daemons that died are
started again, and then the same scenario is played once more without any: all of it must be served.  No
daemon has a bug in either, and whoever watches judges each step of both.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

from protocol.errors import PeerError, UapiError
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.designs import Design
from qemu_shim.vmm.machine import Host
from simulator.faults.plan import STOPS_S, Faults
from simulator.faults.seams import injected
from simulator.ghost.violation import invariant_of
from simulator.search.excerpt import Excerpt
from simulator.search.option import Strategy
from simulator.world.journal import Journal
from simulator.world.system import Played, System, options_of, refusals, system

CALM_S = 2 * max(STOPS_S.values())
"""In which who was stopped goes on, and all hear of who died: before that nobody starts him again."""
_DENIED = (PeerError, UapiError, OSError)


def playing_faulted(
    scenario: Scenario,
    calm: Scenario,
    design: Design,
    strategy: Strategy,
    faults: Faults,
    seed: int = 1,
    params: Mapping[str, int] | None = None,
    journal: Journal | None = None,
) -> Generator[list[str], None, Played]:
    """As `playing`; behind its end `calm` is played, the same scenario of which nothing is searched.  An
    excerpt begins and ends the faults itself; else they are of all the run.
    """
    report, again = Report(scenario.name), Report(scenario.name)

    async def first(host: Host) -> None:
        if not isinstance(strategy, Excerpt):
            faults.begin()
        await run_scenario(host, scenario, design, seed, params, report)

    async def second(host: Host) -> None:
        await run_scenario(host, calm, design, seed, params, again)

    with system(strategy, options_of(scenario), journal) as made, injected(faults):
        world = made.world
        faults.put_into(world)
        if isinstance(strategy, Excerpt):
            strategy.between = world.pause
        client = made.client(first)
        while not world.run(client):
            yield _problems(made, report, faults)
            if not (isinstance(strategy, Excerpt) and strategy.was_last):
                faults.next_schedule()
        if isinstance(strategy, Excerpt):
            strategy.close()  # who opened it may be dead
        faults.end()
        problems = _problems(made, report, faults)
        if isinstance(strategy, Excerpt) and not faults.excuses:
            problems += refusals(report)
        world.failures.clear()
        made.rest(CALM_S)
        if (faults.is_silent or faults.is_off_bus) and not made.daemons["device_sim"].has_died:
            made.kill("device_sim")
            made.rest(CALM_S)
        killed = faults.killed | made.killed  # by a fault, or by the scenario
        problems += [f"{name} ended by itself" for name in made.restart() if name not in killed]
        client = made.client(second)
        while not world.run(client):
            pass
        if again.ended:
            made.left.clear()
        made.stop()
        problems += [*again.problems, *made.problems()]
        if isinstance(strategy, Excerpt):
            problems += refusals(again)
        return Played(None, report, problems or made.left, world.decisions)


def _problems(made: System, report: Report, faults: Faults) -> list[str]:
    """Less what a VMM was denied because of a fault, of which nothing is said in a later schedule either."""
    if faults.excuses:
        world = made.world
        made.left.clear()  # of the VMM
        world.failures = [error for error in world.crashes() if not isinstance(error, _DENIED)]
        report.problems[:] = filter(invariant_of, report.problems)
    return [*report.problems, *made.problems()]
