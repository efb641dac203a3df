"""Recorded cases against a kvmd of our own: a real process, a real socket, one for all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack

import trio

from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.rpc.loop import Loop
from qemu_shim.vmm.daemons import KVMD, socket_of
from qemu_shim.vmm.kvm_client import Kvmd
from qemu_shim.vmm.supervisor import supervised
from tests.conformance.kvm.cases import Case
from tests.conformance.kvm.replay import Outcome, replay

# The recorder's host: no TDP limit below 2^52, more memory than any case touches, no SMM, no PML (whose log
# keeps entries of a ring), no bitmap beside rings.
KVMD_OPTIONS = (
    *("--maxphyaddr", "52", "--ram", "8G"),
    *("--address-spaces", "1", "--no-pml", "--no-dirty-ring-bitmap"),
)


async def replay_all(
    cases: Iterable[Case],
    kvmd_options: Sequence[str] = (),
    report: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """In their order; `report` hears of each at once.  Raises DaemonFailed if kvmd does not end well."""
    outcomes: list[Outcome] = []
    crashes: list[BaseException] = []
    options = {KVMD.name: [*KVMD_OPTIONS, *kvmd_options]}
    async with supervised(options, "warning", (KVMD,)) as running, AsyncExitStack() as stack:
        loop = Loop(LINUX, Flows(crashes.append))
        stack.callback(loop.close)
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(loop.serve)
        stack.callback(nursery.cancel_scope.cancel)
        kvmd = await Kvmd.connect(loop, socket_of(KVMD, running.directory))
        stack.callback(kvmd.close)
        for case in cases:
            outcomes.append(await replay(kvmd, case))
            report(outcomes[-1])
    if crashes:
        raise crashes[0]
    return outcomes
