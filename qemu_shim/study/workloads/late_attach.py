"""late-attach: the guest's CPU has used its memory when the device comes: hot-plug, re-attach, restore.

KVM's one table has what the CPU touched already, so that only what nobody has touched costs an IO page fault.
A table that begins with the device begins empty, whoever fills it: one of iommufdd's, which no note of KVM's
tells of what was faulted in before, and a second root of KVM's, filled with faults from its export on.  Where
memory is pinned the attach itself maps all of it.  The CPU reads last what the device wrote.
"""

from __future__ import annotations

from qemu_shim.api import MIB, Context, Param, Scenario

WORD_BYTES = 8


async def play(ctx: Context) -> None:
    guest = await ctx.boot_without_device(ram_bytes=ctx.params["ram_mib"] * MIB)
    pages = guest.pages(ctx.params["pages"])
    await guest.touch(pages)
    await ctx.step("cpu writes")
    await ctx.attach(guest)
    words = {gpa: ctx.chance.getrandbits(8 * WORD_BYTES) for gpa in pages}
    ctx.chance.shuffle(pages)
    await guest.fill(pages[0], pattern=words[pages[0]])
    await ctx.step("first dma")
    for gpa in pages[1:]:
        await guest.fill(gpa, pattern=words[gpa])
    await ctx.step("dma to what the cpu wrote")
    found = await guest.cpus[0].access([(gpa, WORD_BYTES) for gpa in pages])
    for gpa, data in zip(pages, found, strict=True):
        equal = data == words[gpa].to_bytes(WORD_BYTES, "little")
        ctx.expect(equal, f"the CPU does not read {words[gpa]:#x} at gpa {gpa:#x} but {data.hex()}")
    await ctx.step("cpu reads")


WORKLOAD = Scenario(
    name="late-attach",
    summary="the device comes after the CPU has used its memory",
    play=play,
    params={
        "pages": Param(256, 1, 1 << 18, "pages the CPU writes before the device comes"),
        "ram_mib": Param(64, 32, 1 << 20, "MiB of guest memory"),
    },
)
