"""One table in shared memory: kvmd stores, importers read, and nothing an importer does can make it store."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from protocol.errors import UapiError
from protocol.hw.dsa import Status
from protocol.pt.mem import TableReader
from protocol.pt.meta import ExportedTdpMeta
from protocol.pt.walk import Outcome, second_stage_rules, walk
from protocol.units import LEVEL_1G, PAGE_SIZE, WHOLE_SIZE, Hpa
from qemu_shim.vmm.machine import Host
from tests.kit.vmm import Vmm, bare_vm, nothing_left, rigged
from tests.kit.wire_importer import WireImporter

LIBC = ctypes.CDLL(None, use_errno=True)
PUNCH_HOLE = 0x02 | 0x01  # and keep the size
NOBODY = 65534


@pytest.fixture
async def rig(host: Host) -> AsyncIterator[Vmm]:
    made = await bare_vm(host)
    made.tdp_fd = await made.vm.create_tdp_fd()
    yield made
    made.close()


@pytest.fixture
async def importer(host: Host, rig: Vmm) -> AsyncIterator[WireImporter]:
    assert rig.tdp_fd is not None
    made = await WireImporter.of(host, rig.tdp_fd)
    await made.register()
    yield made
    made.close()


def call_libc(name: str, *arguments: int | ctypes.c_void_p | ctypes.c_long) -> int:
    """0, or the errno."""
    return 0 if getattr(LIBC, name)(*arguments) == 0 else ctypes.get_errno()


def map_shared(fd: int, prot: int) -> None:
    mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, prot).close()


WRITES: dict[str, Callable[[int], object]] = {
    "map it writable": lambda fd: map_shared(fd, mmap.PROT_READ | mmap.PROT_WRITE),
    "map it write-only": lambda fd: map_shared(fd, mmap.PROT_WRITE),
    "pwrite": lambda fd: os.pwrite(fd, b"\xff" * 8, 0),
    "write": lambda fd: os.write(fd, b"\xff" * 8),
    "shrink": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, 1 << 32),
    "seal": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}
SEALED = ("tables", "frame_tags")
REFUSAL = r"not permitted|denied"


@pytest.mark.parametrize("kind", SEALED)
@pytest.mark.parametrize("how", WRITES)
async def test_an_importers_fd_cannot_write(importer: WireImporter, kind: str, how: str) -> None:
    _, _, fd = importer.windows[kind]
    with pytest.raises(OSError, match=REFUSAL) as refused:
        WRITES[how](fd)
    assert refused.value.errno in (errno.EPERM, errno.EACCES)


@pytest.mark.parametrize("kind", SEALED)
@pytest.mark.parametrize("how", WRITES)
async def test_the_fd_opened_again_for_writing_cannot_write(
    importer: WireImporter, kind: str, how: str
) -> None:
    """Root may open it for writing whatever its mode says; the seal holds all the same."""
    _, _, fd = importer.windows[kind]
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    except PermissionError:
        assert os.geteuid() != 0
        return
    try:
        with pytest.raises(OSError, match=REFUSAL) as refused:
            WRITES[how](again)
        assert refused.value.errno in (errno.EPERM, errno.EACCES)
        assert call_libc("fallocate", again, PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(PAGE_SIZE)) == (
            errno.EPERM
        )
    finally:
        os.close(again)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("kind", SEALED)
async def test_another_user_cannot_open_the_fd_again_for_writing(importer: WireImporter, kind: str) -> None:
    _, _, fd = importer.windows[kind]
    become = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    attempt = f"import os; {become}; os.open('/proc/self/fd/{fd}', os.O_RDWR)"
    tried = await trio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-I", "-S", "-c", attempt],
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=False,
        )
    )
    assert "PermissionError" in tried.stderr


async def test_a_read_only_mapping_cannot_be_made_writable_or_punched(importer: WireImporter) -> None:
    _, _, fd = importer.windows["tables"]
    LIBC.mmap.restype = ctypes.c_void_p
    at = LIBC.mmap(None, ctypes.c_long(PAGE_SIZE), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    address = ctypes.c_void_p(at)
    try:
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        assert call_libc("mprotect", address, ctypes.c_long(PAGE_SIZE), writable) == errno.EACCES
        removed = call_libc("madvise", address, ctypes.c_long(PAGE_SIZE), 9)  # MADV_REMOVE
        assert removed in (errno.EACCES, errno.EPERM)
    finally:
        call_libc("munmap", address, ctypes.c_long(PAGE_SIZE))


async def test_the_frames_can_be_written_by_an_importer(importer: WireImporter) -> None:
    """They are what DMA writes: no seal may stand in its way."""
    _, size, fd = importer.windows["frames"]
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as frames:
        assert len(frames) == size


async def test_a_read_only_mapping_sees_kvmds_later_stores(importer: WireImporter, rig: Vmm) -> None:
    meta = ExportedTdpMeta.from_bytes(await importer.metadata())
    base, size, fd = importer.windows["tables"]
    rules = second_stage_rules(46, LEVEL_1G, snoop_control=True)
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        view = memoryview(mapped)
        tables = TableReader(Hpa(base), view)

        def outcome(gpa: int) -> Outcome:
            return walk(tables, rules, meta.root_hpa, meta.level, gpa).outcome

        pages = [rig.memory.allocate(1) for _ in range(16)]
        assert {outcome(gpa) for gpa in pages} == {Outcome.ABSENT}
        for n, gpa in enumerate(pages):
            await rig.memory.touch([gpa])
            assert [outcome(page) for page in pages].count(Outcome.MAPPED) == n + 1
        await rig.process.madvise_dontneed(rig.hva + pages[3], PAGE_SIZE)
        assert outcome(pages[3]) is Outcome.ABSENT
        assert outcome(pages[4]) is Outcome.MAPPED
        await rig.vm.set_user_memory_region(0, 0, 0, 0)
        assert {outcome(gpa) for gpa in pages} == {Outcome.ABSENT}
        assert ExportedTdpMeta.from_bytes(await importer.metadata()) == meta  # RFC-95: the root stays
        tables.release()
        view.release()


@pytest.mark.rfc("RFC-87")
async def test_an_importer_is_told_before_the_host_goes_on(importer: WireImporter, rig: Vmm) -> None:
    """RFC-87, RFC-94: the change waits for the ack, and only for it."""
    gpa = rig.memory.allocate(1)
    await rig.memory.touch([gpa])
    importer.ack = False
    moved = trio.Event()

    async def migrate() -> None:
        assert await rig.process.move_pages(rig.hva + gpa, PAGE_SIZE) == 1
        moved.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(migrate)
        await importer.wait_told()
        assert importer.told == [(0, WHOLE_SIZE)]
        await rig.host.kvmd.stats()
        assert not moved.is_set()
        importer.ack = True
        importer.ack_all()


async def test_an_importer_that_hangs_up_without_ack_is_waited_for_until_its_lease_ends(
    importer: WireImporter, rig: Vmm
) -> None:
    gpa = rig.memory.allocate(1)
    await rig.memory.touch([gpa])
    importer.ack = False
    moved = trio.Event()

    async def drop() -> None:
        await rig.process.madvise_dontneed(rig.hva + gpa, PAGE_SIZE)
        moved.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drop)
        await importer.wait_told()
        importer.channel.close()
        for _ in range(10):
            assert (await rig.host.kvmd.stats())["frames"] == 1
        assert not moved.is_set()
        importer.end_lease()
    assert (await rig.host.kvmd.stats())["frames"] == 0


@pytest.mark.rfc("RFC-105")
@pytest.mark.defect("B-09")
async def test_two_importers_of_one_tdp_are_both_told_and_a_name_is_taken_once(host: Host) -> None:
    """B-09: the second of a name, refused, took the first along."""
    async with rigged(host) as rig:
        assert rig.tdp_fd is not None
        mine = await WireImporter.of(host, rig.tdp_fd)
        with pytest.raises(UapiError) as refused:
            await mine.register("iommufd")
        assert refused.value.errno == errno.EBUSY
        await mine.register()
        page = rig.memory.allocate(1)
        assert await rig.fill(page) is Status.SUCCESS
        await rig.process.move_pages(rig.hva + page, PAGE_SIZE)
        assert mine.told == [(0, WHOLE_SIZE)]
        assert (await host.iommufdd.stats())["hwpts"][0]["invalidations"] == 1
        mine.close()
    await nothing_left(host)
