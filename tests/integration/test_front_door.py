"""What the front door promises: hosts of any number of machines, and expectations that say what they saw."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.scratch import Scratch, scratched

MACHINES = '''
"""Two machines, each of three devices, two vCPUs and four slots; each writes everywhere, its own words."""

from qemu_shim.api import MIB, Context, scenario

MACHINES, DEVICES, CPUS, SLOTS = 2, 3, 2, 4


@scenario(devices=MACHINES * DEVICES)
async def crowd(ctx: Context) -> None:
    guests = [await ctx.boot(devices=DEVICES, vcpus=CPUS, ram_bytes=64 * MIB) for _ in range(MACHINES)]
    numbers = [device.plugged.number for guest in guests for device in guest.devices]
    ctx.expect_equal(numbers, list(range(MACHINES * DEVICES)), "the devices' numbers")
    slots = [[await guest.add_slot(2 * MIB) for _ in range(SLOTS)] for guest in guests]
    for m, guest in enumerate(guests):
        for s, slot in enumerate(slots[m]):
            for d, device in enumerate(guest.devices):
                await device.fill(slot.gpa + d * 4096, pattern=word(m, s, d))
            for c, cpu in enumerate(guest.cpus, DEVICES):
                await cpu.access([(slot.gpa + c * 4096, word(m, s, c).to_bytes(8, "little"))])
    for m, guest in enumerate(guests):
        for s, slot in enumerate(slots[m]):
            for page in range(DEVICES + CPUS):
                gpa = slot.gpa + page * 4096
                what = f"machine {m}, slot {s}, page {page}"
                for cpu in guest.cpus:
                    (seen,) = await cpu.access([(gpa, 8)])
                    ctx.expect_equal(int.from_bytes(seen, "little"), word(m, s, page), what)
                if page < DEVICES:
                    for device in guest.devices:
                        ctx.expect(await device.holds(gpa, 4096, word(m, s, page)), f"{what}: by a device")
    first = guests[0]
    await first.remove_slot(slots[0][1])
    for device in first.devices:
        await ctx.expect_dma_fault("a write to what was removed", device.fill(slots[0][1].gpa))
        await device.fill(slots[0][2].gpa)
    await ctx.shut_down(first)
    third = await ctx.boot(devices=DEVICES, ram_bytes=64 * MIB)
    numbers = [device.plugged.number for device in third.devices]
    ctx.expect_equal(numbers, [0, 1, 2], "devices that were freed")
    await third.devices[2].fill(third.pages(1)[0])
    ctx.expect(await guests[1].devices[0].holds(slots[1][0].gpa, 4096, word(1, 0, 0)), "the other machine's")
    ctx.row("slots", sum(map(len, slots)))


def word(*of: int) -> int:
    return int.from_bytes(bytes((*of, 0xA5)), "big")
'''

ENDS = '''
"""A machine ends, and what it counted is still counted."""

from qemu_shim.api import Context, scenario


@scenario()
async def ended(ctx: Context) -> None:
    for pages in (3, 2):
        guest = await ctx.boot(records_present=True)
        for gpa in guest.pages(pages):
            await guest.fill(gpa)
        if pages == 3:
            await ctx.shut_down(guest)
'''

FAILS = '''
"""Every expectation, of something that is not so."""

import errno

from qemu_shim.api import PAGE_SIZE, Context, scenario


@scenario()
async def nothing_holds(ctx: Context) -> None:
    guest = await ctx.boot()
    (gpa,) = guest.pages(1)
    ctx.expect(False, "asked for 2 pages, 3 were there")
    ctx.expect_equal(len(guest.devices), 2, "devices")
    await guest.write(gpa + 4000, b"!")
    ctx.expect_equal(await guest.read(gpa), bytes(PAGE_SIZE), "the page")
    await ctx.expect_refused("device 7", errno.EBUSY, "busy", guest.plug(7))
    await ctx.expect_refused("ageing", errno.EINVAL, "", guest.age(gpa))
    await ctx.expect_dma_fault("a write to RAM", guest.fill(gpa))
    async with ctx.counted() as cost:
        await guest.swap_out(gpa)
    ctx.expect_equal(cost.swap_ins, 1, "pages read back")
    await guest.fill(1 << 40)
    ctx.expect(False, "never reached: what no scenario expects ends it")
'''
SAID = (
    r"asked for 2 pages, 3 were there",
    r"devices: 1, expected 2",
    r"the page: 21(00){15} from byte 4000 on, expected (00){16}",
    r"device 7: \[ENO\w+\] .*, expected EBUSY for 'busy'",
    r"ageing: was not refused, expected EINVAL",
    r"a write to RAM: the device did it, expected a page fault",
    r"pages read back: 0, expected 1",
    r"fill of gpa 0x10000000000: PAGE_FAULT_\w+ at 0x10000000000",
)


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with scratched() as made:
        yield made


@pytest.mark.parametrize("design", ["shared", "mirror", "pinned"])
def test_a_host_has_machines_and_each_has_devices_vcpus_and_slots(
    scratch: Scratch, tmp_path: Path, design: str
) -> None:
    program = tmp_path / "crowd.py"
    program.write_text(MACHINES)
    status, out, err = scratch.run("run", str(program), "--design", design)
    assert (status, out.splitlines()[-1]) == (0, "crowd: ok"), out + err


def test_what_a_machine_counted_stays_counted_when_it_is_shut_down(scratch: Scratch, tmp_path: Path) -> None:
    program = tmp_path / "ended.py"
    program.write_text(ENDS)
    status, out, err = scratch.run("run", str(program), "--json")
    assert status == 0, out + err
    figures = json.loads(out)["figures"]
    assert (figures["io_faults"], figures["pages_mapped_io"]) == (3 + 2, 3 + 2)


def test_an_expectation_says_what_was_asked_what_was_seen_and_how_to_see_more(
    scratch: Scratch, tmp_path: Path
) -> None:
    program = tmp_path / "nothing_holds.py"
    program.write_text(FAILS)
    status, out, err = scratch.run("run", str(program))
    assert (status, err) == (1, "")
    said = [line.removeprefix("FAILED: ") for line in out.splitlines() if line.startswith("FAILED: ")]
    assert len(said) == len(SAID), said
    for line, pattern in zip(said, SAID, strict=True):
        assert re.fullmatch(pattern, line), line
    see_more, last = out.splitlines()[-2:]
    assert see_more.startswith("to see more: --dump DIR writes the tables, --kvmd '--trace FILE'")
    assert last == "nothing-holds: failed"


def test_a_comparison_and_a_campaign_say_it_too(scratch: Scratch, tmp_path: Path) -> None:
    program = tmp_path / "nothing_holds.py"
    program.write_text(FAILS)
    status, out, err = scratch.run("compare", str(program), "--designs", "shared")
    assert status == 1
    assert "FAILED, shared: devices: 1, expected 2" in out
    assert err.splitlines()[-1].startswith("to see more: --kvmd '--trace FILE'")
    runs = str(tmp_path / "runs")
    status, _, err = scratch.run(
        "campaign", str(program), "--designs", "shared", "--seeds", "1..1", "--out", runs
    )
    assert status == 1
    assert "devices: 1, expected 2" in err
    assert "to see more, play one alone" in err.splitlines()[-1]
