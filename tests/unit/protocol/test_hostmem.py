"""The host-physical map: where RAM may lie, and what is found where."""

from __future__ import annotations

import pytest

from protocol.hostmem import MAX_WINDOWS, HostMap, Window, WindowKind, check_layout
from protocol.units import Hpa


def window(base: int, size: int = 0x2000, kind: WindowKind = WindowKind.FRAMES) -> Window:
    return Window(kind, Hpa(base), size, memoryview(bytearray(size)))


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (0x10_0000, 0x1000),  # 1 MiB, the lowest
        (0x10_0000, 0x7FF0_0000),  # all of low RAM
        (0x7FFF_F000, 0x1000),  # the last page below 2 GiB
        (0x1_0000_0000, 0x1000),  # 4 GiB
        (0xF_FFFF_FFFF_F000, 0x1000),  # the last page of 52 bits
    ],
)
def test_ram_may_lie_there(base: int, size: int) -> None:
    assert check_layout(base, size) is None


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (0xF_F000, 0x1000),
        (0xF_F000, 0x2000),
        (0x7FFF_F000, 0x2000),
        (0x8000_0000, 0x1000),
        (0xFFFF_F000, 0x1000),
        (0xFFFF_F000, 0x2000),
        (0xF_FFFF_FFFF_F000, 0x2000),
        (0x10_0800, 0x1000),
        (0x10_0000, 0x800),
        (0x10_0000, 0),
        (0x10_0000, -0x1000),
    ],
)
def test_ram_may_not_lie_there(base: int, size: int) -> None:
    assert check_layout(base, size) is not None
    with pytest.raises(ValueError, match="window"):
        HostMap().add(Window(WindowKind.FRAMES, Hpa(base), size, memoryview(b"")))


def test_windows_do_not_overlap() -> None:
    host = HostMap()
    host.add(window(0x20_0000))
    host.add(window(0x20_2000))
    host.add(window(0x1F_E000))
    for base in (0x1F_F000, 0x20_0000, 0x20_1000, 0x20_3000):
        with pytest.raises(ValueError, match="overlaps"):
            host.add(window(base))
    assert len(list(host)) == 3


def test_the_window_past_the_limit_is_refused() -> None:
    host = HostMap()
    for i in range(MAX_WINDOWS):
        host.add(window(0x10_0000 + i * 0x2000))
    with pytest.raises(ValueError, match=f"more than {MAX_WINDOWS}"):
        host.add(window(0x100_0000))


def test_an_address_is_found_in_the_window_of_its_kind_only() -> None:
    host = HostMap()
    tables, frames = window(0x10_0000, kind=WindowKind.TABLES), window(0x1_0000_0000)
    host.add(tables)
    host.add(frames)
    assert host.find(Hpa(0x10_1FFF), WindowKind.TABLES) is tables
    assert host.find(Hpa(0x10_1FFF), WindowKind.FRAMES) is None
    assert host.find(Hpa(0x10_2000), WindowKind.TABLES) is None
    assert host.find(Hpa(0xF_FFFF), WindowKind.TABLES) is None
    found = host.frame(Hpa(0x1_0000_1234))
    assert found is not None
    assert found[1] == 0x1234
    found[0][found[1]] = 7
    assert frames.view[0x1234] == 7
    assert host.frame(Hpa(0x10_0000)) is None
