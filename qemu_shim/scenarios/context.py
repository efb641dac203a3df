"""What a scenario is given: machines of the design, operations of guest and device, steps, and a report.

`step` waits until nothing is under way any more and takes a sample, so that what a step cost is in it and in
no other, and the same each time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from protocol.errors import UapiError
from protocol.hw.dsa import CompletionRecord, Opcode, Status
from protocol.units import KIB, PAGE_SIZE, Gpa
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.measure import Report
from qemu_shim.scenarios.recorder import Recorder
from qemu_shim.scenarios.run import Refusal, Run, Sample
from qemu_shim.vmm.designs import Design, Refused
from qemu_shim.vmm.machine import BareMachine, Host, Machine, MachineConfig, attached, bare_machine

T = TypeVar("T")
KERNEL_BYTES = 256 * KIB  # the guest's
DRIVER_PAGES = 16  # and its driver's, at most
EQUAL = 0  # the result of a comparison


@dataclass(slots=True)
class Guest:
    """A running machine and one queue of its device, which blocks on faults."""

    machine: Machine
    queue: IdxdWorkQueue

    def pages(self, count: int, alignment: int = PAGE_SIZE) -> list[int]:
        """Addresses of so many pages in a row that nobody has touched."""
        start = self.machine.memory.allocate(count, alignment)
        return [start + n * PAGE_SIZE for n in range(count)]

    async def touch(self, gpas: Sequence[int]) -> None:
        """The CPU stores a byte at each."""
        await self.machine.memory.touch(gpas)

    async def fill(self, gpa: int, size: int = PAGE_SIZE, pattern: int = 0) -> None:
        """The device writes."""
        _check(await self.queue.fill(gpa, pattern, size), f"fill of gpa {gpa:#x}")

    async def copy(self, dst: int, src: int, size: int = PAGE_SIZE) -> None:
        """The device reads and writes."""
        _check(await self.queue.memmove(dst, src, size), f"copy to gpa {dst:#x}")

    async def holds(self, gpa: int, size: int, pattern: int) -> bool:
        """The device reads, and compares."""
        record = await self.queue.run(Opcode.COMPVAL, src=gpa, dst=pattern, size=size)
        _check(record, f"read of gpa {gpa:#x}")
        return record.result == EQUAL


def _check(record: CompletionRecord, what: str) -> None:
    if record.status is not Status.SUCCESS:
        raise DmaFailed(f"{what}: {record.status.name} at {record.fault_addr:#x}")


class DmaFailed(Exception):
    """A descriptor did not end well; a scenario that does not expect it has a problem."""


class Context:
    """`chance` is the only source of chance; `params` are the scenario's, with defaults; `report` is what
    people are shown, and knows the same problems as `run`.
    """

    def __init__(self, host: Host, design: Design, run: Run, stack: AsyncExitStack, report: Report) -> None:
        assert report.problems is run.problems
        self.host = host
        self.design = design
        self.params: Mapping[str, int] = run.params
        self.report = report
        self.chance = Random(run.seed)
        self._run = run
        self._stack = stack
        self._recorder = Recorder(host)

    async def boot(self, **config: Any) -> Guest:
        """A machine of the design, and the sample `start`."""
        (guest,) = await self.boot_all(MachineConfig(design=self.design, **config))
        return guest

    async def boot_for(self, pages: int) -> Guest:
        """A machine of which all is in use but for the guest's kernel: `pages` pages for the scenario."""
        (guest,) = await self.boot_all(self.sized(pages))
        return guest

    def sized(self, pages: int, **config: Any) -> MachineConfig:
        ram = KERNEL_BYTES + (pages + DRIVER_PAGES) * PAGE_SIZE
        return MachineConfig(design=self.design, ram_bytes=ram, free_from=Gpa(KERNEL_BYTES), **config)

    async def boot_all(self, *configs: MachineConfig) -> list[Guest]:
        """Machines side by side, each with a device of its own, and the sample `start` of all."""
        await self._recorder.begin()
        guests = [await self._with_device(await self._without_device(config)) for config in configs]
        await self.step("start")
        return guests

    async def boot_without_device(self, **config: Any) -> BareMachine:
        """A machine of the design whose device comes later, and the sample `start`."""
        await self._recorder.begin()
        bare = await self._without_device(MachineConfig(design=self.design, **config))
        await self.step("start")
        return bare

    async def attach(self, bare: BareMachine) -> Guest:
        """Its device has come, as the step `attached`."""
        guest = await self._with_device(bare)
        await self.step("attached")
        return guest

    async def _without_device(self, config: MachineConfig) -> BareMachine:
        bare = await self._stack.enter_async_context(bare_machine(self.host, config))
        self._recorder.cpus += bare.cpus
        return bare

    async def _with_device(self, bare: BareMachine) -> Guest:
        guest = await self._stack.enter_async_context(_guest(bare))
        self._recorder.machines.append(guest.machine)
        return guest

    async def quiet(self) -> None:
        """Nothing is under way any more: whoever is told of something has heard of it."""
        await self._recorder.quiet()

    async def step(self, name: str) -> Sample:
        """What happened since the last step is called `name`."""
        sample = await self._recorder.sample(name)
        self._run.samples.append(sample)
        return sample

    def count(self, name: str, more: int) -> None:
        """What only the scenario knows: pages_written, pages_reported."""
        self._recorder.own[name] += more

    def refuse(self, what: str, why: str) -> None:
        self._run.refusals.append(Refusal(what, why))

    async def offered(self, call: Any) -> bool:
        """Await it; False, and noted, if the design refuses."""
        try:
            await call
        except Refused as refused:
            self.refuse(refused.what, refused.reason)
            return False
        return True

    async def allowed(self, what: str, number: int, call: Awaitable[T]) -> T | None:
        """Await it; None, and noted, if a daemon refuses it with that errno."""
        try:
            return await call
        except UapiError as error:
            if error.errno != number:
                raise
            self.refuse(what, str(error))
            return None

    def elsewhere(self, pages: int) -> None:
        """So many pages of the host are not the machines'."""
        self._recorder.elsewhere += pages

    def expect(self, holds: bool, problem: str) -> None:
        self.report.expect(holds, problem)

    async def finish(self) -> None:
        """What every run ends with: the invariants, while the machines still run."""
        self._run.problems += await self._recorder.problems()


@asynccontextmanager
async def _guest(bare: BareMachine) -> AsyncIterator[Guest]:
    async with attached(bare) as running:
        queue = IdxdWorkQueue(running.portal, running.memory, block_on_fault=True)
        await queue.enable()
        yield Guest(running, queue)
