"""The fault recording registers, the driver's side.

Models dmar_fault [Linux intel/dmar.c] on [VT-d 7.3]: from the record that FSTS names on, each with F is read
and its F cleared, until one has none; PFO is cleared last.
Must hold: of a record the half with F is read first, so that the other half is of the same fault; CAP is the
unit's word, and places no record beyond its page (PeerError).
"""

from __future__ import annotations

from iommufdd.core.unit_registers import UnitRegisters
from protocol.errors import PeerError
from protocol.hw.caps import Cap
from protocol.hw.faults import FAULT_RECORD_SIZE
from protocol.hw.vtd_regs import FSTS_FRI, REGISTER_PAGE, Fsts, Reg


class FaultRecords:
    def __init__(self, registers: UnitRegisters, cap: Cap) -> None:
        self._registers = registers
        self._offset = cap.fro
        self._count = cap.nfr
        if cap.fro + cap.nfr * FAULT_RECORD_SIZE > REGISTER_PAGE:
            raise PeerError(f"{cap.nfr} fault recording registers at {cap.fro:#x}: beyond the register page")

    def take(self, fsts: int) -> list[bytes]:
        """Those not read yet, the oldest first."""
        registers = self._registers
        first = FSTS_FRI.get(fsts)
        taken = []
        for n in range(self._count):
            at = self._offset + (first + n) % self._count * FAULT_RECORD_SIZE
            high = registers.fault_word(at + 8)
            if high is None:
                break
            taken.append(registers.other_fault_word(at).to_bytes(8, "little") + high.to_bytes(8, "little"))
            registers.clear_fault(at + 8)
        registers.clear(Reg.FSTS, Fsts.PFO)
        return taken
