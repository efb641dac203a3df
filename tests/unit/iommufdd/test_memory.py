"""The window of iommufdd's own tables: nobody else stores there, units read it, hosts are beside it."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest

from device_sim.memory import MappedMemory
from iommufdd.config import parse
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.memory import TABLES_START, TableMemory
from kvmd.config import MAX_RAM
from protocol.hostmem import HIGH_RAM_START, WindowKind, check_layout
from protocol.kernel.linux import LINUX
from protocol.rpc.channel import Fds
from protocol.units import GIB, MIB, TIB, Hpa, Iova, Level
from tests.oracle.table import Machine, RawTables, second_stage_walk

PATHS = ["--socket", "s", "--kvmd", "k", "--device", "d"]
HAW = 46  # what device_sim's units have unless told otherwise


@pytest.fixture
def tables() -> Iterator[TableMemory]:
    memory = TableMemory(LINUX, MIB)
    yield memory
    memory.close()


def map_again(fd: int) -> None:
    """Open the file anew and map it writable; root may do the first, nobody the second."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        mmap.mmap(again, MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(again)


def add(unit: MappedMemory, window: tuple[str, int, int], fds: list[int]) -> int:
    """Window and lease, as they come with a message."""
    received = Fds(LINUX, fds)
    number = unit.add([window], received)
    received.close()
    return number


def test_nobody_maps_or_writes_the_window_but_its_owner(tables: TableMemory) -> None:
    """Not through the copies that are handed out, nor by opening the file again, as root or not."""
    (fd,) = tables.fds(1)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.write(fd, b"\xff")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 2 * MIB)
        with pytest.raises(PermissionError):
            map_again(fd)
        tables.writer.store64(TABLES_START + 8, 0x1234)
        with mmap.mmap(fd, MIB, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
            assert seen[8:16] == (0x1234).to_bytes(8, "little")
    finally:
        os.close(fd)


def test_a_unit_walks_the_window_beside_kvmd_s(tables: TableMemory) -> None:
    """Several sets name it, as several HWPTs do: it is one window, and goes with the last of them."""
    table = IoPageTable(tables.writer, tables.pool, Level(4), Level(3))
    table.map(Iova(5 << 12), Hpa(0x10_0000 << 12), Level(1), writable=True)
    host = os.memfd_create("host", os.MFD_ALLOW_SEALING)
    os.ftruncate(host, MIB)
    fcntl.fcntl(host, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    unit = MappedMemory(LINUX)
    kvmd_s = add(unit, (WindowKind.TABLES, MIB, MIB), [host, os.dup(host)])
    sets = [add(unit, tables.window, tables.fds(2)) for _ in range(100)]
    reader = unit.physical.tables_at(table.root)
    assert reader is not None
    found = second_stage_walk(
        RawTables(TABLES_START, bytes(reader.pages(TABLES_START, 8))), Machine(), table.root, 4, 5 << 12
    )
    assert (found.kind, found.hpa) == ("mapped", 0x10_0000 << 12)
    for number in sets:
        assert unit.physical.tables_at(table.root) is not None
        unit.remove(number)
    assert unit.physical.tables_at(table.root) is None
    unit.remove(kvmd_s)


def test_the_window_is_above_every_host_and_within_a_unit_s_reach() -> None:
    assert HIGH_RAM_START + MAX_RAM <= TABLES_START
    for size in (MIB, GIB, TIB):
        assert check_layout(TABLES_START, size) is None
        assert TABLES_START + size <= 1 << HAW


def test_the_window_costs_what_is_touched_of_it() -> None:
    memory = TableMemory(LINUX, TIB)
    (fd,) = memory.fds(1)
    try:
        IoPageTable(memory.writer, memory.pool, Level(4), Level(3)).map(
            Iova(0), Hpa(0), Level(1), writable=True
        )
        assert os.fstat(fd).st_size == TIB
        assert os.fstat(fd).st_blocks * 512 <= 2 * MIB
    finally:
        os.close(fd)
        memory.close()


def test_its_size_is_an_option() -> None:
    assert parse(PATHS)[1].table_bytes == GIB
    assert parse([*PATHS, "--table-bytes", "3M"])[1].table_bytes == 3 * MIB


@pytest.mark.parametrize("size", ["0", "4K", "1025K", "2T", "many"])
def test_a_size_it_cannot_have_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*PATHS, "--table-bytes", size])
    assert "--table-bytes" in capsys.readouterr().err


def test_an_io_page_fault_maps_one_page_or_as_many_as_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert [parse(PATHS)[1].premap_pages, parse([*PATHS, "--premap-pages", "512"])[1].premap_pages] == [
        1,
        512,
    ]
    for pages in ("0", "513", "-1", "many"):
        with pytest.raises(SystemExit):
            parse([*PATHS, f"--premap-pages={pages}"])
        assert "--premap-pages" in capsys.readouterr().err
