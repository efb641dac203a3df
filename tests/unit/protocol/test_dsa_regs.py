"""DSA registers against words worked by hand from their tables [DSA 9], [idxd registers.h]."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.hw.dsa_regs import (
    Cause,
    Command,
    CommandError,
    CommandStatus,
    CommandWord,
    DsaReg,
    GenCap,
    Register,
    SoftwareError,
    WqCap,
    WqCfg,
    WqState,
)
from protocol.hw.fields import FormatError
from protocol.units import Iova, Pasid


@pytest.mark.parametrize(
    ("register", "word"),
    [
        (GenCap(), 0),
        (GenCap(block_on_fault=True, overlap_copy=True), 0b11),
        (GenCap(cache_control_mem=True, cache_control_cache=True, cmd_cap=True), 0b1_1100),
        (GenCap(dest_readback=True, drain_readback=True), 0x300),
        (GenCap(evl_support=3, batch_continuation=True), 0xE000),
        (GenCap(max_xfer_shift=31, max_batch_shift=10, max_ims_mult=8), 31 << 16 | 10 << 21 | 8 << 25),
        (GenCap(config_en=True), 1 << 31),
        (WqCap(total_wq_size=128, num_wqs=8), 0x8_0080),
        (WqCap(total_wq_size=0, num_wqs=0, wqcfg_size=15), 15 << 24),
        (WqCap(total_wq_size=0, num_wqs=0, shared_mode=True, dedicated_mode=True), 3 << 48),
        (
            WqCap(
                total_wq_size=0,
                num_wqs=0,
                wq_ats_support=True,
                priority=True,
                occupancy=True,
                op_config=True,
                wq_prs_support=True,
            ),
            1 << 50 | 1 << 51 | 1 << 52 | 1 << 54 | 1 << 55,
        ),
        (CommandWord(command=6, operand=0x12345, interrupt=True), 0x12345 | 6 << 20 | 1 << 31),
        (CommandStatus(error=CommandError.DIS_DEV_EN, result=0xABCD, active=True), 0x80AB_CD31),
        (WqCfg(size=0x1234, threshold=0x5678), 0x5678_0000_1234),
        (WqCfg(dedicated=True, block_on_fault=True, ats_disable=True, prs_disable=True), 0xF << 64),
        (WqCfg(priority=10, pasid=Pasid(0xABCDE), pasid_enable=True, priv=True), 0x3ABCDEA0 << 64),
        (WqCfg(max_xfer_shift=21, max_batch_shift=5), (21 | 5 << 5) << 96),
        (WqCfg(occupancy=7, state=WqState.BUSY), (7 | 2 << 30) << 192),
        (SoftwareError(valid=True, overflow=True, desc_valid=True, wq_idx_valid=True), 0xF),
        (SoftwareError(batch=True, fault_rw=True, priv=True, error=0x1A, wq_idx=5), 0x05_1A70),
        (SoftwareError(operation=0x20, pasid=Pasid(0xABCDE)), 0x0ABC_DE20 << 32),
        (SoftwareError(batch_idx=0x1234, invalid_flags=0x89AB_CDEF), 0x89AB_CDEF_0000_1234 << 64),
        (SoftwareError(fault_addr=Iova(0x7F00_0000_3000)), 0x7F00_0000_3000 << 128),
    ],
)
def test_a_register_has_the_bits_of_its_table(register: Register, word: int) -> None:
    assert int.from_bytes(register.to_bytes(), "little") == word
    assert type(register).from_bytes(register.to_bytes()) == register


def test_sizes_and_offsets() -> None:
    sizes = {kind: kind.SIZE for kind in (GenCap, WqCap, WqCfg, CommandWord, CommandStatus, SoftwareError)}
    assert list(sizes.values()) == [8, 8, 32, 4, 4, 32]
    assert [int(reg) for reg in DsaReg] == [
        *(0, 0x10, 0x20, 0x30, 0x38, 0x40, 0x60, 0x80, 0x88, 0x90, 0x98, 0xA0, 0xA8, 0xB0, 0xC0),
    ]
    assert [int(command) for command in Command] == list(range(1, 15))
    assert (Cause.SWERR, Cause.CMD) == (1, 2)


@given(st.binary(min_size=32, max_size=32))
def test_reserved_bits_of_a_register_are_ignored(raw: bytes) -> None:
    error = SoftwareError.from_bytes(raw)
    assert SoftwareError.from_bytes(error.to_bytes()) == error
    assert int.from_bytes(error.to_bytes(), "little") & ~int.from_bytes(raw, "little") == 0


def test_a_number_without_meaning_is_a_format_error() -> None:
    with pytest.raises(FormatError):
        CommandStatus.from_bytes(b"\x04\0\0\0")
    with pytest.raises(FormatError):
        WqCfg.from_bytes(bytes(27) + b"\xc0" + bytes(4))
    with pytest.raises(FormatError):
        GenCap.from_bytes(bytes(7))


def test_a_value_of_ours_that_does_not_fit_is_an_assertion() -> None:
    assert {field.name for field in fields(WqCfg)} == WqCfg.LAYOUT.keys()
    for bad in (replace(WqCfg(), size=1 << 16), replace(WqCfg(), max_batch_shift=16)):
        with pytest.raises(AssertionError, match="does not fit"):
            bad.to_bytes()
