"""Primary fault logging: the fault recording registers of a unit, and the fault event.

Models [VT-d 7.3]: registers are used in turn; one whose F software has not cleared yet means overflow (PFO),
and nothing is recorded until PFO is cleared.  PPF is the sum of all F, FRI the first of them.
Must hold: a record is whole before its F shows, and F shows before PPF.
"""

from __future__ import annotations

from device_sim.core.unit_registers import RegisterSet
from protocol.hw.caps import Cap
from protocol.hw.faults import FAULT_RECORD_SIZE, FaultRecord
from protocol.hw.vtd_regs import FSTS_FRI, Fsts, Reg


class FaultRecording:
    def __init__(self, cap: Cap, registers: RegisterSet) -> None:
        self.recorded = 0
        self.lost = 0
        self._registers = registers
        self._places = [cap.fro + n * FAULT_RECORD_SIZE for n in range(cap.nfr)]
        self._next = 0

    def record(self, record: FaultRecord) -> None:
        registers = self._registers
        registers.take_clears(Reg.FSTS)
        place = self._places[self._next]
        if registers.shown(Reg.FSTS) & Fsts.PFO or registers.has_fault(place):
            self.lost += 1
            registers.raise_status(Reg.FSTS, Fsts.PFO)
            return
        self.recorded += 1
        raw = record.to_bytes()
        registers.show_fault(place, int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))
        if not registers.shown(Reg.FSTS) & Fsts.PPF:
            self._show_first(self._next)
        self._next = (self._next + 1) % len(self._places)
        registers.raise_status(Reg.FSTS, Fsts.PPF)

    def take_clears(self) -> None:
        """Software has cleared F of some records: what is left is reported once more."""
        registers = self._registers
        if not registers.shown(Reg.FSTS) & Fsts.PPF:
            return
        left = [n for n in self._in_turn() if registers.has_fault(self._places[n])]
        fsts = registers.shown(Reg.FSTS)
        if not left:
            registers.lower_status(Reg.FSTS, Fsts.PPF)
        elif left[0] != FSTS_FRI.get(fsts):
            self._show_first(left[0])
            registers.send_event(Reg.FSTS)

    def _in_turn(self) -> list[int]:
        """The oldest first."""
        count = len(self._places)
        return [(self._next + n) % count for n in range(count)]

    def _show_first(self, index: int) -> None:
        fsts = self._registers.shown(Reg.FSTS)
        self._registers.show(Reg.FSTS, fsts & ~FSTS_FRI.mask | FSTS_FRI.put(index))

    def reset(self) -> None:
        self._next = 0
