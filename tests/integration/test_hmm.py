"""Another MMU of a process, over real daemons: what it is answered, told and refused, and how it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from protocol.frame_tags import TAG_BYTES
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from qemu_shim.vmm.process import Process
from tests.integration.mirror import WireMirror, host_memory
from tests.integration.plain import REQUEST, Plain, frame
from tests.integration.test_check_can_fail import WITHOUT_ACK
from tests.integration.test_hostile_races import asked
from tests.kit.daemons import TRUSTING, System, eventually, system, until
from tests.kit.refusals import refused
from tests.kit.vmm import bare_vm, nothing_left, vm_stats

SIZE = 16 * PAGE_SIZE


@asynccontextmanager
async def mirrored(host: Host, *, ack: bool = True) -> AsyncIterator[tuple[Process, WireMirror, int]]:
    """A process of 16 pages that another MMU watches."""
    process = await host.kvmd.start_process()
    mirror = await WireMirror.registered(host, process, ack=ack)
    hva = await process.mmap(SIZE)
    await mirror.watch(hva, SIZE)
    try:
        yield process, mirror, hva
        assert await host.kvmd.violations() == []
    finally:
        mirror.close()
        process.close()
    await nothing_left(host)


def frames_of(mirror: WireMirror, hpa: int, size: int) -> bytes:
    """What a device reads there, through the window it was lent."""
    base, _, fd = mirror.windows["frames"]
    return os.pread(fd, size, hpa - base)


def tag_of(mirror: WireMirror, hpa: int) -> int:
    """Who owns that frame, by the window of tags."""
    base, _, fd = mirror.windows["frame_tags"]
    return int.from_bytes(os.pread(fd, TAG_BYTES, (hpa - base) // PAGE_SIZE * TAG_BYTES), "little")


# -- what it is given --------------------------------------------------------------------------------------


async def test_it_is_lent_frames_and_tags_and_never_kvmd_s_tables(host: Host) -> None:
    async with mirrored(host) as (_, mirror, _):
        assert set(mirror.windows) == {"frames", "frame_tags"}


async def test_a_page_faulted_in_is_where_the_process_writes_and_stays_so_until_the_ack(host: Host) -> None:
    async with mirrored(host) as (process, mirror, hva):
        await process.write(hva, b"before")
        ((at, hpa, size, writable),) = (await mirror.fault(hva))["pages"]
        assert (at, size, writable) == (hva, PAGE_SIZE, True)
        assert frames_of(mirror, hpa, 6) == b"before"
        assert await process.move_pages(hva, PAGE_SIZE) == 1
        assert mirror.told == [(hva, PAGE_SIZE)]
        ((_, moved, _, _),) = (await mirror.fault(hva))["pages"]
        assert moved != hpa
        assert frames_of(mirror, moved, 6) == b"before"


async def test_a_look_shows_what_is_there_and_huge_pages_come_whole(host: Host) -> None:
    async with mirrored(host) as (process, mirror, hva):
        await process.write(hva + PAGE_SIZE, b"x")
        found = await mirror.look(hva, SIZE)
        assert ([page[0] for page in found["pages"]], found["end"]) == ([hva + PAGE_SIZE], hva + SIZE)
        large = await process.mmap(4 * MIB, page_size=2 * MIB)
        await mirror.watch(large, 4 * MIB)
        found = await mirror.fault(large + PAGE_SIZE, 2 * MIB)
        assert [(page[0], page[2]) for page in found["pages"]] == [
            (large, 2 * MIB),
            (large + 2 * MIB, 2 * MIB),
        ]


async def test_what_is_read_back_from_swap_is_counted_where_it_happened(host: Host) -> None:
    before = await host_memory(host)
    async with mirrored(host) as (process, mirror, hva):
        await process.write(hva, bytes(4 * PAGE_SIZE))
        assert await process.host_action("swap_out", hva, SIZE) == 4
        assert (await mirror.fault(hva, 2 * PAGE_SIZE))["major"] == 2
        assert (await mirror.pin(hva + 2 * PAGE_SIZE))["major"] == 1
        after = await host_memory(host)
        grown = {name: after[name] - before[name] for name in after}
        assert grown == {
            "pinned_pages": 1,
            "pages_pinned": 1,
            "pages_allocated": 4 + 3,
            "swap_outs": 4,
            "swap_ins": 3,
            "notifier_calls": 1,
            "hmm_invalidations": 1,
            "hmm_faults": 1,
            "hmm_faults_major": 3,
            "hmm_faults_allocated": 2,
        }
    assert (await host_memory(host))["pinned_pages"] == before["pinned_pages"]


async def test_a_vm_s_faults_that_read_a_page_back_are_counted_by_who_faulted(host: Host) -> None:
    rig = await bare_vm(host)
    await rig.vcpu.run([("w", 0, b"x"), ("w", PAGE_SIZE, b"y")])
    assert await rig.process.host_action("swap_out", rig.hva, 2 * PAGE_SIZE) == 2
    await rig.vcpu.run([("r", 0, 1), ("r", PAGE_SIZE, 1), ("w", 2 * PAGE_SIZE, b"z")])
    stats = await vm_stats(host)
    assert (stats["pf_major"], stats["io_pf_major"]) == (2, 0)
    rig.close()
    await nothing_left(host)


# -- what it is refused ------------------------------------------------------------------------------------


async def test_each_refusal_has_its_errno(host: Host) -> None:
    async with mirrored(host) as (process, mirror, hva):
        await process.write(hva, b"x")
        await process.mprotect(hva + PAGE_SIZE, PAGE_SIZE, "r")
        await process.munmap(hva + 2 * PAGE_SIZE, PAGE_SIZE)
        rows = [
            (errno.EBUSY, "registered", mirror.register()),
            (errno.EEXIST, "overlaps", mirror.watch(hva + SIZE - PAGE_SIZE, SIZE)),
            (errno.ENOENT, "watched like that", mirror.unwatch(hva, PAGE_SIZE)),
            (errno.EINVAL, "not in a watched range", mirror.fault(hva, SIZE + PAGE_SIZE)),
            (errno.EINVAL, "greater than or equal", mirror.fault(hva, 0)),
            (errno.EINVAL, "multiple", mirror.fault(hva + 1)),
            (errno.EFAULT, "protection", mirror.fault(hva + PAGE_SIZE)),
            (errno.EFAULT, "no mapping", mirror.fault(hva + 2 * PAGE_SIZE)),
            (errno.EFAULT, "protection", mirror.pin(hva + PAGE_SIZE)),
            (errno.EFAULT, "no mapping", mirror.pin(hva + 3 * PAGE_SIZE, MIB)),
        ]
        for number, why, asking in rows:
            with refused(number, why):
                await asking
        assert (await host_memory(host))["pinned_pages"] == 0
        assert await mirror.unpin(hva, SIZE) == 0


async def test_before_it_is_registered_and_after_the_exit_it_gets_nothing(host: Host) -> None:
    process = await host.kvmd.start_process()
    mirror = await WireMirror.of(host, process._fd)
    for asking in (mirror.watch(0), mirror.fault(0), mirror.pin(0), mirror.unpin(0), mirror.unwatch(0)):
        with refused(errno.EINVAL, "registered first"):
            await asking
    await mirror.register()
    hva = await process.mmap(SIZE)
    await mirror.pin(hva, 2 * PAGE_SIZE)
    process.close()
    await eventually(host.kvmd.stats, lambda s: s["processes"] == 0, "the process is gone")
    for asking in (mirror.watch(hva), mirror.fault(hva), mirror.look(hva)):
        with refused(errno.EPERM, "exited"):
            await asking
    with refused(errno.EFAULT, "exited"):
        await mirror.pin(hva)
    assert (await host.kvmd.stats())["frames"] == 2
    assert await mirror.unpin(hva, PAGE_SIZE) == 1
    assert (await host.kvmd.stats())["frames"] == 1
    mirror.close()
    await nothing_left(host)


async def test_a_pin_beyond_the_limit_is_enomem_and_leaves_nothing_of_its_call() -> None:
    with system({"kvmd": [*TRUSTING["kvmd"], "--memlock", "16K"]}) as running:
        async with connect_host(running.directory) as host, mirrored(host) as (_, mirror, hva):
            await mirror.pin(hva, 2 * PAGE_SIZE)
            with refused(errno.ENOMEM, "4 pages pinned"):
                await mirror.pin(hva, 3 * PAGE_SIZE)
            assert (await host_memory(host))["pinned_pages"] == 2
            await mirror.pin(hva, 2 * PAGE_SIZE)


# -- pins --------------------------------------------------------------------------------------------------


async def test_a_pin_survives_dontneed_and_the_host_moves_and_swaps_around_it(host: Host) -> None:
    async with mirrored(host) as (process, mirror, hva):
        await process.write(hva, bytes(3 * PAGE_SIZE))
        ((_, hpa, _, _),) = (await mirror.pin(hva + PAGE_SIZE))["pages"]
        await process.write(hva + PAGE_SIZE, b"pinned")
        assert await process.move_pages(hva, 3 * PAGE_SIZE) == 2
        assert await process.host_action("swap_out", hva, 3 * PAGE_SIZE) == 2
        await process.madvise_dontneed(hva, SIZE)
        assert frames_of(mirror, hpa, 6) == b"pinned"
        assert (await host.kvmd.stats())["frames"] == 1
        assert await mirror.unpin(hva, SIZE) == 1
        assert (await host.kvmd.stats())["frames"] == 0


async def test_each_area_gets_back_the_page_it_pinned(host: Host) -> None:
    async with mirrored(host) as (process, mirror, hva):
        ((_, first, _, _),) = (await mirror.pin(hva, area=1))["pages"]
        await process.madvise_dontneed(hva, PAGE_SIZE)
        await process.write(hva, b"second")
        ((_, second, _, _),) = (await mirror.pin(hva, area=2))["pages"]
        assert first != second
        assert await mirror.unpin(hva, area=1) == 1
        assert frames_of(mirror, second, 6) == b"second"
        assert await process.move_pages(hva, PAGE_SIZE) == 0


async def test_pins_end_with_the_lease_not_with_the_channel(host: Host) -> None:
    async with mirrored(host) as (process, mirror, hva):
        await mirror.pin(hva, 2 * PAGE_SIZE)
        await mirror.unwatch(hva, SIZE)
        mirror.channel.close()
        assert await process.move_pages(hva, 2 * PAGE_SIZE) == 0
        assert (await host_memory(host))["pinned_pages"] == 2  # somebody may still walk
        mirror.end_lease()

        async def pinned() -> int:
            count: int = (await host_memory(host))["pinned_pages"]
            return count

        await eventually(pinned, lambda count: count == 0, "the pins went with the lease")
        assert await process.move_pages(hva, 2 * PAGE_SIZE) == 2


# -- an importer that does not ack -------------------------------------------------------------------------


async def test_without_an_ack_the_frame_stays_and_everybody_else_goes_on(host: Host) -> None:
    async with mirrored(host, ack=False) as (process, mirror, hva), asked() as requests:
        await process.write(hva, b"held")
        ((_, hpa, _, _),) = (await mirror.fault(hva))["pages"]
        requests.begin("drop", process.madvise_dontneed(hva, PAGE_SIZE))
        await mirror.wait_told()
        requests.begin("fault", mirror.fault(hva))
        await process.write(hva + PAGE_SIZE, b"beside")
        assert (await mirror.fault(hva + PAGE_SIZE))["pages"][0][0] == hva + PAGE_SIZE
        assert frames_of(mirror, hpa, 4) == b"held"
        assert (requests.ended, await host.kvmd.violations()) == ({}, [])
        mirror.ack_all()
        _, found = await requests.end("drop", "fault")
        assert frames_of(mirror, found["pages"][0][1], 4) == bytes(4)


async def test_an_importer_that_dies_without_ack_counts_as_acked_when_its_lease_ends(host: Host) -> None:
    async with mirrored(host, ack=False) as (process, mirror, hva), asked() as requests:
        await process.write(hva, b"held")
        ((_, hpa, _, _),) = (await mirror.fault(hva))["pages"]
        frames = (await host.kvmd.stats())["frames"]
        requests.begin("drop", process.madvise_dontneed(hva, PAGE_SIZE))
        await mirror.wait_told()
        mirror.channel.close()
        for _ in range(5):
            assert (await host.kvmd.stats())["frames"] == frames
        assert frames_of(mirror, hpa, 4) == b"held"
        assert "drop" not in requests.ended
        mirror.end_lease()
        await requests.end("drop")
        assert (await host.kvmd.stats())["frames"] == 0


async def test_what_dies_is_told_to_nobody_and_the_process_exits_when_the_lease_ends(host: Host) -> None:
    process = await host.kvmd.start_process()
    mirror = await WireMirror.registered(host, process)
    hva = await process.mmap(SIZE)
    await mirror.watch(hva, SIZE)
    await mirror.fault(hva)
    mirror.channel.close()
    process.close()
    await eventually(host.kvmd.stats, lambda s: s["processes"] == 0, "the fd is closed")
    assert (await host.kvmd.stats())["frames"] == 1
    mirror.end_lease()
    await nothing_left(host)
    mirror.close()


# -- the check can fail ------------------------------------------------------------------------------------


async def moved_without_ack(host: Host, mirror: WireMirror, process: Process, hva: int) -> bool:
    """Whether the host gave the frame up though the mirror, which uses it, has not acked (I6)."""
    await process.write(hva, b"held")
    ((_, hpa, _, _),) = (await mirror.fault(hva))["pages"]
    tag = tag_of(mirror, hpa)
    async with asked() as requests:
        requests.begin("move", process.move_pages(hva, PAGE_SIZE))
        await mirror.wait_told()
        await host.kvmd.stats()
        stale = tag_of(mirror, hpa) != tag
        mirror.ack_all()
        await requests.end("move")
    return stale


async def test_frame_tags_show_a_stale_access_if_acks_are_not_awaited_and_else_none(host: Host) -> None:
    async with mirrored(host, ack=False) as (process, mirror, hva):
        assert not await moved_without_ack(host, mirror, process, hva)
    with system(TRUSTING, planted=WITHOUT_ACK) as broken:
        async with connect_host(broken.directory) as host, mirrored(host, ack=False) as made:
            process, mirror, hva = made
            assert await moved_without_ack(host, mirror, process, hva)


# -- peers that are in a hurry -----------------------------------------------------------------------------


def test_a_peer_that_hangs_up_in_the_middle_of_everything_leaves_nothing(shared_system: System) -> None:
    before = shared_system.all_fds()
    for _ in range(20):
        door = Plain.connect(shared_system.socket("kvmd"))
        memory = door.open("MM_CREATE")
        mirror = door.open("HMM_MIRROR_GET", {}, [memory.sock.fileno()])
        hva = memory.ask("MMAP", {"size": SIZE})[0]["addr"]
        page = {"start": hva, "size": PAGE_SIZE}
        whole = {"start": hva, "size": SIZE}
        requests = [
            ("HMM_REGISTER", {}),
            ("HMM_WATCH", whole),
            ("HMM_PIN", {**whole, "write": True}),
            ("HMM_RANGE_FAULT", {**page, "write": True}),
            ("HMM_UNPIN", page),
        ]
        data = b"".join(frame(REQUEST, 1 + n, {"op": op, **body}) for n, (op, body) in enumerate(requests))
        mirror.send(data)
        for peer in (mirror, memory, door):
            peer.close()
    shared_system.wait_closed(before)
    witness = Plain.connect(shared_system.socket("kvmd"))
    until(lambda: witness.ask("STATS")[0]["frames"] == 0, "all of it was given back")
    witness.close()
