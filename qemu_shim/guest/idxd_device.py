"""The guest's DSA driver: the device's registers and commands.

Models how the kernel's idxd brings a device up [idxd device.c]: it reads what there is, writes queues and
groups while the device is disabled, and gives commands one at a time, sleeping until the device's own
interrupt says that one is done.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

from protocol.errors import UapiError
from protocol.hw.dsa_regs import (
    GENCTRL_SWERR_INT,
    GRPCFG_BYTES,
    GRPCFG_TABLE,
    GRPCFG_WQS_BYTES,
    MISC_VECTOR,
    TABLE_UNIT,
    WQCFG_BYTES,
    WQCFG_TABLE,
    Command,
    CommandError,
    CommandStatus,
    CommandWord,
    DsaReg,
    GenCap,
    SoftwareError,
    State,
    WqCap,
    WqCfg,
)
from protocol.hw.fields import Field

_DWORD = 4


class DsaPortal(Protocol):
    """The device's BARs, mapped into the guest."""

    async def mmio_read(self, offset: int, size: int) -> bytes: ...
    def mmio_write(self, offset: int, data: bytes) -> None: ...
    def movdir64b(self, wq: int, descriptor: bytes) -> None: ...
    async def enqcmd(self, wq: int, descriptor: bytes) -> bool: ...
    async def wait_interrupt(self, handle: int) -> None: ...


class IdxdDevice:
    """The device behind a portal.  One command at a time: the register has no queue."""

    def __init__(self, portal: DsaPortal) -> None:
        self._portal = portal

    async def capabilities(self) -> tuple[GenCap, WqCap]:
        read = self._portal.mmio_read
        return GenCap.from_bytes(await read(DsaReg.GENCAP, GenCap.SIZE)), WqCap.from_bytes(
            await read(DsaReg.WQCAP, WqCap.SIZE)
        )

    async def state(self) -> State:
        return State(int.from_bytes(await self._portal.mmio_read(DsaReg.GENSTS, _DWORD), "little"))

    async def set_up(self, groups: Sequence[Sequence[WqCfg | None]]) -> None:
        """Enable the device with these groups; the queues are numbered through, None leaves a number out.

        The engines are dealt out in turn.
        """
        engines = int.from_bytes(await self._portal.mmio_read(DsaReg.ENGCAP, 8), "little")
        at, number = await self._table(GRPCFG_TABLE), 0
        for index, queues in enumerate(groups):
            mask = 0
            for config in queues:
                if config is not None:
                    await self.write_queue(number, config)
                    mask |= 1 << number
                number += 1
            own = sum(1 << engine for engine in range(index, engines, len(groups)))
            self._portal.mmio_write(at + index * GRPCFG_BYTES, mask.to_bytes(8, "little"))
            self._portal.mmio_write(at + index * GRPCFG_BYTES + GRPCFG_WQS_BYTES, own.to_bytes(8, "little"))
        self._portal.mmio_write(DsaReg.GENCTRL, GENCTRL_SWERR_INT.to_bytes(_DWORD, "little"))
        await self.command(Command.ENABLE_DEVICE)

    async def write_queue(self, number: int, config: WqCfg) -> None:
        at, raw = await self._table(WQCFG_TABLE) + number * WQCFG_BYTES, config.to_bytes()
        for offset in range(0, len(raw), _DWORD):
            self._portal.mmio_write(at + offset, raw[offset : offset + _DWORD])

    async def command(self, command: Command, operand: int = 0) -> None:
        """Sleep until it is done; ENXIO with the error if it failed."""
        word = CommandWord(command=command, operand=operand, interrupt=True)
        self._portal.mmio_write(DsaReg.CMD, word.to_bytes())
        while True:
            # The vector is also that of software errors.
            await self._portal.wait_interrupt(MISC_VECTOR)
            status = CommandStatus.from_bytes(await self._portal.mmio_read(DsaReg.CMDSTS, CommandStatus.SIZE))
            if not status.active:
                break
        if status.error is not CommandError.SUCCESS:
            raise UapiError(errno.ENXIO, f"DSA command {command.name} {operand:#x}: {status.error.name}")

    async def take_software_error(self) -> SoftwareError:
        """Read the register and make room for the next error."""
        error = SoftwareError.from_bytes(await self._portal.mmio_read(DsaReg.SWERR, SoftwareError.SIZE))
        if error.valid:
            ack = SoftwareError(valid=True, overflow=True).to_bytes()
            self._portal.mmio_write(DsaReg.SWERR, ack[:8])
        return error

    async def _table(self, which: Field) -> int:
        offsets = int.from_bytes(await self._portal.mmio_read(DsaReg.OFFSETS, 16), "little")
        return which.get(offsets) * TABLE_UNIT
