"""Plays a workload on a machine of one design: a run, as data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack

from protocol.errors import UapiError, leaves
from qemu_shim.guest.memory import OutOfGuestMemory
from qemu_shim.scenarios.context import Context, DmaFailed
from qemu_shim.scenarios.recorder import NeverQuiet
from qemu_shim.scenarios.run import Run
from qemu_shim.study.workloads.workload import Workload
from qemu_shim.vmm.designs import Design, Refused
from qemu_shim.vmm.machine import Host


async def run_workload(
    host: Host, workload: Workload, design: Design, seed: int, params: Mapping[str, int] | None = None
) -> Run:
    """On daemons that run, started with the workload's options, and have no VM.

    A refusal that the play does not take up ends it; what goes wrong is in `problems`.
    """
    run = Run(workload.name, design.name, seed, workload.with_defaults(params or {}))
    async with AsyncExitStack() as stack:
        context = Context(host, design, run.params, run, stack)
        try:
            await workload.play(context)
            await context.finish()
        except* Refused as group:
            for refused in leaves(group):
                assert isinstance(refused, Refused)
                context.refuse(refused.what, refused.reason)
        except* (DmaFailed, NeverQuiet, OutOfGuestMemory, LookupError, UapiError) as group:
            run.problems += [str(error) for error in leaves(group)]
    return run
