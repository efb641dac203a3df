"""MSI-X: the table, the pending bits, and when an interrupt goes out [PCIe 7.7.2].

Behind vfio-user the vectors are the client's: the guest programs QEMU's copy of the table, and QEMU says with
SET_IRQS which vector is signalled by which eventfd [QEMU hw/vfio/pci.c].  The table here is hardly ever
written, so what masks a vector is not its mask bit but that it has no eventfd (docs/decisions/0008).  A
vector raised meanwhile is pending, QEMU reads that bit here, and is signalled when it gets one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from protocol.units import bits
from vfio_user.core.function import IrqEvent
from vfio_user.core.pci.registers import RegisterFile, RegisterRow

MSIX_ENTRY_BYTES: Final = 16
_MASKED: Final = 1


def table_of(vectors: int) -> RegisterFile:
    """Addresses are whole dwords; every vector comes masked out of reset."""
    rows = []
    for n in range(vectors):
        at = n * MSIX_ENTRY_BYTES
        rows += [
            RegisterRow(f"Message Address {n}", at, 8, 0, rw=bits(63, 2)),
            RegisterRow(f"Message Data {n}", at + 8, 4, 0, rw=bits(31, 0)),
            RegisterRow(f"Vector Control {n}", at + 12, 4, _MASKED, rw=_MASKED),
        ]
    return RegisterFile(vectors * MSIX_ENTRY_BYTES, rows)


def _pending_bits(vectors: int) -> RegisterFile:
    """One a vector, in whole qwords; software only reads them."""
    size = -(-vectors // 64) * 8
    return RegisterFile(size, [RegisterRow("Pending", 0, size, 0)])


class Msix:
    def __init__(self, vectors: int) -> None:
        self.table = table_of(vectors)
        self.pending = _pending_bits(vectors)
        self._events: list[IrqEvent | None] = [None] * vectors

    @property
    def vectors(self) -> int:
        return len(self._events)

    def connect(self, start: int, events: Sequence[IrqEvent | None]) -> None:
        """A vector that is pending goes out at once."""
        self._events[start : start + len(events)] = events
        waiting = self.pending.value("Pending")
        for vector, event in enumerate(events, start):
            if event is not None and waiting >> vector & 1:
                self.raise_vector(vector)

    def raise_vector(self, vector: int) -> None:
        event, mask = self._events[vector], 1 << vector
        waiting = self.pending.value("Pending") & ~mask
        self.pending.store("Pending", waiting if event is not None else waiting | mask)
        if event is not None:
            event.signal()
