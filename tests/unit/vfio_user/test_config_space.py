"""A DSA's config space against the manual: every byte out of reset, and what each write does to each bit."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.vfio_user_dsa import PlainSilicon
from tests.vfio_user import config_decoder
from tests.vfio_user.config_decoder import FoundBar
from vfio_user.core.pci.dsa import dsa_endpoint
from vfio_user.core.pci.registers import RegisterFile, RegisterRow

# Worked out by hand from [PCIe 7.5, 7.7.2, 7.8.9, 10.5]: what is not here is zero.
OUT_OF_RESET: Final = """
000: 86 80 25 0b 00 00 10 00 00 00 80 08 00 00 00 00
010: 0c 00 00 00 00 00 00 00 0c 00 00 00 00 00 00 00
020: 00 00 00 00 00 00 00 00 00 00 00 00 86 80 00 00
030: 00 00 00 00 40 00 00 00 00 00 00 00 00 00 00 00
040: 10 80 92 00 21 80 00 10 10 28 00 00 00 00 00 00
060: 00 00 00 00 10 00 60 00 00 00 00 00 00 00 00 00
080: 11 00 08 00 00 20 00 00 00 30 00 00
100: 0f 00 01 11 20 00 00 00
110: 1b 00 01 12 04 14 00 00
120: 13 00 01 00 00 00 00 81 00 02 00 00 00 00 00 00
"""
# Likewise: of each byte the bits that are read-write, and those cleared by writing a one.
READ_WRITE: Final = """
004: 46 05
00c: ff
010: 00 00 ff ff ff ff ff ff 00 00 fe ff ff ff ff ff
03c: ff
048: ff 79
068: 10
082: 00 c0
106: 1f 80
116: 05
124: 01
12c: ff ff ff ff
"""
CLEARED_BY_ONE: Final = """
006: 00 f9
04a: 0f
126: 03
"""
SIZE: Final = 4096


def fresh() -> RegisterFile:
    return dsa_endpoint(PlainSilicon()).config


def reader(config: RegisterFile) -> config_decoder.Read:
    return lambda at, size: int.from_bytes(config.read(at, size), "little")


def writer(config: RegisterFile) -> config_decoder.Write:
    def write(at: int, size: int, value: int) -> None:
        config.write(at, value.to_bytes(size, "little"))

    return write


def test_every_byte_out_of_reset_is_the_manuals() -> None:
    assert fresh().read(0, SIZE) == config_decoder.dump(OUT_OF_RESET, SIZE)


def test_a_kernel_finds_the_bars_and_puts_them_back() -> None:
    config = fresh()
    before = config.read(0, SIZE)
    found = config_decoder.bars(reader(config), writer(config))
    assert found == {0: FoundBar(64 << 10, True, True), 2: FoundBar(128 << 10, True, True)}
    assert config.read(0, SIZE) == before


def test_a_kernel_finds_the_capabilities_of_a_dsa() -> None:
    read = reader(fresh())
    found, extended = config_decoder.capabilities(read), config_decoder.extended_capabilities(read)
    assert found.keys() == {0x10, 0x11}
    assert extended.keys() == {0x0F, 0x1B, 0x13}
    express, msix = found[0x10], found[0x11]
    assert read(express + 2, 2) >> 4 & 0xF == 9, "a root complex integrated endpoint"
    assert read(express + 4, 4) >> 28 & 1, "it can be reset by itself"
    assert read(express + 0x24, 4) >> 21 & 1, "no PASID without prefixes"
    assert read(msix + 2, 2) & 0x7FF == 8, "nine vectors"
    assert [read(msix + at, 4) & 7 for at in (4, 8)] == [0, 0], "both in BAR 0"
    assert [read(msix + at, 4) & ~7 for at in (4, 8)] == [0x2000, 0x3000]
    assert read(extended[0x1B] + 4, 2) >> 8 & 0x1F == 20, "bits of a PASID"
    assert read(extended[0x13] + 8, 4) == 512, "page requests outstanding"
    assert read(0x3D, 1) == 0, "no INTx"


WRITES = st.lists(
    st.tuples(
        st.sampled_from([*range(0x60), *range(0x80, 0x90), *range(0x100, 0x130)]), st.binary(max_size=8)
    ),
    max_size=12,
)


def by_the_manual(before: bytes, at: int, data: bytes) -> bytes:
    """Bit by bit; what a write makes happen besides is not looked at here."""
    after = bytearray(before)
    for n, byte in enumerate(data, at):
        for bit in (1 << k for k in range(8)):
            if config_decoder.dump(READ_WRITE, SIZE)[n] & bit:
                after[n] = after[n] & ~bit | byte & bit
            elif config_decoder.dump(CLEARED_BY_ONE, SIZE)[n] & bit and byte & bit:
                after[n] &= ~bit
    return bytes(after)


def keeps_to_the_manual(config: RegisterFile, writes: list[tuple[int, bytes]]) -> bool:
    """After each write."""
    config.store("Status", 0xF910)  # something to clear
    config.store("Device Status", 0x000F)
    expected = config.read(0, SIZE)
    for at, data in writes:
        config.write(at, data)
        expected = by_the_manual(expected, at, data)
        if config.read(0, SIZE) != expected:
            return False
    return True


@given(WRITES)
def test_a_write_changes_the_bits_the_manual_lets_it_change(writes: list[tuple[int, bytes]]) -> None:
    assert keeps_to_the_manual(fresh(), writes)


def replace(row: RegisterRow, masks: dict[str, int]) -> RegisterRow:
    return RegisterRow(row.name, row.at, row.size, row.reset, **{"rw": row.rw, "rw1c": row.rw1c, **masks})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Status", {"rw1c": 0}),
        ("Status", {"rw1c": 0, "rw": 0xF900}),
        ("Command", {"rw": 0xFFFF}),
        ("BAR 0", {"rw": 0xFFFF8000}),
        ("PASID Control", {"rw": 7}),
        ("Device Status", {"rw1c": 0x0E}),
    ],
)
def test_a_mask_that_is_wrong_is_found(name: str, change: dict[str, int]) -> None:
    right = fresh()
    rows = [replace(row, change) if row.name == name else row for row in right.by_name.values()]
    everywhere = [(at, b"\xff") for at in range(0x140)] + [(at, b"\0") for at in range(0x140)]
    assert keeps_to_the_manual(right, everywhere)
    assert not keeps_to_the_manual(RegisterFile(SIZE, rows), everywhere)


def test_what_acts_reads_zero_and_is_told_once() -> None:
    config = fresh()
    assert config.write(0x48, b"\x10\xa8") == {"Device Control": 0x8000}
    assert config.read(0x48, 2) == b"\x10\x28"
    assert config.write(0x49, b"\x80") == {"Device Control": 0x8000}, "a byte write reaches it too"
    assert config.write(0x48, b"\x10") == {}


def test_after_reset_every_byte_is_what_it_was() -> None:
    config = fresh()
    config.write(0, b"\xff" * SIZE)
    config.reset()
    assert config.read(0, SIZE) == config_decoder.dump(OUT_OF_RESET, SIZE)


@pytest.mark.parametrize(
    "rows",
    [
        [RegisterRow("a", 0, 4, 0), RegisterRow("b", 2, 4, 0)],
        [RegisterRow("a", 6, 4, 0)],
        [RegisterRow("a", 0, 4, 0, rw=3, rw1c=2)],
        [RegisterRow("a", 0, 4, 0, rw=1, acts=1)],
        [RegisterRow("a", 0, 4, 1, acts=1)],
    ],
)
def test_rows_that_contradict_each_other_are_not_made(rows: list[RegisterRow]) -> None:
    with pytest.raises(AssertionError, match=r"overlaps|ends at|two kinds|reads zero"):
        RegisterFile(8, rows)
