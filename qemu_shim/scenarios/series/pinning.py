"""partial-iopf and pinned: devices that fault only in part, or not at all, on a shared table.

Play out the RFC's note about devices which partially support IOPF [RFC 00/42].  `partial-iopf`: the device
asks for pages of data and loses a completion record whose page is absent; the driver of a VMM that traps
where the guest puts its records pins that one page, and the host may do what it likes with the rest.
`pinned`: the device asks for nothing, so every slot is pinned, those that are plugged later too.
Before each transfer the host does one thing to all of it: migrate, swap, drop, hint, age, log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from protocol.hw.dsa import CompletionRecord
from protocol.uapi import names
from protocol.units import PAGE_SHIFT
from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest, Param, Scenario
from qemu_shim.guest.dmatest import Result
from qemu_shim.scenarios.series.dmatest import TEST_PARAMS, dmatest_params, run_threads, tell

NOTE = "RFC 00/42: About device which partially supports IOPF"
HOTPLUGGED_GPA = 0x1_8000_0000


@dataclass(slots=True)
class _Churned:
    """A channel before each of whose transfers the host does something to the memory it is about."""

    guest: Guest
    bitmap: int  # of our process, for the dirty log
    done: Counter[str] = field(default_factory=Counter)
    logged: int = 0  # how often the log had the record's page
    turn: int = 0

    @property
    def records(self) -> int:
        return self.guest.devices[0].records

    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord:
        await self._churn([dst, src], size)
        return await self.guest.queue.memmove(dst, src, size)

    async def fill(self, dst: int, pattern: int, size: int) -> CompletionRecord:
        await self._churn([dst], size)
        return await self.guest.queue.fill(dst, pattern, size)

    async def _churn(self, buffers: list[int], size: int) -> None:
        name, act = list(_ACTS.items())[self.turn % len(_ACTS)]
        self.turn += 1
        pages = {gpa >> PAGE_SHIFT for at in buffers for gpa in range(at, at + size, PAGE_SIZE)}
        for page in sorted(pages | {(at + size - 1) >> PAGE_SHIFT for at in buffers}):
            if name != "drop":  # what is dropped is lost: no buffer
                await act(self, page << PAGE_SHIFT)
        await act(self, self.records)
        self.done[name] += 1

    async def log(self, gpa: int) -> None:
        """GET what was written; only the page of records is looked for."""
        machine = self.guest.machine
        ram = machine.slots[0]
        await machine.vm.get_dirty_log(ram.slot, self.bitmap)
        page = (self.records - ram.gpa) >> PAGE_SHIFT
        (byte,) = await machine.process.read(self.bitmap + page // 8, 1)
        self.logged += gpa == self.records and byte >> page % 8 & 1

    async def drop(self, gpa: int) -> None:
        """As any process may, whatever a VMM would refuse."""
        await self.guest.machine.process.madvise_dontneed(self.guest.machine.hva_of(gpa), PAGE_SIZE)


_ACTS: dict[str, Callable[[_Churned, int], Awaitable[object]]] = {
    "migrate": lambda churned, gpa: churned.guest.migrate(gpa),
    "swap": lambda churned, gpa: churned.guest.swap_out(gpa),
    "drop": _Churned.drop,
    "hint": lambda churned, gpa: churned.guest.numa_hint(gpa),
    "age": lambda churned, gpa: churned.guest.age(gpa),
    "log": _Churned.log,
}


async def _leg(guest: Guest, params: Mapping[str, int]) -> tuple[list[Result], _Churned]:
    """dmatest with the host busy and the dirty log on."""
    vm, ram = guest.machine.vm, guest.machine.slots[0]
    churned = _Churned(guest, await guest.machine.process.mmap(max(ram.size >> PAGE_SHIFT + 3, PAGE_SIZE)))
    flags = names.KVM_MEM_LOG_DIRTY_PAGES
    await vm.set_user_memory_region(ram.slot, ram.gpa, ram.size, ram.hva, flags)
    results = await run_threads(guest, [churned], dmatest_params(params))
    await vm.set_user_memory_region(ram.slot, ram.gpa, ram.size, ram.hva)
    return results, churned


async def _pinned_pages(guest: Guest) -> int:
    return (await guest.inspect())["stats"]["pinned_pages"]  # type: ignore[no-any-return]


async def play_partial(ctx: Context) -> None:
    size = ctx.params["ram_mib"] * MIB
    guest = await ctx.boot(ram_bytes=size)
    (device,) = guest.devices
    async with ctx.counted() as without:
        unpinned, _ = await _leg(guest, ctx.params)
    async with ctx.counted() as cost:
        await device.plugged.vfio.pin(device.records, PAGE_SIZE)
        pinned = await _pinned_pages(guest)
        results, churned = await _leg(guest, ctx.params)
    await device.plugged.vfio.unpin(device.records, PAGE_SIZE)
    _tell_churn(ctx, results, churned)
    lost = without.records_lost, cost.records_lost
    failed = sum(result.failures for result in unpinned)
    ctx.say(f"without a pin {lost[0]} completion records are lost, with one {lost[1]}")
    ctx.row("records lost without / with the pin", f"{lost[0]} / {lost[1]}")
    ctx.row("pages pinned of guest pages", f"{pinned} of {size >> PAGE_SHIFT}")
    ctx.figures |= {
        "records_lost_unpinned": lost[0],
        "records_lost_pinned": lost[1],
        "pinned_pages": pinned,
    }
    ctx.expect(lost[0] > 0 and failed > 0, "no record was lost without the pin: the device asks for its page")
    ctx.expect_equal(lost[1], 0, "completion records lost though their page is pinned")
    ctx.expect_equal(pinned, 1, "pages pinned for one page of records")
    ctx.expect(cost.io_faults > 0, "the device's data was never absent")


async def play_pinned(ctx: Context) -> None:
    size = ctx.params["ram_mib"] * MIB
    guest = await ctx.boot(ram_bytes=size, pinned=True)
    pinned = [await _pinned_pages(guest)]
    async with ctx.counted() as cost:
        results, churned = await _leg(guest, ctx.params)
        plugged = await guest.add_slot(MIB, HOTPLUGGED_GPA)
        pinned.append(await _pinned_pages(guest))
        await guest.fill(plugged.gpa)
        await guest.remove_slot(plugged)
        pinned.append(await _pinned_pages(guest))
    await guest.unplug(guest.devices[0])
    pinned.append(await _pinned_pages(guest))
    _tell_churn(ctx, results, churned)
    ctx.say(f"pinned: {pinned[0]} pages, {pinned[1]} with a slot more, {pinned[3]} when detached")
    ctx.row("pages pinned / mapped on demand", f"{pinned[0]} / {cost.pages_mapped_io}")
    ctx.row("records lost", cost.records_lost)
    ctx.figures |= {"pinned_pages": pinned[0], "records_lost_pinned": cost.records_lost}
    pages = size >> PAGE_SHIFT
    ctx.expect_equal(
        pinned, [pages, pages + (MIB >> PAGE_SHIFT), pages, 0], "pages pinned, one after the other"
    )
    ctx.expect_equal(cost.io_faults, 0, "page requests of a device that has none")


def _tell_churn(ctx: Context, results: list[Result], churned: _Churned) -> None:
    tell(ctx, results)
    ctx.figures["host_actions"] = dict(churned.done)
    ctx.row("host actions", ", ".join(f"{n} {name}" for name, n in churned.done.items()))
    ctx.expect_equal(churned.logged, churned.done["log"], "logs in which the pinned page was dirty")


_PARAMS = {
    **TEST_PARAMS,
    "iterations": Param(24, len(_ACTS), 1_000_000, "tests of each thread, and so host actions"),
    "threads_per_chan": Param(1, 1, 1, "threads on each channel"),
    "verbose": Param(0, 0, 1, "1: lines about tests that passed"),
    "ram_mib": Param(32, 32, 1024, "MiB of guest memory"),
}
PARTIAL_IOPF = Scenario(
    name="partial-iopf",
    summary="a device that asks for data but not for its completion records; pinning their page is enough",
    tags=(NOTE,),
    play=play_partial,
    params=_PARAMS,
    options={
        "device_sim": ("--fault-capability", "partial"),
        "iommufdd": ("--fault-policy", "trust"),  # the driver that pins on demand vouches for it
    },
    designs=("shared",),
)
PINNED = Scenario(
    name="pinned",
    summary="a device that cannot ask for pages at all, on slots that are pinned as long as it is attached",
    tags=(NOTE,),
    play=play_pinned,
    params=_PARAMS,
    options={"device_sim": ("--fault-capability", "none")},
    designs=("shared",),
)
