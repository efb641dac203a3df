"""`python -m tests.vfio_user.serve_copying PATH`: a DSA as small as the kernel's idxd will have it.

One queue, one group, one engine, commands that succeed, and memory moves by the files of the client's
windows: there is no model and no translation behind it.  It is the front's other side in a test with a real
driver, and tells the front's mistakes from those of a device_sim.  Ends as serve_plain does, and prints what
it was given:

    {"commands": 4, "moves": 10, "blocking": 10, "bytes": 30720}
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import trio

from protocol.hw.dsa import WORK_DESCRIPTOR_SIZE, Descriptor, Flag, Opcode, Status
from protocol.hw.dsa_regs import (
    GRPCFG_TABLE,
    MISC_VECTOR,
    TABLE_UNIT,
    VERSION_1,
    WQCFG_BYTES,
    WQCFG_TABLE,
    Cause,
    Command,
    CommandWord,
    DsaReg,
    GenCap,
    State,
    WqCap,
    WqCfg,
    WqState,
)
from tests.kit.vfio_user_dsa import PlainSilicon
from tests.vfio_user.serve_plain import serve
from vfio_user.core.pci.dsa import PERMISSIONS_AT, dsa_endpoint

GRPCFG_AT = 0x400
WQCFG_AT = 0x500
PERMISSION_TABLE_SHIFT = 32  # in OFFSETS, as those before it in TABLE_UNIT
OPERATIONS = (Opcode.NOOP, Opcode.BATCH, Opcode.DRAIN, Opcode.MEMMOVE)
STORE_BYTES = 8  # of the eight that a MOVDIR64B becomes

STATES = {
    Command.ENABLE_DEVICE: State.ENABLED,
    Command.DISABLE_DEVICE: State.DISABLED,
    Command.RESET_DEVICE: State.DISABLED,
}
QUEUE_STATES = {
    Command.ENABLE_WQ: WqState.ENABLED,
    **dict.fromkeys((Command.DISABLE_WQ, Command.RESET_WQ), WqState.DISABLED),
    **dict.fromkeys((Command.DISABLE_DEVICE, Command.RESET_DEVICE), WqState.DISABLED),
}


class CopyingSilicon(PlainSilicon):
    def __init__(self) -> None:
        super().__init__()
        self.endpoint = dsa_endpoint(self)
        self.seen = {"commands": 0, "moves": 0, "blocking": 0, "bytes": 0}
        self._descriptor = bytearray()
        self._power_on()

    def _power_on(self) -> None:
        for memory in self.bars.values():
            memory[:] = bytes(len(memory))
        self._descriptor.clear()
        caps = GenCap(block_on_fault=True, max_xfer_shift=21, max_batch_shift=4, config_en=True)
        queues = WqCap(total_wq_size=16, num_wqs=1, dedicated_mode=True, wq_ats_support=True, priority=True)
        tables = GRPCFG_TABLE.put(GRPCFG_AT // TABLE_UNIT) | WQCFG_TABLE.put(WQCFG_AT // TABLE_UNIT)
        tables |= PERMISSIONS_AT // TABLE_UNIT << PERMISSION_TABLE_SHIFT
        self._put(DsaReg.VERSION, VERSION_1.to_bytes(4, "little"))
        self._put(DsaReg.GENCAP, caps.to_bytes())
        self._put(DsaReg.WQCAP, queues.to_bytes())
        for one in (DsaReg.GRPCAP, DsaReg.ENGCAP):
            self._put(one, b"\x01")
        self._put(DsaReg.OPCAP, sum(1 << code for code in OPERATIONS).to_bytes(8, "little"))
        self._put(DsaReg.OFFSETS, tables.to_bytes(8, "little"))

    def _put(self, offset: int, data: bytes) -> None:
        self.bars[0][offset : offset + len(data)] = data

    async def reset(self) -> None:
        await super().reset()
        self._power_on()

    async def write(self, bar: int, offset: int, data: bytes) -> None:
        if bar == 2:
            self._store_to_portal(offset, data)
        elif offset == DsaReg.CMD:
            self._command(CommandWord.from_bytes(data))
        elif offset == DsaReg.INTCAUSE:
            self.bars[0][offset] &= ~data[0]
        else:
            await super().write(bar, offset, data)

    def _command(self, word: CommandWord) -> None:
        """Done, at once."""
        self.seen["commands"] += 1
        command = Command(word.command)
        if command in STATES:
            self.bars[0][DsaReg.GENSTS] = STATES[command]
        if command in QUEUE_STATES:
            raw = bytes(self.bars[0][WQCFG_AT : WQCFG_AT + WQCFG_BYTES])
            self._put(WQCFG_AT, replace(WqCfg.from_bytes(raw), state=QUEUE_STATES[command]).to_bytes())
        self._put(DsaReg.CMDSTS, bytes(4))
        if word.interrupt:
            self.bars[0][DsaReg.INTCAUSE] |= Cause.CMD
            self.endpoint.msix.raise_vector(MISC_VECTOR)

    def _store_to_portal(self, offset: int, data: bytes) -> None:
        """Eight in order are one descriptor."""
        assert len(data) == STORE_BYTES, f"{len(data)} bytes at {offset:#x} of a portal"
        assert offset % WORK_DESCRIPTOR_SIZE == len(self._descriptor), "the eight came in order"
        self._descriptor += data
        if len(self._descriptor) == WORK_DESCRIPTOR_SIZE:
            descriptor = Descriptor.from_bytes(bytes(self._descriptor))
            self._descriptor.clear()
            self._execute(descriptor)

    def _execute(self, descriptor: Descriptor) -> None:
        assert descriptor.opcode in (Opcode.NOOP, Opcode.MEMMOVE), f"{descriptor} of a kernel's dmaengine"
        if descriptor.opcode == Opcode.MEMMOVE:
            self._store(descriptor.dst, self._load(descriptor.src, descriptor.size))
            self.seen["moves"] += 1
            self.seen["bytes"] += descriptor.size
            self.seen["blocking"] += Flag.BOF in descriptor.flags
        if Flag.CRAV in descriptor.flags:
            self._store(descriptor.completion_addr, bytes([Status.SUCCESS]))
        if Flag.RCI in descriptor.flags:
            self.endpoint.msix.raise_vector(descriptor.int_handle)

    def _place(self, iova: int, size: int) -> tuple[int, int]:
        """The file, and where in it."""
        for window in self.windows:
            if window.start <= iova and iova + size <= window.end and window.fd is not None:
                return window.fd, window.offset + iova - window.start
        raise AssertionError(f"no window of the client's has {size} bytes at {iova:#x}")

    def _load(self, iova: int, size: int) -> bytes:
        fd, at = self._place(iova, size)
        return os.pread(fd, size, at)

    def _store(self, iova: int, data: bytes) -> None:
        fd, at = self._place(iova, len(data))
        assert os.pwrite(fd, data, at) == len(data)


if __name__ == "__main__":
    silicon = CopyingSilicon()
    status = trio.run(serve, Path(sys.argv[1]), silicon)
    print(json.dumps(silicon.seen))
    sys.exit(status)
