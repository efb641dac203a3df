"""What people call the words of shared memory and the messages that the steps of a run are about.

Of a table page the ghost knows where it is linked now, of a unit's structures its probes know where they lie,
registers have their place by the manual; what is none of these keeps its number.
"""

from __future__ import annotations

from typing import Any

from iommufdd.memory import TABLES_START
from iommufdd.unit_memory import QUEUES_START, STRUCTURES_START
from protocol.errors import PeerError
from protocol.hostmem import HIGH_RAM_START, LOW_RAM_START
from protocol.hw.vtd_regs import REGISTER_PAGE, Reg
from protocol.pt.geometry import ENTRY_BYTES
from protocol.rpc.body import decode
from protocol.rpc.session import Framer, Kind
from protocol.units import PAGE_SIZE
from simulator.ghost.probes.watch import Watch

# As the manuals call the entries of a level, 1 to 5 [SDM 4.5, 29.3.2].
ENTRY_OF_LEVEL = ("", "PTE", "PDE", "PDPTE", "PML4E", "PML5E")
_WORD = 8
# Where a process's memory begins, by what it was made as.
_TABLES = {"tdp-tables": (LOW_RAM_START, "gpa"), "iommu-tables": (TABLES_START, "iova")}
_STRUCTURES = {"dmar-tables": STRUCTURES_START, "dmar-queues": QUEUES_START}
_FRAMES = "tdp-frames"
_REGISTER_PAGES = ("dmar-stores", "unit ")
_REGISTERS = sorted((at, name) for name, at in vars(Reg).items() if name.isupper())


class Names:
    """As of now: a table page that is linked elsewhere later is called otherwise then."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def of_word(self, memory: str, word: int) -> str:
        """`memory` as a file of the simulator is called: process.what, and a number."""
        _, _, made = memory.partition(".")
        at = word * _WORD
        for prefix, (base, space) in _TABLES.items():
            if made.startswith(prefix):
                return self._entry(base + at, space)
        for prefix, base in _STRUCTURES.items():
            if made.startswith(prefix):
                return self._structure(base + at) or f"{memory} word {word}"
        if made.startswith(_REGISTER_PAGES):
            return _register(at % REGISTER_PAGE)
        if made.startswith(_FRAMES):
            frame = (HIGH_RAM_START + at) // PAGE_SIZE
            return f"frame {frame:#x}, byte {at % PAGE_SIZE:#x}"
        return f"{memory} word {word}"

    def _entry(self, hpa: int, space: str) -> str:
        table, index = hpa & -PAGE_SIZE, hpa % PAGE_SIZE // ENTRY_BYTES
        place = self._watch.ghost.tables.place_of(table)
        if place is None:
            return f"entry {index} of table {table:#x}, not linked"
        page = place.first + (index << 9 * (place.level - 1))
        return f"{ENTRY_OF_LEVEL[place.level]} of {space} {page * PAGE_SIZE:#x}"

    def _structure(self, hpa: int) -> str | None:
        for it in self._watch.structures:
            if it.start <= hpa < it.end:
                number, within = divmod(hpa - it.start, it.entry_bytes)
                word = f", word {within // _WORD}" if it.entry_bytes > _WORD else ""
                return f"{it.what} {number:#x}{word}"
        return None


def _register(at: int) -> str:
    """Those of 4 bytes are two to a word."""
    there = [name for offset, name in _REGISTERS if at <= offset < at + _WORD]
    return "/".join(there) or f"register {at:#x}"


class Messages:
    """Bytes on channels as messages; a reply is called by what was asked."""

    def __init__(self) -> None:
        self._framers: dict[tuple[str, str], Framer] = {}
        self._asked: dict[tuple[str, int], str] = {}

    def named(self, done: str, end: str, data: bytes) -> list[str]:
        """What was `done` ("send", "recv") with `data` at that end of a channel; "send" names the other's."""
        framer = self._framers.setdefault((done, end), Framer())
        try:
            return [
                self._name(frame.kind, end, *decode(frame.body)) for frame in framer.feed(memoryview(data))
            ]
        except PeerError:
            return ["what is no message"]

    def _name(self, kind: Kind, end: str, number: int, body: dict[str, Any]) -> str:
        if kind in (Kind.REQUEST, Kind.NOTIFY):
            op = str(body.get("op"))
            self._asked[end, number] = op
            return op
        other = end.rstrip("'") if end.endswith("'") else f"{end}'"
        asked = self._asked.get((other, number), "?")
        return f"reply to {asked}" if kind is Kind.REPLY else f"error to {asked}"
