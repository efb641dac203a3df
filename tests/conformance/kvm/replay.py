"""One case from its first step to its last, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from protocol.errors import UapiError, leaves
from qemu_shim.vmm.kvm_client import Kvmd
from tests.conformance.kvm import guest_steps, host_steps, ioctl_steps, uffd_steps, words
from tests.conformance.kvm.cases import Case, mark_of
from tests.conformance.kvm.step import CaseFailed, Difference, Step, UnknownWord
from tests.conformance.kvm.world import KernelObjects, world_of
from tests.patience import PATIENCE_S


@dataclass(slots=True)
class Outcome:
    """`skipped` says why, `unknown` which word ended it; a case without either or differences has passed."""

    case: Case
    skipped: str = ""
    unknown: str = ""
    differences: list[Difference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not (self.skipped or self.unknown or self.differences)


async def replay(kvmd: Kvmd, case: Case) -> Outcome:
    """All differences; a step that cannot be replayed is the last one looked at."""
    outcome = Outcome(case, case.skip)
    if case.bad:
        outcome.differences.append(Difference("0", "the case itself", case.bad))
    if case.skip or case.bad:
        return outcome
    step = Step("0", {}, outcome.differences)
    try:
        async with world_of(kvmd, case) as world:
            for index, body in enumerate(case.steps):
                step = Step(str(index), body, outcome.differences)
                with trio.fail_after(PATIENCE_S):
                    await play(world, step)
            if case.with_control_slot:  # a guest ran
                step.expect("kvmd's own check", [], await kvmd.violations())
    except Exception as error:
        for each in leaves(error) if isinstance(error, ExceptionGroup) else [error]:
            met = Difference(step.index, step.doing, _say(each))
            if isinstance(each, UnknownWord | KeyError):
                outcome.unknown = str(met)
            else:
                outcome.differences.append(met)
    return outcome


async def play(world: KernelObjects, step: Step) -> None:
    """A step that is marked acts, as far as it can, but nothing is asked of it: later steps build on it."""
    if not mark_of(step.body):
        await _act(world, step)
        return
    try:
        await _act(world, Step(step.index, step.body))
    except* (CaseFailed, UapiError, KeyError):
        pass


async def _act(world: KernelObjects, step: Step) -> None:
    words.check(step)
    match step.kind:
        case "host":
            await host_steps.play(world, step)
        case "ioctl":
            await ioctl_steps.play(world, step)
        case "uffd":
            await uffd_steps.play(world, step)
        case "ring":
            await guest_steps.play_ring(world, step)
        case "guest":
            await guest_steps.play_guest(world, step, play)


def _say(error: BaseException) -> str:
    """Whatever stopped the case, for somebody who reads the recording."""
    match error:
        case CaseFailed() | UapiError():
            return str(error)
        case trio.TooSlowError():
            return f"no end after {PATIENCE_S:.0f} s"
        case KeyError():
            return f"the step has no {error}"
        case _:
            return f"{type(error).__name__}: {error}"
