"""What a scenario is given: machines of the design, operations of guest and device, steps, and a report.

`step` waits until nothing is under way any more and takes a sample, so that what a step cost is in it and in
no other, and the same each time.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count, islice
from random import Random
from typing import Any, TypedDict, TypeVar, Unpack

from protocol.errors import UapiError
from protocol.hw.dsa import PAGE_REFUSED
from protocol.units import KIB, PAGE_SIZE, Gpa
from qemu_shim.scenarios.counters import Counters, grown
from qemu_shim.scenarios.guest import DmaFailed, Guest, with_devices
from qemu_shim.scenarios.measure import Report, Snapshot, difference, fill_table, snapshot
from qemu_shim.scenarios.recorder import Recorder, until
from qemu_shim.scenarios.run import Refusal, Run, Sample
from qemu_shim.vmm.designs import Design, Refused
from qemu_shim.vmm.machine import FIRST_FREE_GPA, Host, MachineConfig, bare_machine

T = TypeVar("T")
KERNEL_BYTES = 256 * KIB  # the guest's
DRIVER_PAGES = 16  # and its driver's, at most


class Wishes(TypedDict, total=False):
    """What a machine is to be like: bytes of RAM (1 GiB), how many devices and vCPUs (1 of each), bytes of
    the host pages behind its RAM (4096), bytes of the blocks that may be converted to private (0: none),
    bytes of each vCPU's dirty ring (0: none), where its kernel's own memory ends (16 MiB), whether all of it
    is pinned for as long as a device is attached (no), whether the guest's driver has touched the pages of
    completion records (no: a page request of each device is for its own), bits of the guest's physical
    addresses (46).
    """

    ram_bytes: int
    devices: int
    vcpus: int
    page_size: int
    private_block: int
    maxphyaddr: int
    dirty_ring_bytes: int
    free_from: int
    pinned: bool
    records_present: bool


class Context:
    """`chance` is the only source of chance; `params` are the scenario's, with defaults; `figures` are what
    `run --json` has of it, by name, beside those of every run; `host` are the daemons.
    """

    host: Host
    design: Design
    params: Mapping[str, int]
    chance: Random
    figures: dict[str, Any]

    def __init__(
        self,
        host: Host,
        design: Design,
        run: Run,
        stack: AsyncExitStack,
        report: Report,
        *,
        alone: bool = True,
        counted: bool = True,
    ) -> None:
        assert report.problems is run.problems
        self.host = host
        self.design = design
        self.params = run.params
        self.chance = Random(run.seed)
        self.figures = report.figures
        self._report = report
        self._run = run
        self._stack = stack
        self._recorder = Recorder(host, alone=alone)
        self._is_counted = counted
        self._first: Snapshot | None = None  # when the first machines had come up
        self._starts = 0
        self._lives: dict[Guest, tuple[AsyncExitStack, MachineConfig]] = {}

    # -- machines ------------------------------------------------------------------------------------------

    async def boot(self, **wished: Unpack[Wishes]) -> Guest:
        """A machine of the design with devices of its own, and the sample `start`.  Refused."""
        (guest,) = await self.boot_all(wished)
        return guest

    async def boot_for(self, pages: int) -> Guest:
        """A machine of which all is in use but for the guest's kernel: `pages` pages for the scenario."""
        return await self.boot(**self.sized(pages))

    def sized(self, pages: int) -> Wishes:
        """RAM for a kernel, which has KERNEL_BYTES, a driver, which has DRIVER_PAGES, and `pages` pages."""
        return Wishes(
            ram_bytes=KERNEL_BYTES + (pages + DRIVER_PAGES) * PAGE_SIZE,
            free_from=KERNEL_BYTES,
        )

    async def boot_all(self, *wishes: Wishes) -> list[Guest]:
        """Machines side by side, each with devices of its own, and the sample `start` of all."""
        await self._begin()
        guests = []
        for wished in wishes:
            guests.append(await self._without_device(**wished))
            await self._with_devices(guests[-1])
        await self._started()
        return guests

    async def boot_without_device(self, **wished: Unpack[Wishes]) -> Guest:
        """A machine of the design whose devices come later, and the sample `start`."""
        await self._begin()
        guest = await self._without_device(**wished)
        await self._started()
        return guest

    async def attach(self, guest: Guest) -> None:
        """Its devices have come, as the step `attached`.  Refused."""
        await self._with_devices(guest)
        await self.step("attached")

    async def shut_down(self, guest: Guest) -> None:
        """The machine ends, and its devices are free for the next.  What it counted stays counted, its end
        is not.
        """
        assert self._first is not None
        self._run.problems += await self._recorder.problems()
        life, _ = self._lives[guest]
        self._first.raw.subtract(await self._recorder.without(guest.machine, life.aclose))
        del self._lives[guest]

    async def kill(self, daemon: str) -> None:
        """kvmd, iommufdd or device_sim dies as of `kill -9`.  Nothing is counted any more, and of the
        invariants those are checked whose daemons live.  LookupError: it is not ours to kill.
        """
        await self.host.kill(daemon)

    async def _begin(self) -> None:
        if self._is_counted:
            await self._recorder.begin()

    async def _started(self) -> None:
        """The machines that came first are the sample `start`, the next `start 2`."""
        if not self._is_counted:
            return
        self._starts += 1
        await self.step("start" if self._starts == 1 else f"start {self._starts}")
        if self._first is None:
            self._first = self._recorder.last

    async def _without_device(
        self,
        *,
        devices: int = 1,
        free_from: int = FIRST_FREE_GPA,
        records_present: bool = False,
        **wished: Any,
    ) -> Guest:
        used = {number for _, config in self._lives.values() for number in config.devices}
        numbers = tuple(islice((number for number in count() if number not in used), devices))
        config = MachineConfig(design=self.design, devices=numbers, free_from=Gpa(free_from), **wished)
        life = await self._stack.enter_async_context(AsyncExitStack())
        bare = await life.enter_async_context(bare_machine(self.host, config))
        self._recorder.cpus += bare.cpus
        guest = Guest(bare, records_present=records_present)
        self._lives[guest] = life, config
        return guest

    async def _with_devices(self, guest: Guest) -> None:
        life, _ = self._lives[guest]
        self._recorder.machines.append(await life.enter_async_context(with_devices(guest)))

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
    async def counted(self, *, at_rest: bool = True) -> AsyncIterator[Counters]:
        """What the counters of all daemons grow by, from rest to rest; known when it is over.  Not `at_rest`:
        from one moment to another, whatever goes on.
        """
        look = self._recorder.quiet if at_rest else self._recorder.look
        before, cost = await look(), Counters()
        yield cost
        cost.take(Counters.of(grown(await look(), before)))

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

    async def until(self, what: str, holds: Callable[[], Awaitable[bool]]) -> None:
        """Ask until it holds.  If it does not, after so long, `what` is a problem, and the run's end."""
        await until(what, holds)

    # -- expectations: what fails is said, and the scenario goes on ---------------------------------------

    def expect(self, holds: bool, problem: str) -> None:
        """`problem` says what was asked for and what was seen instead."""
        if not holds:
            self._run.problems.append(problem)

    def expect_equal(self, seen: object, expected: object, what: str) -> None:
        """`what` names the thing that was looked at."""
        self.expect(seen == expected, f"{what}: {difference(seen, expected)}")

    async def expect_refused(self, what: str, number: int, why: str, call: Awaitable[object]) -> None:
        """The call fails with that errno, and says `why`; what it said becomes a line."""
        expected = f"expected {errno.errorcode[number]}" + (f" for {why!r}" if why else "")
        try:
            await call
        except UapiError as error:
            self.say(f"{what}: {error}")
            self.expect((error.errno, why in error.why) == (number, True), f"{what}: {error}, {expected}")
        else:
            self.expect(False, f"{what}: was not refused, {expected}")

    async def expect_dma_fault(self, what: str, call: Awaitable[object]) -> None:
        """The device cannot do it: its work descriptor ends in a page fault, or its translation failed."""
        try:
            await call
        except DmaFailed as failed:
            status = failed.record.status
            fault = status in PAGE_REFUSED or "PAGE_FAULT" in status.name
            self.expect(fault, f"{what}: {failed}, expected a page fault")
        else:
            self.expect(False, f"{what}: the device did it, expected a page fault")

    # -- what people are shown -----------------------------------------------------------------------------

    def say(self, line: str) -> None:
        """A line of the report."""
        self._report.lines.append(line)

    def row(self, name: str, value: object) -> None:
        """A row of the table that ends the report."""
        self._report.rows.append((name, str(value)))

    async def finish(self) -> None:
        """What every run ends with: the invariants, while the machines still run, and the figures."""
        if self._first is not None and not self.host.killed:
            if len(self._run.samples) == self._starts:
                await self.step("end")
                last = self._recorder.last
            else:
                last = await snapshot(self.host)
            own = dict(self.figures)
            fill_table(self._report, self._first, last)
            self.figures |= own
            self.expect_equal(last.since(self._first).stale_accesses, 0, "I6: stale accesses")
        self._run.problems += await self._recorder.problems()
