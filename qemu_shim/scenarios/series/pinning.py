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
from protocol.units import MIB, PAGE_SHIFT, PAGE_SIZE
from qemu_shim.guest.dmatest import Result
from qemu_shim.guest.idxd import IdxdWorkQueue
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.measure import Report, check_system, fill_table, snapshot
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.scenarios.series.dmatest import TEST_PARAMS, dmatest_params, run_threads, tell
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import Machine, MachineConfig, machine

NOTE = "RFC 00/42: About device which partially supports IOPF"
HOTPLUGGED, HOTPLUGGED_GPA = 7, 0x1_8000_0000


@dataclass(slots=True)
class _Churned:
    """A channel before each of whose transfers the host does something to the memory it is about."""

    guest: Machine
    queue: IdxdWorkQueue
    bitmap: int  # of our process, for the dirty log
    done: Counter[str] = field(default_factory=Counter)
    logged: int = 0  # how often the log had the record's page
    turn: int = 0

    async def memmove(self, dst: int, src: int, size: int) -> CompletionRecord:
        await self._churn([dst, src], size)
        return await self.queue.memmove(dst, src, size)

    async def fill(self, dst: int, pattern: int, size: int) -> CompletionRecord:
        await self._churn([dst], size)
        return await self.queue.fill(dst, pattern, size)

    async def _churn(self, buffers: list[int], size: int) -> None:
        name, act = list(_ACTS.items())[self.turn % len(_ACTS)]
        self.turn += 1
        pages = {gpa >> PAGE_SHIFT for at in buffers for gpa in range(at, at + size, PAGE_SIZE)}
        for page in sorted(pages | {(at + size - 1) >> PAGE_SHIFT for at in buffers}):
            if name != "drop":  # what is dropped is lost: no buffer
                await act(self, self.guest.hva_of(page << PAGE_SHIFT))
        await act(self, self.guest.hva_of(self.queue.record_page))
        self.done[name] += 1

    async def log(self, hva: int) -> None:
        """GET what was written; only the page of records is looked for."""
        ram = self.guest.slots[0]
        await self.guest.vm.get_dirty_log(ram.slot, self.bitmap)
        page = (self.queue.record_page - ram.gpa) >> PAGE_SHIFT
        (byte,) = await self.guest.process.read(self.bitmap + page // 8, 1)
        self.logged += hva == self.guest.hva_of(self.queue.record_page) and byte >> page % 8 & 1


def _host(action: str) -> Callable[[_Churned, int], Awaitable[object]]:
    return lambda churned, hva: churned.guest.process.host_action(action, hva, PAGE_SIZE)


_ACTS: dict[str, Callable[[_Churned, int], Awaitable[object]]] = {
    "migrate": _host("migrate"),
    "swap": _host("swap_out"),
    "drop": lambda churned, hva: churned.guest.process.madvise_dontneed(hva, PAGE_SIZE),
    "hint": _host("numa_hint"),
    "age": _host("age"),
    "log": _Churned.log,
}


async def _leg(
    guest: Machine, queue: IdxdWorkQueue, params: Mapping[str, int]
) -> tuple[list[Result], _Churned]:
    """dmatest with the host busy and the dirty log on."""
    ram = guest.slots[0]
    bitmap = await guest.process.mmap(max(ram.size >> PAGE_SHIFT + 3, PAGE_SIZE))
    churned = _Churned(guest, queue, bitmap)
    await queue.enable()
    flags = names.KVM_MEM_LOG_DIRTY_PAGES
    await guest.vm.set_user_memory_region(ram.slot, ram.gpa, ram.size, ram.hva, flags)
    results = await run_threads(guest, [churned], dmatest_params(params))
    await guest.vm.set_user_memory_region(ram.slot, ram.gpa, ram.size, ram.hva)
    await queue.disable()
    return results, churned


async def play_partial(ctx: Context) -> None:
    host, params, report = ctx.host, ctx.params, ctx.report
    async with machine(host, MachineConfig(ram_bytes=params["ram_mib"] * MIB)) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        start = await snapshot(host)
        unpinned, _ = await _leg(guest, queue, params)
        before = await snapshot(host)
        await guest.device.pin(queue.record_page, PAGE_SIZE)
        pinned = (await snapshot(host)).raw["vm.pinned_pages"]
        results, churned = await _leg(guest, queue, params)
        after = await snapshot(host)
        await check_system(host, report)
        await guest.device.unpin(queue.record_page, PAGE_SIZE)
    _tell_churn(report, results, churned)
    lost = before.since(start).records_lost, after.since(before).records_lost
    failed = sum(result.failures for result in unpinned)
    report.lines.append(f"without a pin {lost[0]} completion records are lost, with one {lost[1]}")
    report.rows += [
        ("records lost without / with the pin", f"{lost[0]} / {lost[1]}"),
        ("pages pinned of guest pages", f"{pinned} of {params['ram_mib'] * MIB >> PAGE_SHIFT}"),
    ]
    fill_table(report, before, after)
    report.figures |= {
        "records_lost_unpinned": lost[0],
        "records_lost_pinned": lost[1],
        "pinned_pages": pinned,
    }
    report.expect(
        lost[0] > 0 and failed > 0, "no record was lost without the pin: the device asks for its page"
    )
    report.expect(lost[1] == 0, f"{lost[1]} completion records were lost though their page is pinned")
    report.expect(pinned == 1, f"{pinned} pages pinned for one page of records")
    report.expect(report.figures["io_faults"] > 0, "the device's data was never absent")


async def play_pinned(ctx: Context) -> None:
    host, params, report = ctx.host, ctx.params, ctx.report
    size = params["ram_mib"] * MIB
    async with machine(host, MachineConfig(ram_bytes=size, pinned=True)) as guest:
        queue = IdxdWorkQueue(guest.portal, guest.memory, block_on_fault=True)
        before = await snapshot(host)
        results, churned = await _leg(guest, queue, params)
        plugged = await guest.add_slot(HOTPLUGGED, HOTPLUGGED_GPA, MIB)
        with_more = await snapshot(host)
        await queue.enable()
        filled = await queue.fill(plugged.gpa, 0, PAGE_SIZE)
        await queue.disable()
        await guest.vm.set_user_memory_region(HOTPLUGGED, 0, 0, 0)
        after = await snapshot(host)
        await check_system(host, report)
        await guest.device.detach()
        detached = await snapshot(host)
    _tell_churn(report, results, churned)
    pinned = [seen.raw["vm.pinned_pages"] for seen in (before, with_more, after, detached)]
    report.lines.append(f"pinned: {pinned[0]} pages, {pinned[1]} with a slot more, {pinned[3]} when detached")
    report.rows += [
        ("pages pinned / mapped on demand", f"{pinned[0]} / {after.since(before).pages_mapped_io}"),
        ("records lost", f"{after.since(before).records_lost}"),
    ]
    fill_table(report, before, after)
    report.figures |= {"pinned_pages": pinned[0], "records_lost_pinned": after.since(before).records_lost}
    pages = size >> PAGE_SHIFT
    report.expect(
        pinned == [pages, pages + (MIB >> PAGE_SHIFT), pages, 0],
        f"pages pinned one after the other: {pinned}",
    )
    report.expect(filled.status.name == "SUCCESS", f"a page plugged later: {filled.status.name}")
    report.expect(report.figures["io_faults"] == 0, "a device without page requests asked for a page")


def _tell_churn(report: Report, results: list[Result], churned: _Churned) -> None:
    tell(report, results)
    report.figures["host_actions"] = dict(churned.done)
    report.rows.append(("host actions", ", ".join(f"{n} {name}" for name, n in churned.done.items())))
    logs = churned.done["log"]
    report.expect(churned.logged == logs, f"the pinned page was dirty in {churned.logged} of {logs} logs")


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
    designs=(SHARED.name,),
)
PINNED = Scenario(
    name="pinned",
    summary="a device that cannot ask for pages at all, on slots that are pinned as long as it is attached",
    tags=(NOTE,),
    play=play_pinned,
    params=_PARAMS,
    options={"device_sim": ("--fault-capability", "none")},
    designs=(SHARED.name,),
)
