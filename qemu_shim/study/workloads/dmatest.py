"""dmatest: the DMA test as a workload: the CPU fills two buffers, the device copies, the CPU compares."""

from __future__ import annotations

from qemu_shim.api import KIB, MIB, PAGE_SIZE, Context, Param, Scenario


async def play(ctx: Context) -> None:
    size, transfer = ctx.params["buf_kib"] * KIB, ctx.params["transfer_kib"] * KIB
    guest = await ctx.boot(ram_bytes=(32 + 2 * ctx.params["buf_kib"] // 1024) * MIB)
    src, dst = (guest.pages(size // PAGE_SIZE)[0] for _ in range(2))
    data = ctx.chance.randbytes(size)
    await guest.write(src, data)
    await guest.write(dst, bytes(size))
    await ctx.step("cpu fills the buffers")
    await guest.copy(dst, src, min(transfer, size))
    await ctx.step("first dma")
    for at in range(transfer, size, transfer):
        await guest.copy(dst + at, src + at, min(transfer, size - at))
    await ctx.step("dma of the rest")
    ctx.expect(await guest.read(dst, size) == data, "the copy differs")
    await ctx.step("cpu compares")


WORKLOAD = Scenario(
    name="dmatest",
    summary="the CPU fills two buffers, the device copies one to the other, the CPU compares",
    play=play,
    params={
        "buf_kib": Param(1024, 4, 1 << 17, "KiB of each buffer"),
        "transfer_kib": Param(4, 4, 1024, "KiB of each transfer"),
    },
)
