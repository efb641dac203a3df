"""mmio: KVM caches emulated MMIO in the table the device walks, and the device must not find memory there.

In the posted series such an entry has W and the gpa in its address bits, so a unit that walked it would send
DMA to the host page at hpa = gpa (RFC-104).  So the story puts the MMIO where that matters: at the gpa that
equals the hpa of a page of the guest's own, whose bytes then tell.  Later a memslot is added there and both
use it, and deleted again: the entry of the old generation is not believed (RFC-29).
"""

from __future__ import annotations

from protocol.hw.dsa import Status
from protocol.kvm_run import ExitReason
from protocol.pt import bits
from protocol.pt.walk import Outcome
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.scenarios.context import Context
from qemu_shim.scenarios.scenario import Param, Scenario
from qemu_shim.scenarios.series.stage import FILLED, PATTERN, Stage, staged
from qemu_shim.vmm.designs import SHARED
from qemu_shim.vmm.machine import MachineConfig

SLOT = 7


async def play(ctx: Context) -> None:
    params, report = ctx.params, ctx.report
    rounds = params["rounds"]
    async with staged(ctx, MachineConfig(ram_bytes=GIB)) as stage:
        guest = stage.guest
        victim, target = guest.memory.allocate(1), guest.memory.allocate(1)
        await guest.memory.write(victim, FILLED)
        report.expect_equal(await stage.fill(target), Status.SUCCESS, "DMA write to RAM")
        mmio = _hpa(await stage.walks(victim))
        report.lines.append(f"gpa {mmio:#x} is emulated MMIO; a page of guest RAM lies at that hpa")
        async with stage.counted() as cost:
            for number in range(rounds):
                await _emulated(stage, mmio, target)
                await _memory(stage, mmio, target, number)
            await _emulated(stage, mmio, target)
            report.expect_equal(await guest.memory.read(victim, PAGE_SIZE), FILLED, "the page at hpa = gpa")
    report.expect_equal(cost.mmio_entries, rounds + 1, "MMIO entries made, one a generation")
    report.expect_equal(cost.io_faults_refused, 2 * (rounds + 1), "IO page faults refused")
    report.figures |= {
        "rounds": rounds,
        "mmio_entries_made": cost.mmio_entries,
        "dma_refused": cost.io_faults_refused,
        "generations": cost.memslot_generations,
    }
    report.rows += [
        ("MMIO entries made", f"{cost.mmio_entries} in {rounds + 1} generations of use"),
        ("DMA to MMIO refused", f"{cost.io_faults_refused}"),
    ]


def _hpa(walks: dict[str, list[int]]) -> int:
    """Where the unit finds a page of 4 KiB."""
    outcome, level, entry, *_ = walks["unit"]
    assert (outcome, level) == (Outcome.MAPPED, 1), "an anonymous page of its own"
    return entry & bits.ADDRESS_MASK


async def _emulated(stage: Stage, mmio: int, target: int) -> None:
    """The vCPU's access leaves an entry that its next one finds; to the device there is nothing."""
    report, run = stage.report, stage.guest.vcpu.run
    async with stage.counted() as cost:
        for program in ([("w", mmio, b"bell")], [("r", mmio, 4)], [("w", mmio + 8, b"x")]):
            ran = await run(program)
            report.expect_equal(ran.exit_reason, ExitReason.MMIO, "the vCPU's access")
    report.expect_equal(cost.mmio_entries, 1, "MMIO entries for three accesses")
    walks = await stage.walks(mmio)
    level, _, entry = walks["path"][-1]
    report.expect(
        level == 1 and entry & bits.ADDRESS_MASK == mmio, f"entry {entry:#x}: the gpa is not cached"
    )
    report.expect_equal(Outcome(walks["unit"][0]), Outcome.ABSENT, "what the unit finds")
    before = (await stage.host.kvmd.stats())["frames"]
    held = await stage.guest.memory.read(target, PAGE_SIZE)
    report.expect_equal(await stage.fill(mmio, ~PATTERN & 0xFF), Status.PAGE_FAULT_IR, "DMA write to MMIO")
    report.expect_equal(await stage.copy(target, mmio), Status.PAGE_FAULT_IR, "DMA read of MMIO")
    report.expect_equal(await stage.guest.memory.read(target, PAGE_SIZE), held, "the target of the read")
    report.expect_equal((await stage.host.kvmd.stats())["frames"], before, "frames in use")


async def _memory(stage: Stage, mmio: int, target: int, number: int) -> None:
    """A slot comes to where the MMIO was: RAM for both; and goes again."""
    report, guest = stage.report, stage.guest
    slot = await guest.add_slot(SLOT, mmio, PAGE_SIZE)
    pattern = PATTERN + number
    report.expect_equal(await stage.fill(mmio, pattern), Status.SUCCESS, "DMA write to the new slot")
    words = pattern.to_bytes(8, "little") * (PAGE_SIZE // 8)
    report.expect_equal(await guest.memory.read(mmio, PAGE_SIZE), words, "what the vCPU reads in it")
    await guest.memory.write(mmio, b"by the guest")
    report.expect_equal(await stage.copy(target, mmio), Status.SUCCESS, "DMA read of the new slot")
    report.expect_equal(await guest.memory.read(target, 12), b"by the guest", "what the device read in it")
    await guest.remove_slot(slot)


SCENARIO = Scenario(
    name="mmio",
    summary="emulated MMIO cached in the shared table is nothing to the device, until a memslot comes there",
    tags=("KVM: reserve bit 11, MMIO entries", "RFC-104", "RFC-71", "RFC-29"),
    play=play,
    params={"rounds": Param(3, 1, 1000, "times a memslot comes and goes there")},
    designs=(SHARED.name,),
)
