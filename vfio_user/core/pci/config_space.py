"""Config space of an endpoint as rows of registers: the type 0 header, BARs, and two chains of capabilities.

Models [PCIe 7.5.1] and [PCIe 7.6]: a BAR's size is what its RW bits leave out, so software that writes ones
reads it back; capabilities are linked by offsets, extended ones from 0x100 on.  Must hold: a function whose
interrupts are MSI-X alone has Interrupt Pin 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from protocol.units import bit, bits
from vfio_user.core.pci.registers import RegisterFile, RegisterRow

CONFIG_BYTES: Final = 4096
FIRST_EXTENDED: Final = 0x100
BAR_64BIT: Final = 0b100
BAR_PREFETCHABLE: Final = 0b1000
_DWORD: Final = bits(31, 0)

COMMAND_MEMORY: Final = bit(1)
COMMAND_BUS_MASTER: Final = bit(2)
_COMMAND_RW: Final = COMMAND_MEMORY | COMMAND_BUS_MASTER | bit(6) | bit(8) | bit(10)  # parity, SERR, INTx off
_STATUS_CAPABILITIES: Final = bit(4)
_STATUS_RW1C: Final = bit(8) | bits(15, 11)


class Identity(NamedTuple):
    """`class_code`: base class, subclass and interface, from the top."""

    vendor: int
    device: int
    class_code: int
    subsystem_vendor: int
    subsystem: int


class Capability(NamedTuple):
    """`version`: of an extended one; None in the first chain.  Its registers lie behind its header, `at`
    counted from it.
    """

    name: str
    number: int
    at: int
    registers: tuple[RegisterRow, ...]
    version: int | None = None


def header(identity: Identity, capabilities_at: int) -> list[RegisterRow]:
    return [
        RegisterRow("Vendor ID", 0x00, 2, identity.vendor),
        RegisterRow("Device ID", 0x02, 2, identity.device),
        RegisterRow("Command", 0x04, 2, 0, rw=_COMMAND_RW),
        RegisterRow("Status", 0x06, 2, _STATUS_CAPABILITIES, rw1c=_STATUS_RW1C),
        RegisterRow("Class Code", 0x09, 3, identity.class_code),
        RegisterRow("Cache Line Size", 0x0C, 1, 0, rw=0xFF),
        RegisterRow("Subsystem Vendor ID", 0x2C, 2, identity.subsystem_vendor),
        RegisterRow("Subsystem ID", 0x2E, 2, identity.subsystem),
        RegisterRow("Capabilities Pointer", 0x34, 1, capabilities_at),
        RegisterRow("Interrupt Line", 0x3C, 1, 0, rw=0xFF),
    ]


def bar_64(number: int, size: int) -> list[RegisterRow]:
    """A prefetchable 64-bit memory BAR of `size` bytes in the places of BARs `number` and `number + 1`."""
    assert size & (size - 1) == 0, f"BAR {number} of {size:#x} bytes"
    at, writable = 0x10 + 4 * number, -size & bits(63, 0)
    return [
        RegisterRow(f"BAR {number}", at, 4, BAR_64BIT | BAR_PREFETCHABLE, rw=writable & _DWORD),
        RegisterRow(f"BAR {number} upper", at + 4, 4, 0, rw=writable >> 32),
    ]


def linked(capabilities: Sequence[Capability]) -> list[RegisterRow]:
    """The headers of one chain, in this order, and what is behind them."""
    rows = []
    for each, after in zip(capabilities, (*capabilities[1:], None), strict=True):
        following = after.at if after is not None else 0
        if each.version is None:
            rows.append(RegisterRow(each.name, each.at, 2, following << 8 | each.number))
        else:
            rows.append(
                RegisterRow(each.name, each.at, 4, following << 20 | each.version << 16 | each.number)
            )
        rows += [row._replace(at=each.at + row.at) for row in each.registers]
    return rows


def config_space(
    identity: Identity,
    bars: Sequence[RegisterRow],
    capabilities: Sequence[Capability],
    extended: Sequence[Capability],
) -> RegisterFile:
    assert not extended or extended[0].at == FIRST_EXTENDED, "extended capabilities begin at 0x100"
    rows = [*header(identity, capabilities[0].at), *bars, *linked(capabilities), *linked(extended)]
    return RegisterFile(CONFIG_BYTES, rows)
