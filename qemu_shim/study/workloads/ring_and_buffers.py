"""ring-and-buffers: which of a driver's pages raise IO page faults: descriptors, records or buffers.

The guest's driver writes descriptors into its ring and data into buffers, and posts others for receiving:
some that it has used before, some that nobody has touched since they were allocated.  Completion records lie
where only the device writes.  The device is led to one class of pages after the other, a step each, so that a
step's IO page faults are those of its class; then the ring is played again, and nothing faults.

Descriptors run one after the other (each is fenced): of two whose records share a page both would ask for it,
or only one, as the engines happen to run.  Counts grow with `work_descriptors`: a buffer page to send and one
to receive for each, a page of records for 128 and one of the ring for 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from protocol.hw.dsa import (
    COMPLETION_SIZE,
    NEVER_BLOCK,
    NO_FLAGS,
    WORK_DESCRIPTOR_SIZE,
    CompletionRecord,
    Descriptor,
    Flag,
    Opcode,
    Status,
)
from protocol.units import Iova, align_up
from qemu_shim.api import PAGE_SIZE, Context, DmaFailed, Guest, Param, Scenario
from qemu_shim.study.workloads.expected_memory import ExpectedMemory

BATCH = 32  # the driver's limit
RECORDED = Flag.CRAV | Flag.RCR


@dataclass(slots=True)
class _Ring:
    """The driver's pages by class; `received`: what each receive buffer was sent last, by its buffer."""

    guest: Guest
    contents: ExpectedMemory
    descriptors: int
    ring: list[int]
    completions: list[int]
    transmit: list[int]
    recycled: list[int]
    fresh: list[int]

    async def play(self, children: Sequence[Descriptor], *, recorded: bool) -> None:
        """The driver writes the descriptors into the ring, the device fetches and runs them."""
        flags = RECORDED if recorded else NO_FLAGS
        raw = b"".join(
            replace(
                child,
                flags=flags
                | (NO_FLAGS if n % BATCH == 0 else Flag.FENCE)
                | (NO_FLAGS if child.opcode in NEVER_BLOCK else Flag.BOF),
                completion_addr=Iova(self._record(n) if recorded else 0),
            ).to_bytes()
            for n, child in enumerate(children)
        )
        await self.guest.write(self.ring[0], raw)
        for first in range(0, len(children), BATCH):
            at, count = self.ring[0] + first * WORK_DESCRIPTOR_SIZE, min(BATCH, len(children) - first)
            record = await self.guest.queue.run(Opcode.BATCH, src=at, size=count)
            if record.status is not Status.SUCCESS:
                raise DmaFailed(f"batch {first // BATCH}", record)

    async def check(self, ctx: Context, count: int) -> None:
        """The driver reads the records, and clears them."""
        raw = await self.guest.read(self.completions[0], count * COMPLETION_SIZE)
        for at in range(0, len(raw), COMPLETION_SIZE):
            record = CompletionRecord.from_bytes(raw[at : at + COMPLETION_SIZE])
            good = record.status is Status.SUCCESS and not record.result
            ctx.expect(
                good, f"work descriptor {at // COMPLETION_SIZE}: {record.status.name}, result {record.result}"
            )
        await self.guest.write(self.completions[0], bytes(len(raw)))

    def _record(self, number: int) -> int:
        return self.completions[0] + number * COMPLETION_SIZE

    def sends(self) -> list[Descriptor]:
        """Each buffer is compared with what the driver wrote there."""
        words = self.contents.words
        return [
            Descriptor(opcode=Opcode.COMPVAL, src=gpa, dst=Iova(words[gpa]), size=PAGE_SIZE)
            for gpa in self.transmit
        ]

    def receives(self, buffers: Sequence[int]) -> list[Descriptor]:
        """Each buffer is sent what a transmit buffer has."""
        sources = self.transmit[: len(buffers)]
        for source, buffer in zip(sources, buffers, strict=True):
            self.contents.words[buffer] = self.contents.words[source]
        return [
            Descriptor(opcode=Opcode.MEMMOVE, src=source, dst=Iova(buffer), size=PAGE_SIZE)
            for source, buffer in zip(sources, buffers, strict=True)
        ]


def _allocate(ctx: Context, guest: Guest) -> _Ring:
    count = ctx.params["work_descriptors"]
    fresh = count * ctx.params["fresh"] // 100
    return _Ring(
        guest,
        ExpectedMemory(ctx, guest),
        count,
        ring=guest.pages(align_up(count * WORK_DESCRIPTOR_SIZE, PAGE_SIZE) // PAGE_SIZE),
        completions=guest.pages(align_up(count * COMPLETION_SIZE, PAGE_SIZE) // PAGE_SIZE),
        transmit=guest.pages(count),
        recycled=guest.pages(count - fresh),
        fresh=guest.pages(fresh),
    )


async def play(ctx: Context) -> None:
    ring = _allocate(ctx, await ctx.boot_for(3 * ctx.params["work_descriptors"]))
    guest = ring.guest
    nothing = [Descriptor(opcode=Opcode.NOOP)] * ring.descriptors
    await guest.touch(ring.ring)
    await ring.contents.cpu_writes(ring.transmit + ring.recycled)
    await ctx.step("driver fills ring and buffers")
    await guest.queue.run(Opcode.NOOP)
    await ctx.step("first dma")
    await ring.play(nothing, recorded=False)
    await ctx.step("work descriptors")
    await ring.play(nothing, recorded=True)
    await ctx.step("completion records")
    await ring.check(ctx, ring.descriptors)
    await ctx.step("driver reads completion records")
    await _buffers(ctx, ring, "")
    for number in range(1, ctx.params["rounds"] + 1):
        await ring.contents.cpu_writes(ring.transmit)
        await _buffers(ctx, ring, f", round {number}")


async def _buffers(ctx: Context, ring: _Ring, suffix: str) -> None:
    for name, children in (
        ("transmit buffers", ring.sends()),
        ("recycled receive buffers", ring.receives(ring.recycled)),
        ("fresh receive buffers", ring.receives(ring.fresh)),
    ):
        await ring.play(children, recorded=True)
        await ring.check(ctx, len(children))
        await ctx.step(name + suffix)
    await ring.contents.cpu_reads(ring.recycled + ring.fresh)
    await ctx.step("driver reads buffers" + suffix)


WORKLOAD = Scenario(
    name="ring-and-buffers",
    summary="a driver's ring: IO page faults of descriptors, completion records and buffers, apart",
    play=play,
    params={
        "work_descriptors": Param(
            256, 8, 1 << 16, "descriptors of the ring; each sends a page and receives one"
        ),
        "fresh": Param(50, 1, 99, "per cent of the receive buffers that nobody has touched"),
        "rounds": Param(1, 0, 1000, "times all of it is done again"),
    },
)
