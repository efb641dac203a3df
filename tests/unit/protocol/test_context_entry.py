"""Root, context and PASID directory entries against words worked by hand from their tables [VT-d 9.1]."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.hw.context_entry import (
    ContextEntry,
    Entry,
    PasidDirEntry,
    RootEntry,
    context_index,
    pasid_index,
    root_index,
)
from protocol.hw.fields import FormatError
from protocol.units import Hpa, Pasid

TABLE, OTHER = Hpa(0x2000_1234_5000), Hpa(0x2000_0000_7000)
ROOT = RootEntry(lower_present=True, lower=TABLE, upper_present=True, upper=OTHER)
CONTEXT = ContextEntry(present=True, dte=True, paside=True, pre=True, pasid_dir=TABLE)
DIRECTORY = PasidDirEntry(present=True, pasid_table=TABLE)
WORDS: list[tuple[Entry, list[int]]] = [
    (RootEntry(), [0, 0]),
    (RootEntry(lower_present=True, lower=TABLE), [0x2000_1234_5001, 0]),
    (RootEntry(upper_present=True, upper=TABLE), [0, 0x2000_1234_5001]),
    (ROOT, [0x2000_1234_5001, 0x2000_0000_7001]),
    (ContextEntry(), [0, 0, 0, 0]),
    (ContextEntry(present=True), [1, 0, 0, 0]),
    (ContextEntry(fpd=True), [2, 0, 0, 0]),
    (ContextEntry(dte=True), [4, 0, 0, 0]),
    (ContextEntry(paside=True), [8, 0, 0, 0]),
    (ContextEntry(pre=True), [0x10, 0, 0, 0]),
    (ContextEntry(pdts=7), [0xE00, 0, 0, 0]),
    (ContextEntry(rid_pasid=Pasid(0xABCDE)), [0, 0xABCDE, 0, 0]),
    (ContextEntry(rid_priv=True), [0, 1 << 20, 0, 0]),
    (CONTEXT, [0x2000_1234_501D, 0, 0, 0]),
    (PasidDirEntry(), [0]),
    (PasidDirEntry(present=True, fpd=True), [3]),
    (DIRECTORY, [0x2000_1234_5001]),
]
RESERVED = [
    *((ROOT, n) for n in (1, 11, 65, 75)),
    *((CONTEXT, n) for n in (5, 8, 85, 127, 128, 255)),
    *((DIRECTORY, n) for n in (2, 11)),
]


@pytest.mark.parametrize(("entry", "words"), WORDS)
def test_an_entry_has_the_bits_of_the_table(entry: Entry, words: list[int]) -> None:
    assert entry.words() == words
    assert type(entry).from_words(words) == entry


@pytest.mark.parametrize(("entry", "n"), RESERVED)
def test_a_reserved_bit_of_a_present_entry_is_a_format_error(entry: Entry, n: int) -> None:
    words = entry.words()
    words[n // 64] |= 1 << n % 64
    with pytest.raises(FormatError, match=f"reserved bits {1 << n:#x} are set"):
        type(entry).from_words(words)


def test_half_a_root_entry_is_enough_to_judge_all_of_it() -> None:
    with pytest.raises(FormatError):
        RootEntry.from_words([0x2000_1234_5001, 0x2])


@given(st.sampled_from([RootEntry, ContextEntry, PasidDirEntry]), st.data())
def test_an_entry_that_is_not_present_may_hold_anything(kind: type[Entry], data: st.DataObject) -> None:
    words = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=kind.SIZE // 8, max_size=kind.SIZE // 8))
    absent = [word & ~(kind.P >> 64 * n & 1) for n, word in enumerate(words)]
    kind.from_words(absent)


@pytest.mark.parametrize("pdts", range(8))
def test_a_directory_has_two_to_the_pdts_plus_7_entries(pdts: int) -> None:
    assert replace(CONTEXT, pdts=pdts).directory_entries == 2 ** (pdts + 7)


@pytest.mark.parametrize(
    ("rid", "bus", "upper", "index"),
    [(0x0000, 0, False, 0), (0x6A08, 0x6A, False, 8), (0x6A7F, 0x6A, False, 127), (0xFFFF, 255, True, 127)],
)
def test_a_requester_id_is_a_bus_and_half_a_bus_of_functions(
    rid: int, bus: int, upper: bool, index: int
) -> None:
    assert root_index(rid) == bus
    assert context_index(rid) == (upper, index)


@pytest.mark.parametrize(
    ("pasid", "where"), [(0, (0, 0)), (63, (0, 63)), (64, (1, 0)), (0xFFFFF, (0x3FFF, 63))]
)
def test_a_pasid_is_an_index_of_the_directory_and_one_of_its_table(
    pasid: int, where: tuple[int, int]
) -> None:
    assert pasid_index(pasid) == where
