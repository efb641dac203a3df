"""sharing: one fault for each page, by whoever comes first (RFC-69, RFC-70).

The vCPU touches half of the pages, the device the other half; then each touches the other's half.  The
second round faults nowhere, and all faults together are as many as there are pages.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from qemu_shim.api import PAGE_SIZE, Context, Guest, Param, Scenario

PATTERN = 0x5AA5_F00D_CAFE_BEEF
WORDS = PATTERN.to_bytes(8, "little") * (PAGE_SIZE // 8)


async def play(ctx: Context) -> None:
    half = ctx.params["pages"] // 2
    guest = await ctx.boot(records_present=True)  # not part of the story
    pages = guest.pages(2 * half)
    by_cpu, by_device = pages[:half], pages[half:]
    async with ctx.counted() as whole:
        await _step(ctx, "vCPU touches its half", half, 0, lambda: guest.touch(by_cpu))
        await _step(ctx, "device writes the vCPU's half", 0, 0, lambda: _write_by_device(guest, by_cpu))
        await _step(ctx, "device writes its own half", 0, half, lambda: _write_by_device(guest, by_device))
        await _step(ctx, "vCPU reads the device's half", 0, 0, lambda: _check_by_cpu(ctx, guest, by_device))
    faults = whole.cpu_faults + whole.io_faults
    ctx.row("distinct pages", 2 * half)
    ctx.row("faults, vCPU + device", faults)
    ctx.figures |= {"pages": 2 * half, "faults": faults}
    ctx.expect(faults == 2 * half, f"{faults} faults for {2 * half} pages")


async def _write_by_device(guest: Guest, gpas: list[int]) -> None:
    for gpa in gpas:
        await guest.fill(gpa, pattern=PATTERN)


async def _check_by_cpu(ctx: Context, guest: Guest, gpas: list[int]) -> None:
    for gpa in gpas:
        ctx.expect_equal(await guest.read(gpa), WORDS, f"gpa {gpa:#x}")


async def _step(
    ctx: Context, what: str, violations: int, requests: int, act: Callable[[], Awaitable[None]]
) -> None:
    async with ctx.counted() as cost:
        await act()
    ctx.say(f"{what}: {cost.cpu_faults} EPT violations, {cost.io_faults} page requests")
    seen = cost.cpu_faults, cost.io_faults
    ctx.expect_equal(seen, (violations, requests), f"{what}: EPT violations and page requests")


SCENARIO = Scenario(
    name="sharing",
    summary="one fault a page, whether the vCPU or the device comes first; counted exactly",
    tags=("RFC-69", "RFC-70"),
    play=play,
    params={"pages": Param(64, 2, 65536, "distinct pages, half for each")},
    designs=("shared",),
)
