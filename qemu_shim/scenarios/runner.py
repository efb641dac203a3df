"""Plays a scenario on a machine of one design: a run, as data, and a report for people."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack

from protocol.errors import UapiError, leaves
from qemu_shim.guest.memory import OutOfGuestMemory
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.guest import DmaFailed
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.recorder import NeverQuiet
from qemu_shim.scenarios.run import Run
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.designs import Design, Refused
from qemu_shim.vmm.machine import Host


async def run_scenario(
    host: Host,
    scenario: Scenario,
    design: Design,
    seed: int = 1,
    params: Mapping[str, int] | None = None,
    report: Report | None = None,
    *,
    alone: bool = True,
) -> Run:
    """On daemons that run, started with the scenario's options.  `alone`: no VM but the run's may be there;
    else what others have done meanwhile is counted too.

    A refusal that the play does not take up ends it, and is in `report.ended` as well; what goes wrong is in
    `problems`, of the run and of the report alike.
    """
    told = report or Report(scenario.name)
    run = Run(scenario.name, design.name, seed, scenario.with_defaults(params or {}), problems=told.problems)
    async with AsyncExitStack() as stack:
        context = Context(host, design, run, stack, told, alone=alone, counted=scenario.counted)
        try:
            await scenario.play(context)
            await context.finish()
        except* Refused as group:
            for refused in leaves(group):
                assert isinstance(refused, Refused)
                context.refuse(refused.what, refused.reason)
                told.ended.append(str(refused))
        except* (DmaFailed, NeverQuiet, OutOfGuestMemory, LookupError, UapiError) as group:
            run.problems += [str(error) for error in leaves(group)]
    return run
