"""What the small stories share: where they play, and what they all end with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from errno import ENOMEM
from typing import Any, TypeVar

import trio

from protocol.hw.dsa import Descriptor, Flag, Opcode
from protocol.units import Iova
from qemu_shim.api import PAGE_SIZE, Context, DmaDevice, DmaFailed, Guest, UapiError
from qemu_shim.vmm.process import Process, Uffd
from qemu_shim.vmm.vcpu import RunResult

AT = 0x1_8000_0000  # of the slot the story is about; behind all that a machine has of its own
NEXT = AT + PAGE_SIZE
OVER_TWO = NEXT - 32  # 64 bytes from here lie in two pages
SLOT_BYTES = 2 * PAGE_SIZE
PAGES = 16  # of the machine's own memory: pinned whole, where a design pins
BEFORE, AFTER = b"before..", b"after..."
PATTERN = 0x6B6B_6B6B_6B6B_6B6B
ONE_TABLE = ("managed", "shared")  # KVM's: a device has what the guest has
OWN_TABLE = ("pinned", "mirror", "notifier")  # iommufdd's
MAY_TAKE = ("mirror", "notifier", *ONE_TABLE)  # those that do not pin all memory
UNRECORDED = 1  # an interrupt handle of queue 0's
ASKED = 20  # times, for what may be on its way out still
WAITS_S = tuple(0.001 * 2**doubled for doubled in range(14))  # more than the 5 s a daemon may stand still

Answer = TypeVar("Answer")


async def agree(ctx: Context, guest: Guest, gpa: int, device: DmaDevice | None = None) -> None:
    """CPU and device have one page there, whatever came before."""
    device = device or guest.devices[0]
    await guest.write(gpa, AFTER)
    seen = await device.holds(gpa, len(AFTER), int.from_bytes(AFTER, "little"))
    ctx.expect(seen, "the device does not see what a CPU stored")
    await device.fill(gpa, len(AFTER), PATTERN)
    stored = await guest.read(gpa, len(AFTER))
    ctx.expect_equal(stored, PATTERN.to_bytes(8, "little"), "what a CPU sees behind a device's store")


async def if_it_is_let(call: Awaitable[Any]) -> None:
    """Whether it is depends on who came first."""
    with suppress(UapiError):
        await call


async def run_store(guest: Guest, gpa: int, cpl: int = 3) -> RunResult:
    """The second vCPU stores AFTER, in code of that level; nobody else lets that one run.  UapiError."""
    ran = await guest.machine.vcpus[1].run([("w", gpa, AFTER)], cpl)
    if ran.errno:
        raise UapiError(ran.errno, ran.why)
    return ran


async def serve_once(uffd: Uffd, hva: int, data: bytes) -> None:
    """Who sleeps for the page wakes up: that there is no memory for it now is no reason to let them sleep."""
    while True:
        try:
            return await uffd.copy(hva, data)
        except UapiError as error:
            if error.errno != ENOMEM:
                return None


async def at_last(ask: Callable[[], Awaitable[Answer]]) -> Answer:
    """Whoever had it may be on the way out still, and stand still, or hear late of it: by seconds."""
    for wait_s in WAITS_S:
        with suppress(UapiError):
            return await ask()
        await trio.sleep(wait_s)
    return await ask()


async def holds_at_last(holds: Callable[[], Awaitable[bool]]) -> bool:
    """Whether it does, asked for as long as at_last asks."""
    for wait_s in WAITS_S:
        if await holds():
            return True
        await trio.sleep(wait_s)
    return await holds()


async def check(ctx: Context) -> None:
    """What kvmd and iommufdd find wrong in themselves now; they are asked at the end too."""
    for daemon in (ctx.host.kvmd, ctx.host.iommufdd):
        for problem in await daemon.violations():
            ctx.expect(False, problem)


@asynccontextmanager
async def missing(process: Process, hva: int) -> AsyncIterator[Uffd]:
    """Inside, faults on the page sleep for who reads of them.  A read that is given up goes on in the kernel
    and takes the next event, so each round has a userfaultfd of its own.
    """
    uffd = await process.userfaultfd()
    try:
        await uffd.register(hva, PAGE_SIZE, "missing")
        yield uffd
        await uffd.unregister(hva, PAGE_SIZE)
    finally:
        uffd.close()


async def come_and_go(guest: Guest, uffd: Uffd, gpa: int) -> None:
    """Serves faults on a page, whose memory comes and goes at once; its neighbour, which may be cached, goes
    with it.
    """
    process, hva = guest.machine.process, guest.machine.hva_of(gpa)
    while True:
        await uffd.next_event()
        async with trio.open_nursery() as at_once:
            at_once.start_soon(if_it_is_let, uffd.copy(hva, BEFORE))
            at_once.start_soon(process.madvise_dontneed, hva, SLOT_BYTES)
        await if_it_is_let(uffd.copy(hva, BEFORE))
        await guest.migrate(gpa)


async def try_fill(device: Guest | DmaDevice, gpa: int, size: int = 64) -> None:
    """It stores, of a guest the first, if it is let."""
    with suppress(DmaFailed):
        await device.fill(gpa, size, PATTERN)


async def try_copy(guest: Guest, dst: int, src: int) -> None:
    """The first device copies, if it is let."""
    with suppress(DmaFailed):
        await guest.copy(dst, src)


def post_fill(device: DmaDevice, gpa: int, size: int = 64, flags: Flag = Flag.BOF, handle: int = 0) -> None:
    """A store that nobody waits for, as the device may be taken away beneath it: no record, no interrupt."""
    descriptor = Descriptor(
        opcode=Opcode.MEMFILL, flags=flags, src=PATTERN, dst=Iova(gpa), size=size, int_handle=handle
    )
    device.plugged.portal.movdir64b(0, descriptor.to_bytes())


async def fill_unrecorded(device: DmaDevice, gpa: int, size: int = 64) -> None:
    """A store whose end is an interrupt alone: no CPU looks at a record of it, nor clears one."""
    post_fill(device, gpa, size, Flag.BOF | Flag.RCI, UNRECORDED)
    await device.plugged.portal.wait_interrupt(UNRECORDED)
