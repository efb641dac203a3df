"""What a scenario is given: machines of the design, operations of guest and device, steps, and a report.

`step` waits until nothing is under way any more and takes a sample, so that what a step cost is in it and in
no other, and the same each time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any, TypedDict, TypeVar, Unpack

from protocol.errors import UapiError
from protocol.units import KIB, PAGE_SIZE, Gpa
from qemu_shim.scenarios.counters import Counters, grown
from qemu_shim.scenarios.guest import DmaFailed, Guest, running_guest
from qemu_shim.scenarios.measure import Report, Snapshot, fill_table, snapshot
from qemu_shim.scenarios.recorder import Recorder
from qemu_shim.scenarios.run import Refusal, Run, Sample
from qemu_shim.vmm.designs import Design, Refused
from qemu_shim.vmm.machine import FIRST_FREE_GPA, BareMachine, Host, MachineConfig, bare_machine

T = TypeVar("T")
KERNEL_BYTES = 256 * KIB  # the guest's
DRIVER_PAGES = 16  # and its driver's, at most


class Wishes(TypedDict, total=False):
    """What a machine is to be like: bytes of RAM (1 GiB), how many devices and vCPUs (1 of each), bytes of
    the host pages behind its RAM (4096), bytes of the blocks that may be converted to private (0: none),
    bytes of each vCPU's dirty ring (0: none), where its kernel's own memory ends (16 MiB).
    """

    ram_bytes: int
    devices: int
    vcpus: int
    page_size: int
    private_block: int
    dirty_ring_bytes: int
    free_from: int


class Context:
    """`chance` is the only source of chance; `params` are the scenario's, with defaults; `report` is what
    people are shown, and knows the same problems as `run`.
    """

    host: Host
    design: Design
    params: Mapping[str, int]
    chance: Random
    report: Report

    def __init__(self, host: Host, design: Design, run: Run, stack: AsyncExitStack, report: Report) -> None:
        assert report.problems is run.problems
        self.host = host
        self.design = design
        self.params = run.params
        self.chance = Random(run.seed)
        self.report = report
        self._run = run
        self._stack = stack
        self._recorder = Recorder(host)
        self._first: Snapshot | None = None  # before the first machine
        self._starts = 0
        self._devices = 0  # that have a machine

    # -- machines ------------------------------------------------------------------------------------------

    async def boot(self, **wished: Unpack[Wishes]) -> Guest:
        """A machine of the design with devices of its own, and the sample `start`.  Refused."""
        (guest,) = await self.boot_all(self._config(**wished))
        return guest

    async def boot_for(self, pages: int) -> Guest:
        """A machine of which all is in use but for the guest's kernel: `pages` pages for the scenario."""
        (guest,) = await self.boot_all(self.sized(pages))
        return guest

    def sized(self, pages: int, **config: Any) -> MachineConfig:
        """RAM for a kernel, a driver and `pages` pages."""
        ram = KERNEL_BYTES + (pages + DRIVER_PAGES) * PAGE_SIZE
        return MachineConfig(design=self.design, ram_bytes=ram, free_from=Gpa(KERNEL_BYTES), **config)

    async def boot_all(self, *configs: MachineConfig) -> list[Guest]:
        """Machines side by side, each with devices of its own, and the sample `start` of all."""
        await self._begin()
        guests = [await self._with_device(await self._without_device(config)) for config in configs]
        await self.step(self._start())
        return guests

    async def boot_without_device(self, **wished: Unpack[Wishes]) -> BareMachine:
        """A machine of the design whose devices come later, and the sample `start`."""
        await self._begin()
        bare = await self._without_device(self._config(**wished))
        await self.step(self._start())
        return bare

    async def attach(self, bare: BareMachine) -> Guest:
        """Its devices have come, as the step `attached`.  Refused."""
        guest = await self._with_device(bare)
        await self.step("attached")
        return guest

    async def kill(self, daemon: str) -> None:
        """kvmd, iommufdd or device_sim dies as of `kill -9`.  Nothing is counted any more, and of the
        invariants those are checked whose daemons live.  LookupError: it is not ours to kill.
        """
        await self.host.kill(daemon)

    async def _begin(self) -> None:
        if self._first is None:
            await self._recorder.begin()
            self._first = await snapshot(self.host)

    def _start(self) -> str:
        """The machines that came first are the sample `start`, the next `start 2`."""
        self._starts += 1
        return "start" if self._starts == 1 else f"start {self._starts}"

    def _config(self, *, devices: int = 1, free_from: int = FIRST_FREE_GPA, **wished: Any) -> MachineConfig:
        numbers = tuple(range(self._devices, self._devices + devices))
        self._devices += devices
        return MachineConfig(design=self.design, devices=numbers, free_from=Gpa(free_from), **wished)

    async def _without_device(self, config: MachineConfig) -> BareMachine:
        bare = await self._stack.enter_async_context(bare_machine(self.host, config))
        self._recorder.cpus += bare.cpus
        return bare

    async def _with_device(self, bare: BareMachine) -> Guest:
        guest = await self._stack.enter_async_context(running_guest(bare))
        self._recorder.machines.append(guest.machine)
        return guest

    # -- counting ------------------------------------------------------------------------------------------

    async def quiet(self) -> None:
        """Nothing is under way any more: whoever is told of something has heard of it."""
        await self._recorder.quiet()

    async def step(self, name: str) -> Sample:
        """What happened since the last step is called `name`: what is compared.  The step that ends with the
        first DMA is called `first dma`.
        """
        sample = await self._recorder.sample(name)
        self._run.samples.append(sample)
        return sample

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[Counters]:
        """What the counters of all daemons grow by, from rest to rest; known when it is over."""
        before, cost = await self._recorder.quiet(), Counters()
        yield cost
        cost.take(Counters.of(grown(await self._recorder.quiet(), before)))

    def count(self, name: str, more: int) -> None:
        """What only the scenario knows: pages_written, pages_reported, pages_missed."""
        self._recorder.own[name] += more

    def elsewhere(self, pages: int) -> None:
        """So many pages of the host are not the machines'."""
        self._recorder.elsewhere += pages

    # -- refusals ------------------------------------------------------------------------------------------

    def refuse(self, what: str, why: str) -> None:
        """The design cannot do it: no failure, but said with the figures."""
        self._run.refusals.append(Refusal(what, why))

    async def offered(self, call: Awaitable[object]) -> bool:
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

    # -- expectations: what fails is said, and the scenario goes on ---------------------------------------

    def expect(self, holds: bool, problem: str) -> None:
        """`problem` says what was asked for and what was seen instead."""
        self.report.expect(holds, problem)

    def expect_equal(self, seen: object, expected: object, what: str) -> None:
        """`what` names the thing that was looked at."""
        self.report.expect_equal(seen, expected, what)

    async def expect_refused(self, what: str, number: int, why: str, call: Awaitable[object]) -> None:
        """The call fails with that errno, and says `why`."""
        await self.report.expect_refused(what, number, why, call)

    async def expect_dma_fault(self, what: str, call: Awaitable[object]) -> None:
        """The device cannot do it: its work descriptor ends in a page fault."""
        try:
            await call
        except DmaFailed as failed:
            self.report.lines.append(f"{what}: {failed}")
            self.expect("PAGE_FAULT" in str(failed), f"{what}: {failed}, expected a page fault")
        else:
            self.expect(False, f"{what}: the device did it, expected a page fault")

    def say(self, line: str) -> None:
        """A line of the report."""
        self.report.lines.append(line)

    async def finish(self) -> None:
        """What every run ends with: the invariants, while the machines still run, and the figures."""
        if self._first is not None and not self.host.killed:
            if len(self._run.samples) == self._starts:
                await self.step("end")
            fill_table(self.report, self._first, await snapshot(self.host))
        self._run.problems += await self._recorder.problems()
