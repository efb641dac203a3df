"""One schedule of a scenario, judged: what a search runs over and over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.designs import DESIGNS
from simulator.ghost.ghost import Ghost
from simulator.ghost.probes.watching import watching
from simulator.ghost.violation import Verdicts
from simulator.planted.registry import planted
from simulator.search.excerpt import Excerpt
from simulator.search.explore import RunEnd, RunOne
from simulator.search.option import Strategy
from simulator.stories.story import SmallStory
from simulator.world.scheduler import Stopped, Stuck
from simulator.world.system import play

_INVARIANT = re.compile(r"\b([IR]\d+)\b: ")
OTHER = "check"
"""Instead of an invariant: what the scenario or a daemon says has none."""
STUCK = "stuck"


@dataclass(frozen=True, slots=True)
class Judged:
    """A scenario on a design, with a planted bug or none.  A worker is told its name and how to `find` it."""

    find: Callable[[str], Scenario | SmallStory]
    scenario: str
    design: str
    seed: int = 1  # of what the scenario leaves to chance
    params: Mapping[str, int] = field(default_factory=dict)
    plant: str = ""

    def __call__(self) -> RunOne:
        """What runs one schedule."""
        found, design = self.find(self.scenario), DESIGNS[self.design]

        def run_one(strategy: Strategy) -> RunEnd:
            verdicts = Verdicts()
            ghost = Ghost(verdicts)
            under, scenario = strategy, found
            if isinstance(scenario, SmallStory):
                under = Excerpt(strategy)
                scenario = scenario.scenario(under)
            try:
                with planted(self.plant) if self.plant else nullcontext(), watching(ghost) as watch:
                    problems = play(scenario, design, under, self.seed, self.params).problems
                    if not problems:
                        watch.settled()
            except Stopped:
                return RunEnd()
            except Stuck as stuck:
                ghost.liveness.stuck()
                problems = [f"{STUCK}: {stuck}"]
            return _judged(verdicts, problems)

        return run_one


def _judged(verdicts: Verdicts, problems: list[str]) -> RunEnd:
    """What the ghost saw came first: it judges each step, the scenario and the daemons at their end."""
    for violation in verdicts.found:
        return RunEnd(violation.invariant, violation.sentence)
    for problem in problems:
        named = _INVARIANT.search(problem)
        stuck = problem.startswith(STUCK)
        return RunEnd(named[1] if named else STUCK if stuck else OTHER, problem)
    return RunEnd()
