"""What is left of a faulted descriptor, opcode by opcode, as the bytes that are submitted."""

from __future__ import annotations

import struct

import pytest

from protocol.hw.dsa import CompletionRecord, Descriptor, Flag, Opcode, Status
from qemu_shim.guest.resume import rest_of

DONE = 0x1003
WORD = int.from_bytes(bytes(range(1, 9)), "little")
TURNED = int.from_bytes(bytes([4, 5, 6, 7, 8, 1, 2, 3]), "little")  # DONE % 8 == 3 bytes on


def faulted(*, result: int = 0, done: int = DONE, specific: bytes = b"") -> CompletionRecord:
    return CompletionRecord(
        status=Status.PAGE_FAULT_NOBOF,
        result=result,
        bytes_completed=done,
        op_specific=specific.ljust(16, b"\0"),
    )


@pytest.mark.parametrize(
    ("opcode", "before", "after"),
    [
        (Opcode.MEMMOVE, (0x5000, 0x9000), (0x6003, 0xA003)),
        (Opcode.COMPARE, (0x5000, 0x9000), (0x6003, 0xA003)),
        (Opcode.COPY_CRC, (0x5000, 0x9000), (0x6003, 0xA003)),
        (Opcode.CRCGEN, (0x5000, 0), (0x6003, 0)),
        (Opcode.CFLUSH, (0, 0x9000), (0, 0xA003)),
        (Opcode.MEMFILL, (WORD, 0x9000), (TURNED, 0xA003)),
        (Opcode.COMPVAL, (0x5000, WORD), (0x6003, TURNED)),
    ],
)
def test_addresses_move_on_and_patterns_turn(
    opcode: Opcode, before: tuple[int, int], after: tuple[int, int]
) -> None:
    whole = Descriptor(opcode=opcode, src=before[0], dst=before[1], size=0x4000)
    rest = rest_of(whole, faulted())
    assert (rest.src, rest.dst, rest.size) == (*after, 0x4000 - DONE)


def test_the_second_target_of_a_dualcast_moves_as_well() -> None:
    whole = Descriptor(
        opcode=Opcode.DUALCAST, src=1, dst=2, size=0x4000, op_specific=struct.pack("<QQQ", 0x10, 7, 9)
    )
    assert rest_of(whole, faulted()).op_specific == struct.pack("<QQQ", 0x10 + DONE, 7, 9)


def test_a_crc_goes_on_from_the_one_told_and_reads_no_seed_again() -> None:
    operands = struct.pack("<IIQQ", 1, 0, 0x9000, 0)
    whole = Descriptor(opcode=Opcode.CRCGEN, flags=Flag(3 << 16), size=0x4000, op_specific=operands)
    rest = rest_of(whole, faulted(specific=struct.pack("<Q", 0xCAFE_F00D)))
    assert struct.unpack_from("<I", rest.op_specific) == (0xCAFE_F00D,)
    assert int(rest.flags) == 1 << 17
    assert rest_of(whole, faulted(done=0)) == whole, "the seed itself may be what faulted"


@pytest.mark.parametrize("opcode", [Opcode.CR_DELTA, Opcode.AP_DELTA, Opcode.NOOP])
def test_delta_records_are_begun_again(opcode: Opcode) -> None:
    whole = Descriptor(opcode=opcode, src=0x5000, dst=0x9000, size=0x4000)
    assert rest_of(whole, faulted(done=40)) == whole


def test_a_batch_goes_on_behind_the_descriptors_that_ran() -> None:
    whole = Descriptor(opcode=Opcode.BATCH, src=0x5000, size=20)
    rest = rest_of(whole, faulted(done=3))
    assert (rest.src, rest.size) == (0x5000 + 3 * 64, 17)
