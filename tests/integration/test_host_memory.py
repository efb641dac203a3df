"""A process's memory over the wire: every call of the client, and a device that meets what they leave.

What the calls do in detail is in `tests/unit/kvmd/mm`; here it is the fds, the errnos and the waiting.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator

import pytest
import trio

from protocol.errors import EHWPOISON, UapiError
from protocol.hw.dsa import Status
from protocol.units import MIB, PAGE_SIZE
from qemu_shim.vmm.machine import Host, connect_host
from qemu_shim.vmm.process import Process
from tests.kit.daemons import eventually, system
from tests.kit.vmm import FILLED, rigged

SIZE = 16 * PAGE_SIZE


@pytest.fixture
async def process(host: Host) -> AsyncIterator[Process]:
    made = await host.kvmd.start_process()
    yield made
    made.close()


async def fails(flow: object) -> int:
    with pytest.raises(UapiError) as caught:
        await flow  # type: ignore[misc]
    return caught.value.errno


async def test_a_file_is_shared_by_those_who_map_it_and_outlives_its_fd(process: Process) -> None:
    file = await process.memfd("m", SIZE)
    shared = await process.mmap(SIZE, kind="file_shared", file=file)
    private = await process.mmap(SIZE, kind="file_private", file=file, offset=PAGE_SIZE)
    await file.pwrite(PAGE_SIZE, b"filedata")
    assert await process.read(shared + PAGE_SIZE, 8) == await process.read(private, 8) == b"filedata"
    await process.write(private, b"mine")
    assert await file.pread(PAGE_SIZE, 8) == b"filedata"
    await file.punch_hole(PAGE_SIZE, PAGE_SIZE)
    assert await process.read(shared + PAGE_SIZE, 4) == bytes(4)
    await file.truncate(PAGE_SIZE)
    assert await fails(process.read(shared + PAGE_SIZE, 1)) == errno.EFAULT
    await process.write(shared, b"kept")
    file.close()
    assert await process.read(shared, 4) == b"kept"
    assert await fails(process.mmap(SIZE, kind="file_shared")) == errno.EBADF


async def test_a_child_has_a_copy_and_exits_when_its_fd_closes(host: Host, process: Process) -> None:
    addr = await process.mmap(SIZE)
    await process.write(addr, b"before")
    child = await process.fork()
    await process.write(addr, b"after!")
    assert await child.read(addr, 6) == b"before"
    assert (await host.kvmd.stats())["processes"] == 2
    child.close()
    await eventually(
        host.kvmd.stats, lambda seen: (seen["processes"], seen["frames"]) == (1, 1), "the child is gone"
    )


async def test_calls_on_ranges_do_what_they_say(process: Process) -> None:
    addr = await process.mmap(4 * MIB, addr=0x4000_0000, prot="rw")
    await process.madvise(addr, 4 * MIB, "hugepage")
    await process.write(addr, b"huge")
    assert await process.anon_huge_kib(addr, 4 * MIB) == 2048
    assert await process.host_action("split", addr, 2 * MIB) == 1
    assert await process.host_action("collapse", addr, 2 * MIB) == 1
    await process.mprotect(addr, PAGE_SIZE, "r")
    assert await fails(process.write(addr, b"x")) == errno.EFAULT
    assert await fails(process.mremap(addr, 2 * MIB, MIB, 0x8000_0000)) == errno.EFAULT, "two mappings"
    await process.mprotect(addr, PAGE_SIZE, "rw")
    moved = await process.mremap(addr, 2 * MIB, 2 * MIB, 0x8000_0000)
    assert await process.read(moved, 4) == b"huge"
    assert await process.mmap(PAGE_SIZE, addr=moved, fixed=True) == moved
    assert await process.read(moved, 4) == bytes(4)
    await process.write(moved, b"swap")
    assert await process.host_action("swap_out", moved, PAGE_SIZE) == 1
    assert await process.read(moved, 4) == b"swap"
    assert await process.move_pages(moved, PAGE_SIZE) == 1
    assert await fails(process.madvise(addr, PAGE_SIZE, "dontneed")) == errno.ENOMEM
    assert await fails(process.mprotect(moved + 1, PAGE_SIZE, "r")) == errno.EINVAL


async def test_a_reader_answers_a_fault_of_the_process(process: Process) -> None:
    addr = await process.mmap(SIZE)
    uffd = await process.userfaultfd()
    await uffd.register(addr, SIZE, "missing+wp")
    read = b""

    async def reader() -> None:
        nonlocal read
        read = await process.read(addr + PAGE_SIZE, 8)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        assert await uffd.next_event() == (addr + PAGE_SIZE, [])
        await uffd.copy(addr + PAGE_SIZE, b"fromuffd")
    assert read == b"fromuffd"
    await uffd.zeropage(addr, PAGE_SIZE)
    await uffd.writeprotect(addr + PAGE_SIZE, PAGE_SIZE, True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.write, addr + PAGE_SIZE, b"w")
        assert await uffd.next_event() == (addr + PAGE_SIZE, ["WRITE", "WP"])
        await uffd.writeprotect(addr + PAGE_SIZE, PAGE_SIZE, False)
    await uffd.unregister(addr, SIZE)
    await process.write(addr + 2 * PAGE_SIZE, b"nobody asked")
    uffd.close()


async def test_closing_a_userfaultfd_lets_a_sleeping_access_go_on(process: Process) -> None:
    addr = await process.mmap(SIZE)
    uffd = await process.userfaultfd(user_mode_only=True)
    await uffd.register(addr, SIZE, "missing")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.write, addr, b"slept")
        await uffd.next_event()
        uffd.close()
    assert await process.read(addr, 5) == b"slept"


async def test_a_device_finds_what_the_host_did_to_its_pages(host: Host) -> None:
    async with rigged(host) as rig:
        page = rig.memory.allocate(1)
        at = rig.hva + page
        child = None
        for act in ("swap_out", "numa_hint", "migrate", "age", "fork"):
            assert await rig.fill(page) is Status.SUCCESS
            if act == "fork":
                child = await rig.process.fork()
            else:
                await rig.process.host_action(act, at, PAGE_SIZE)
            assert await rig.process.read(at, PAGE_SIZE) == FILLED
            await rig.process.write(at, bytes(PAGE_SIZE))
            assert await rig.fill(page) is Status.SUCCESS
            assert await rig.process.read(at, PAGE_SIZE) == FILLED, act
            assert await host.kvmd.violations() == []
        assert child is not None
        assert await child.read(at, PAGE_SIZE) == FILLED
        child.close()


async def test_poisoned_memory_is_told_apart() -> None:
    """In a system of its own: the frame is lost for good."""
    with system() as running:
        async with connect_host(running.directory) as host:
            process = await host.kvmd.start_process()
            addr = await process.mmap(SIZE)
            await process.write(addr, b"lost")
            await process.host_action("poison", addr, PAGE_SIZE)
            assert await fails(process.read(addr, 1)) == EHWPOISON
            assert await host.kvmd.violations() == []
            process.close()
