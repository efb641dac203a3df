"""A DSA on the silicon of these tests: registers written and descriptors packed as literal bytes."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import NamedTuple

from device_sim.core.dsa import registers
from device_sim.core.dsa.device import Dsa
from tests.kit.silicon import Silicon

PAGE = 4096
NOOP, BATCH, DRAIN, MEMMOVE, FILL, COMPARE, COMPVAL = 0, 1, 2, 3, 4, 5, 6
CR_DELTA, AP_DELTA, DUALCAST, TRANSL_FETCH, CRCGEN, COPY_CRC, CFLUSH = 7, 8, 9, 10, 0x10, 0x11, 0x20
FENCE, BOF, CRAV, RCR, RCI, CR = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 7
RECORD = 0x10_0000  # page 256, frame 1000
RECORD_FRAME = 1000
SRC, DST, THIRD = 0x20_0000, 0x30_0000, 0x40_0000
SRC_FRAME, DST_FRAME, THIRD_FRAME = 10, 20, 60

GENCTRL, INTCAUSE, CMD, CMDSTS, SWERR, GRPCFG, WQCFG = 0x88, 0x98, 0xA0, 0xA8, 0xC0, 0x400, 0x500
ENABLE_DEVICE, DISABLE_DEVICE, DRAIN_ALL, ABORT_ALL, RESET_DEVICE = 1, 2, 3, 4, 5
ENABLE_WQ, DISABLE_WQ, DRAIN_WQ, ABORT_WQ, RESET_WQ = 6, 7, 8, 9, 10


def work(
    opcode: int,
    flags: int,
    *,
    src: int = 0,
    dst: int = 0,
    size: int = 0,
    record: int | None = None,
    handle: int = 0,
    dword0: int = 0,
    specific: bytes = b"",
) -> bytes:
    """`record`: by default where records lie, if the flags say that there is one."""
    if record is None:
        record = RECORD if flags & CRAV else 0
    raw = struct.pack("<IIQQQIHH", dword0, flags | opcode << 24, record, src, dst, size, handle, 0)
    return raw + specific.ljust(24, b"\0")


class Record(NamedTuple):
    """A completion record as software reads it; what follows is the operation's own."""

    status: int
    write: bool
    bytes_completed: int
    fault_addr: int
    result: int = 0
    specific: bytes = bytes(16)


class Accelerator:
    """A DSA whose queue 0 is enabled, in a group with all engines; the page of records is mapped."""

    def __init__(
        self,
        *,
        size: int = 16,
        dedicated: bool = True,
        block: bool = True,
        records: bool = True,
        max_xfer: int = 21,
        max_batch: int = 10,
        threshold: int = 0,
    ) -> None:
        self.silicon = Silicon()
        self.silicon.attach()
        self.interrupts: list[int] = []
        self.dsa = Dsa(self.silicon.function, self.silicon.flows.spawn, self.interrupts.append)
        self.counters = self.dsa.counters
        self.configure(
            0,
            size,
            dedicated=dedicated,
            block=block,
            max_xfer=max_xfer,
            max_batch=max_batch,
            threshold=threshold,
        )
        self.group(0, queues=1, engines=0xF)
        assert self.command(ENABLE_DEVICE) == 0
        assert self.command(ENABLE_WQ, 0) == 0
        if records:
            self.silicon.map(RECORD >> 12, RECORD_FRAME)

    def data_alone(self) -> Accelerator:
        """It asks neither for batch lists and read-backs nor for completion records."""
        self.silicon.function.traits = replace(self.silicon.function.traits, control_faults=False)
        return self

    # -- registers -------------------------------------------------------------------------------------

    def configure(
        self,
        wq: int,
        size: int,
        *,
        dedicated: bool = True,
        block: bool = True,
        max_xfer: int = 21,
        max_batch: int = 10,
        threshold: int = 0,
        pasid_enable: bool = False,
    ) -> None:
        mode = dedicated | block << 1 | pasid_enable << 28
        dwords = (size, threshold or size, mode, max_xfer | max_batch << 5)
        for n, dword in enumerate(dwords):
            self.store(WQCFG + 32 * wq + 4 * n, dword)

    def group(self, number: int, *, queues: int, engines: int) -> None:
        self.store(GRPCFG + 64 * number, queues, 8)
        self.store(GRPCFG + 64 * number + 32, engines, 8)

    def store(self, offset: int, value: int, size: int = 4) -> None:
        registers.write(self.dsa, offset, value.to_bytes(size, "little"))
        self.silicon.flows.run_ready()

    def load(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(registers.read(self.dsa, offset, size), "little")

    def command(self, command: int, operand: int = 0, *, interrupt: bool = False) -> int:
        """The error of a command that ends at once; -1: it is still active."""
        self.store(CMD, operand | command << 20 | interrupt << 31)
        status = self.load(CMDSTS)
        return -1 if status >> 31 else status & 0xFF

    def two_queues(self, *, engines: tuple[int, int] = (0b0001, 0b0010), block: bool = True) -> None:
        """Start over: queues 0 and 1, each in a group of its own with these engines."""
        assert self.command(RESET_DEVICE) == 0
        for n in (0, 1):
            self.configure(n, 16, block=block)
            self.group(n, queues=1 << n, engines=engines[n])
        assert self.command(ENABLE_DEVICE) == 0
        assert [self.command(ENABLE_WQ, n) for n in (0, 1)] == [0, 0]

    # -- descriptors -----------------------------------------------------------------------------------

    def submit(self, raw: bytes, wq: int = 0) -> None:
        self.dsa.movdir64b(wq, raw)
        self.silicon.flows.run_ready()

    def enqcmd(self, raw: bytes, wq: int = 0, *, limited: bool = True) -> bool:
        retry = self.dsa.enqcmd(wq, raw, limited=limited)
        self.silicon.flows.run_ready()
        return retry

    def map(self, iova: int, frame: int, pages: int = 1, *, rights: int = 7) -> None:
        for n in range(pages):
            self.silicon.map((iova >> 12) + n, frame + n, rights=rights)

    def put(self, frame: int, data: bytes, offset: int = 0) -> None:
        self.silicon.fill_frame(frame, data, offset)

    def bytes_of(self, frame: int, size: int = PAGE, offset: int = 0) -> bytes:
        return self.silicon.bytes_of(frame, size, offset)

    def raw_record(self, slot: int = 0) -> bytes:
        return self.silicon.bytes_of(RECORD_FRAME, 32, 32 * slot)

    def record(self, slot: int = 0) -> Record:
        raw = self.raw_record(slot)
        status, result, info, zero, completed, addr = struct.unpack("<BBBBIQ16x", raw)
        assert (info, zero) == (0, 0)
        return Record(status & 0x7F, bool(status & 0x80), completed, addr, result, raw[16:])

    def run(self, raw: bytes) -> Record:
        """Submit, and the record of what ended at once."""
        self.put(RECORD_FRAME, bytes(PAGE))
        self.submit(raw)
        return self.record()

    @property
    def statuses(self) -> dict[int, int]:
        return {int(status): n for status, n in self.counters.statuses.items()}

    @property
    def software_error(self) -> bytes:
        return registers.read(self.dsa, SWERR, 32)


def pattern(size: int, seed: int = 0) -> bytes:
    return bytes((i * 7 + i // 251 + seed) % 256 for i in range(size))
