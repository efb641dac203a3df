"""Each schedule of a small story in a process of its own, forked where the excerpt is about to open.

A search that compares schedules wants each to begin in the very same state, and a machine takes ten times as
long to make as a schedule to play.  So one is made, stands still there, and is never played on: a child is,
to the machine's end, so that each schedule is judged by what it left: by the daemons, by how the machine is
taken down, and with faults by all that is played again behind them.

The child tells over a pipe what its strategy was asked and told; the parent's, which has heard nothing of it,
is asked and told the same.  So all that a strategy knows is in one process, whichever strategy it is.
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Sequence

from simulator.search.explore import OTHER, PlayerLost, RunEnd
from simulator.search.option import Option, Strategy
from simulator.search.replay import Replay
from simulator.settle import freeze
from simulator.world.outside import held
from simulator.world.schedule import Judged, Living

_Told = int | tuple[int, ...]
"""A step that was taken, or those that one was to be chosen of."""


class _Steps:
    """By number.  What the parent knows a child knows, and need not tell."""

    def __init__(self) -> None:
        self.known: list[Option] = []
        self._numbers: dict[Option, int] = {}

    def number(self, step: Option) -> int:
        number = self._numbers.setdefault(step, len(self.known))
        if number == len(self.known):
            self.known.append(step)
        return number


class _Telling:
    """Strategy: another one, and what it was asked and told."""

    def __init__(self, strategy: Strategy, steps: _Steps) -> None:
        self._strategy = strategy
        self._steps = steps
        self.watches = strategy.watches
        self.told: list[_Told] = []

    def choose(self, options: Sequence[Option]) -> int:
        self.told.append(tuple(map(self._steps.number, options)))
        return self._strategy.choose(options)

    def took(self, step: Option) -> None:
        self.told.append(self._steps.number(step))
        self._strategy.took(step)

    def ended(self, failed: bool) -> bool:
        raise AssertionError("a child plays one schedule")


class Forked:
    """Player."""

    def __init__(self, judged: Judged) -> None:
        self._judged = judged
        self._living = Living(judged, rounds=1, stands_first=True)
        self._steps = _Steps()
        self._stands = False

    def __call__(self, strategy: Strategy) -> RunEnd:
        """PlayerLost."""
        if not self._stands:
            end = self._made(strategy)
            if end.over:
                return end  # something broke on the way
        with held():  # or an exception would leave forks and files behind
            ours, theirs = os.pipe()
            child = os.fork()
            if not child:
                self._play(strategy, theirs)
            os.close(theirs)
            said = _said(child, ours)
        end, steps, told = pickle.loads(said)
        for step in steps:
            self._steps.number(step)
        for one in told:
            if isinstance(one, int):
                strategy.took(self._steps.known[one])
            else:
                strategy.choose([self._steps.known[number] for number in one])
        return RunEnd(end.invariant, end.sentence, faulted=end.faulted)

    def _made(self, strategy: Strategy) -> RunEnd:
        """The machine stands where the excerpt is about to open."""
        self._judged()(Replay(()))  # what is made when it is used first is made here, and not in each child
        end = self._living(strategy)
        self._stands = not end.over
        freeze()  # or a collection would touch, and so copy, all there is
        return end

    def finish(self) -> RunEnd:
        """Each child's machine has come to its end."""
        self.renew()
        return RunEnd()

    def renew(self) -> None:
        gc.unfreeze()  # what the machine leaves behind is collected where nobody hears of it
        self._living.renew()
        freeze()  # what is imported, again
        self._stands = False

    def _play(self, strategy: Strategy, pipe: int) -> None:
        """In the child; does not return."""
        status = 1
        try:
            known, telling = len(self._steps.known), _Telling(strategy, self._steps)
            try:
                end = self._living(telling)
            except Exception as error:
                end = RunEnd(OTHER, f"{type(error).__name__}: {error}")
            with os.fdopen(pipe, "wb") as file:
                pickle.dump((end, self._steps.known[known:], telling.told), file)
            status = 0
        finally:
            os._exit(status)


def _said(child: int, pipe: int) -> bytes:
    """All that it had to say; then it is gone."""
    with os.fdopen(pipe, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise PlayerLost(
            f"the process that played a schedule ended with {os.waitstatus_to_exitcode(status)}: it was "
            "killed from outside, or ran out of memory"
        )
    return said
