"""mmio: KVM caches emulated MMIO in the table the device walks, and the device must not find memory there.

In the posted series such an entry has W and the gpa in its address bits, so a unit that walked it would send
DMA to the host page at hpa = gpa (RFC-104).  So the story puts the MMIO where that matters: at the gpa that
equals the hpa of a page of the guest's own, whose bytes then tell.  Later a memslot is added there and both
use it, and deleted again: the entry of the old generation is not believed (RFC-29).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protocol.hw.dsa import Status
from protocol.kvm_run import ExitReason
from protocol.pt import bits
from protocol.pt.walk import Outcome
from qemu_shim.api import PAGE_SIZE, Context, Guest, Param, Scenario
from qemu_shim.scenarios.series.common import FILLED, PATTERN, status_of


async def play(ctx: Context) -> None:
    rounds = ctx.params["rounds"]
    guest = await ctx.boot(records_present=True)
    victim, target = guest.pages(2)
    await guest.write(victim, FILLED)
    await guest.fill(target, pattern=PATTERN)
    mmio = _hpa(await guest.inspect_gpa(victim))
    ctx.say(f"gpa {mmio:#x} is emulated MMIO; a page of guest RAM lies at that hpa")
    async with ctx.counted() as cost:
        for number in range(rounds):
            await _emulated(ctx, guest, mmio, target)
            await _memory(ctx, guest, mmio, target, number)
        await _emulated(ctx, guest, mmio, target)
        ctx.expect_equal(await guest.read(victim), FILLED, "the page at hpa = gpa")
    ctx.expect_equal(cost.mmio_entries, rounds + 1, "MMIO entries made, one a generation")
    ctx.expect_equal(cost.io_faults_refused, 2 * (rounds + 1), "IO page faults refused")
    ctx.figures |= {
        "rounds": rounds,
        "mmio_entries_made": cost.mmio_entries,
        "dma_refused": cost.io_faults_refused,
        "generations": cost.memslot_generations,
    }
    ctx.row("MMIO entries made", f"{cost.mmio_entries} in {rounds + 1} generations of use")
    ctx.row("DMA to MMIO refused", cost.io_faults_refused)


def _hpa(walks: Mapping[str, Any]) -> int:
    """Where the unit finds a page of 4 KiB."""
    outcome, level, entry, *_ = walks["unit"]
    assert (outcome, level) == (Outcome.MAPPED, 1), "an anonymous page of its own"
    return entry & bits.ADDRESS_MASK  # type: ignore[no-any-return]


async def _emulated(ctx: Context, guest: Guest, mmio: int, target: int) -> None:
    """The vCPU's access leaves an entry that its next one finds; to the device there is nothing."""
    async with ctx.counted() as cost:
        for program in ([("w", mmio, b"bell")], [("r", mmio, 4)], [("w", mmio + 8, b"x")]):
            ran = await guest.machine.vcpu.run(program)
            ctx.expect_equal(ran.exit_reason, ExitReason.MMIO, "the vCPU's access")
    ctx.expect_equal(cost.mmio_entries, 1, "MMIO entries for three accesses")
    walks = await guest.inspect_gpa(mmio)
    level, _, entry = walks["path"][-1]
    ctx.expect(level == 1 and entry & bits.ADDRESS_MASK == mmio, f"entry {entry:#x}: the gpa is not cached")
    ctx.expect_equal(Outcome(walks["unit"][0]), Outcome.ABSENT, "what the unit finds")
    before = (await ctx.host.kvmd.stats())["frames"]
    held = await guest.read(target)
    write, read = guest.fill(mmio, pattern=~PATTERN & 0xFF), guest.copy(target, mmio)
    ctx.expect_equal(await status_of(write), Status.PAGE_FAULT_IR, "DMA write to MMIO")
    ctx.expect_equal(await status_of(read), Status.PAGE_FAULT_IR, "DMA read of MMIO")
    ctx.expect_equal(await guest.read(target), held, "the target of the read")
    ctx.expect_equal((await ctx.host.kvmd.stats())["frames"], before, "frames in use")


async def _memory(ctx: Context, guest: Guest, mmio: int, target: int, number: int) -> None:
    """A slot comes to where the MMIO was: RAM for both; and goes again."""
    slot = await guest.add_slot(PAGE_SIZE, mmio)
    pattern = PATTERN + number
    await guest.fill(mmio, pattern=pattern)
    words = pattern.to_bytes(8, "little") * (PAGE_SIZE // 8)
    ctx.expect_equal(await guest.read(mmio), words, "what the vCPU reads in the new slot")
    await guest.write(mmio, b"by the guest")
    await guest.copy(target, mmio)
    ctx.expect_equal(await guest.read(target, 12), b"by the guest", "what the device read in it")
    await guest.remove_slot(slot)


SCENARIO = Scenario(
    name="mmio",
    summary="emulated MMIO cached in the shared table is nothing to the device, until a memslot comes there",
    tags=("KVM: reserve bit 11, MMIO entries", "RFC-104", "RFC-71", "RFC-29"),
    play=play,
    params={"rounds": Param(3, 1, 1000, "times a memslot comes and goes there")},
    designs=("shared",),
)
