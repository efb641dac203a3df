"""Random guest programs: the CPU, KVM's emulator and a guest written down byte by byte do the same.

The layout has RAM in two slots whose pages lie apart in the process, a read-only slot and holes, all
next to each other, so that accesses straddle every kind of edge.  Compared are what the guest reads,
each exit with its data, and all of memory at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmd.core.invariants import check_vm
from protocol.kvm_run import ExitReason
from protocol.units import Hva
from tests.kit.kvmd import World

PAGE, BASE = 4096, 0x10_0000
RAM, ROM, HOLE = "ram", "rom", "hole"
LAYOUT = (HOLE, RAM, RAM, ROM, HOLE, RAM, HOLE, ROM)  # a page each, from BASE on
END = BASE + len(LAYOUT) * PAGE

Exit = tuple[int, int, bytes | None]  # gpa, length, data of a store


def device_value(gpa: int, size: int) -> bytes:
    """What user space answers a load with."""
    return bytes((gpa + i) * 31 % 256 for i in range(size))


@dataclass
class Model:
    """The same guest, a byte at a time, with the rules as recorded."""

    memory: bytearray
    reads: list[bytes] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)

    def kind(self, gpa: int) -> str:
        return LAYOUT[(gpa - BASE) // PAGE] if BASE <= gpa < END else HOLE

    def pieces(self, gpa: int, size: int, kinds: tuple[str, ...]) -> list[tuple[int, int]]:
        """The parts of an access that are none of `kinds`: cut at pages, then every 8 bytes."""
        found: list[tuple[int, int]] = []
        for at in range(gpa, gpa + size):
            if self.kind(at) in kinds:
                continue
            start, count = found[-1] if found else (0, 0)
            if start + count == at and at % PAGE and count < 8:
                found[-1] = start, count + 1
            else:
                found.append((at, 1))
        return found

    def load(self, gpa: int, size: int) -> bytes:
        value = bytearray(self.memory[gpa - BASE : gpa - BASE + size].ljust(size, b"\0"))
        for at, count in self.pieces(gpa, size, (RAM, ROM)):
            self.exits.append((at, count, None))
            value[at - gpa : at - gpa + count] = device_value(at, count)
        return bytes(value)

    def store(self, gpa: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            if self.kind(gpa + i) == RAM:
                self.memory[gpa + i - BASE] = byte
        for at, count in self.pieces(gpa, len(data), (RAM,)):
            self.exits.append((at, count, data[at - gpa : at - gpa + count]))

    def run(self, name: str, gpa: int, *operands: Any) -> None:
        if name == "r":
            self.reads.append(self.load(gpa, operands[0]))
        elif name == "w":
            self.store(gpa, operands[0])
        elif name == "xchg":
            self.load(gpa, len(operands[0]))
            self.store(gpa, operands[0])
        elif name in ("add", "or"):
            size, value = operands
            old = int.from_bytes(self.load(gpa, size), "little")
            new = old + value if name == "add" else old | value
            self.store(gpa, (new % (1 << 8 * size)).to_bytes(size, "little"))
        elif name == "cmpxchg":
            size, expect, new = operands
            found = self.load(gpa, size)
            equal = int.from_bytes(found, "little") == expect
            self.store(gpa, new.to_bytes(size, "little") if equal else found)
        elif name == "stos":
            for i in range(operands[1]):
                self.store(gpa + i, bytes([operands[0]]))
        elif name == "movs":
            for i in range(operands[1]):
                self.store(gpa + i, self.load(operands[0] + i, 1))


EDGES = st.integers(1, len(LAYOUT)).map(lambda page: BASE + page * PAGE)
GPA = st.builds(lambda edge, offset: edge + offset, EDGES, st.integers(-20, 20))
WORD = st.sampled_from([1, 2, 4, 8])
BYTE = st.integers(0, 255)
DATA = st.one_of(st.binary(min_size=1, max_size=16), st.sampled_from([bytes(range(200)), b"\7" * 5000]))
INSTRUCTION = st.one_of(
    st.tuples(st.just("r"), GPA, st.one_of(st.integers(1, 16), st.sampled_from([300, 5000]))),
    st.tuples(st.just("w"), GPA, DATA),
    st.tuples(st.just("xchg"), GPA, WORD.flatmap(lambda n: st.binary(min_size=n, max_size=n))),
    st.tuples(st.sampled_from(["add", "or"]), GPA, WORD, BYTE),
    st.tuples(st.just("cmpxchg"), GPA, WORD, st.sampled_from([0, 7]), BYTE),
    st.tuples(st.just("stos"), GPA, BYTE, st.integers(1, 40)),
    st.tuples(st.just("movs"), GPA, GPA, st.integers(1, 40)),
)


@dataclass
class Real:
    """kvmd's vCPU on the layout."""

    cpl: int
    world: World = field(default_factory=World)
    hvas: list[int | None] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vcpu = self.world.create_vcpu()
        for slot, kind in enumerate(LAYOUT):
            hva = None if kind == HOLE else int(self.world.map(1, hva=0x4000_0000 - slot * 2 * PAGE))
            self.hvas.append(hva)
            if hva is not None:
                self.world.set_slot(slot, (BASE >> 12) + slot, 1, hva, flags=2 if kind == ROM else 0)

    def fill(self, memory: bytes) -> None:
        for page, hva in enumerate(self.hvas):
            if hva is not None:
                self.world.run(self.world.mm.write(Hva(hva), memory[page * PAGE : (page + 1) * PAGE]))

    def contents(self) -> bytes:
        return b"".join(
            bytes(PAGE) if hva is None else self.world.run(self.world.mm.read(Hva(hva), PAGE))
            for hva in self.hvas
        )

    def run(self, program: list[tuple[Any, ...]]) -> list[bytes]:
        ran = self.world.run(self.vcpu.run(program, self.cpl))
        while not ran.done:
            assert ran.exit.reason is ExitReason.MMIO, ran
            mmio = ran.exit.mmio
            assert mmio is not None
            self.exits.append((mmio.phys_addr, mmio.len, mmio.data if mmio.is_write else None))
            data = b"" if mmio.is_write else device_value(mmio.phys_addr, mmio.len)
            ran = self.world.run(self.vcpu.run(None, mmio_data=data))
        return ran.reads


@pytest.mark.parametrize("cpl", [3, 0])
@settings(max_examples=150, deadline=None)
@given(program=st.lists(INSTRUCTION, min_size=1, max_size=12), seed=st.integers(0, 255))
def test_cpu_emulator_and_bytes_agree(cpl: int, program: list[tuple[Any, ...]], seed: int) -> None:
    memory = b"".join(
        bytes(PAGE) if kind == HOLE else bytes((i * 7 + seed) % 256 for i in range(PAGE)) for kind in LAYOUT
    )
    model, real = Model(bytearray(memory)), Real(cpl)
    real.fill(memory)
    for instruction in program:
        model.run(*instruction)
    assert real.run(program) == model.reads
    assert real.exits == model.exits
    assert real.contents() == model.memory
    assert check_vm(real.world.vm) == []
