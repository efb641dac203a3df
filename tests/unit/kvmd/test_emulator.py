"""What leaves KVM_RUN as MMIO, piece by piece: sequences that a real KVM was recorded with."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvmd.core.cpu.exits import Mmio
from kvmd.core.cpu.program import Instruction
from kvmd.core.invariants import check_vm
from kvmd.core.mm.vma import Prot
from protocol.kvm_run import ExitReason
from protocol.units import Gpa, Hva
from tests.kit.kvmd import RW
from tests.kit.lent import Backed

RAM = 0x1000_0000  # slot 1, 64 pages
HOLE = 0x103E_8000
RO = 0x2000_0000  # slot 2, read-only
X = 0x1122_3344_5566_7788.to_bytes(8, "little")
PRIVILEGES = pytest.mark.parametrize("cpl", [3, 0])


def read(gpa: int, size: int) -> Mmio:
    return Mmio(Gpa(gpa), size, False, b"")


def write(gpa: int, data: str) -> Mmio:
    return Mmio(Gpa(gpa), len(data) // 2, True, bytes.fromhex(data))


@dataclass
class Seen:
    """One guest program played to its end, user space answering its loads."""

    exits: list[Mmio] = field(default_factory=list)
    reads: list[bytes] = field(default_factory=list)


class Emulated(Backed):
    """RAM at 0x10000000, a read-only slot beside it; what has no slot leaves."""

    def __init__(self, *, slot_prot: Prot = RW) -> None:
        super().__init__(RAM >> 12, 64, slot=1, prot=slot_prot)
        self.rom = self.map(64)
        self.run(self.mm.write(self.rom, b"rom!" * 4))
        self.set_slot(2, RO >> 12, 64, self.rom, flags=2)

    def play(self, cpl: int, code: list[Instruction], *replies: str) -> Seen:
        seen, answers = Seen(), list(replies)
        ran = self.run(self.vcpu.run(code, cpl))
        while not ran.done:
            assert ran.exit.reason is ExitReason.MMIO, ran
            assert ran.exit.mmio is not None
            seen.exits.append(ran.exit.mmio)
            data = b"" if ran.exit.mmio.is_write else bytes.fromhex(answers.pop(0))
            ran = self.run(self.vcpu.run(None, mmio_data=data))
        assert answers == []
        seen.reads = ran.reads
        assert check_vm(self.vm) == []
        return seen


@PRIVILEGES
@pytest.mark.parametrize(("size", "data"), [(1, "88"), (2, "8877"), (4, "88776655"), (8, "8877665544332211")])
def test_every_size_is_one_exit_and_the_value_read_is_user_space_s(cpl: int, size: int, data: str) -> None:
    guest = Emulated()
    assert guest.play(cpl, [("w", HOLE + 16, X[:size])]).exits == [write(HOLE + 16, data)]
    seen = guest.play(cpl, [("r", HOLE + 16, size)], "a8a7a6a5a4a3a2a1"[: 2 * size])
    assert seen.exits == [read(HOLE + 16, size)]
    assert seen.reads == [bytes.fromhex("a8a7a6a5a4a3a2a1")[:size]]


@PRIVILEGES
def test_an_unaligned_access_is_cut_at_the_page_and_nowhere_else(cpl: int) -> None:
    guest = Emulated()
    assert guest.play(cpl, [("w", HOLE + 3, X)]).exits == [write(HOLE + 3, "8877665544332211")]
    edge = HOLE + 0x0FFD
    assert guest.play(cpl, [("w", edge, X)]).exits == [write(edge, "887766"), write(edge + 3, "5544332211")]
    seen = guest.play(cpl, [("r", edge, 8)], "080706", "0807060504")
    assert seen.exits == [read(edge, 3), read(edge + 3, 5)]
    assert seen.reads == [bytes.fromhex("0807060807060504")]


@PRIVILEGES
def test_sixteen_bytes_are_two_exits_of_eight(cpl: int) -> None:
    guest = Emulated()
    pieces = [write(HOLE, "8877665544332211"), write(HOLE + 8, "8877665544332211")]
    assert guest.play(cpl, [("w", HOLE, X + X)]).exits == pieces
    seen = guest.play(cpl, [("r", HOLE, 16)], "99" + "00" * 7, "98" + "00" * 7)
    assert seen.exits == [read(HOLE, 8), read(HOLE + 8, 8)]
    assert seen.reads == [bytes([0x99, *bytes(7), 0x98, *bytes(7)])]


@PRIVILEGES
def test_a_store_across_slot_and_hole_writes_and_logs_the_ram_and_exits_once(cpl: int) -> None:
    guest, logged = Emulated(), []
    guest.vm.dirty_log.mark = lambda slot, gfn, *who: logged.append(gfn)  # type: ignore[method-assign]
    guest.run(guest.mm.write(guest.hva, bytes.fromhex("d4d3d2d1")))
    seen = guest.play(cpl, [("r", RAM - 4, 8)], "a5a6a7a8")
    assert (seen.exits, seen.reads) == ([read(RAM - 4, 4)], [bytes.fromhex("a5a6a7a8d4d3d2d1")])
    assert guest.play(cpl, [("w", RAM - 4, X)]).exits == [write(RAM - 4, "88776655")]
    assert guest.run(guest.mm.read(guest.hva, 4)) == bytes.fromhex("44332211")
    assert logged == [RAM >> 12]
    tail = RAM + 64 * 4096 - 4
    assert guest.play(cpl, [("w", tail, X)]).exits == [write(tail + 4, "44332211")]
    assert guest.run(guest.mm.read(Hva(guest.hva + 64 * 4096 - 4), 4)) == bytes.fromhex("88776655")


@PRIVILEGES
@pytest.mark.parametrize(
    ("code", "size", "reply", "result"),
    [
        (("or", HOLE, 1, 0), 1, "55", "55"),
        (("add", HOLE, 4, 3), 4, "10000000", "13000000"),
        (("xchg", HOLE, b"\3" + bytes(7)), 8, "1000000000000000", "0300000000000000"),
        (("cmpxchg", HOLE, 8, 16, 32), 8, "1000000000000000", "2000000000000000"),
        (("cmpxchg", HOLE, 8, 17, 32), 8, "1000000000000000", "1000000000000000"),  # writes what was there
    ],
)
def test_a_read_modify_write_is_a_load_and_then_a_store(
    cpl: int, code: Instruction, size: int, reply: str, result: str
) -> None:
    assert Emulated().play(cpl, [code], reply).exits == [read(HOLE, size), write(HOLE, result)]


@PRIVILEGES
def test_string_instructions_leave_byte_by_byte(cpl: int) -> None:
    guest = Emulated()
    stores = guest.play(cpl, [("stos", HOLE, 0x5A, 5)])
    assert stores.exits == [write(HOLE + i, "5a") for i in range(5)]
    loads = guest.play(cpl, [("movs", RAM + 0x3000, HOLE, 5)], *["77"] * 5)
    assert loads.exits == [read(HOLE + i, 1) for i in range(5)]
    assert guest.run(guest.mm.read(Hva(guest.hva + 0x3000), 8)) == b"\x77" * 5 + bytes(3)
    back = guest.play(cpl, [("movs", HOLE, RAM + 0x3000, 3)])
    assert back.exits == [write(HOLE + i, "77") for i in range(3)]


@PRIVILEGES
def test_a_read_only_slot_is_ram_for_loads_and_mmio_for_stores(cpl: int) -> None:
    guest = Emulated()
    assert guest.play(cpl, [("r", RO, 8), ("movs", RAM, RO, 8)]).reads == [b"rom!rom!"]
    assert guest.run(guest.mm.read(guest.hva, 8)) == b"rom!rom!"
    edge = RO + 0x2FFD
    seen = guest.play(cpl, [("w", edge, X), ("stos", RO, 0x5A, 2)])
    assert seen.exits[:2] == [write(edge, "887766"), write(edge + 3, "5544332211")]
    assert seen.exits[2:] == [write(RO, "5a"), write(RO + 1, "5a")]
    assert guest.run(guest.mm.read(guest.rom, 8)) == b"rom!rom!"


def test_what_the_process_has_not_mapped_is_mmio_to_the_emulator_and_no_entry_is_made() -> None:
    """To the CPU the same is EFAULT; the emulator goes through the process's memory."""
    guest = Emulated(slot_prot=Prot.READ)
    assert guest.play(0, [("r", RAM, 8)]).reads == [bytes(8)]
    assert guest.play(0, [("w", RAM, X)]).exits == [write(RAM, "8877665544332211")]
    guest.run(guest.mm.munmap(guest.hva, 64 * 4096))
    seen = guest.play(0, [("r", RAM + 0x1000, 8)], "01")
    assert seen.exits == [read(RAM + 0x1000, 8)]
    assert seen.reads == [b"\1" + bytes(7)], "what user space left out is zero"
    assert guest.vm.mmu.roots == []
    assert guest.vcpu.arch.ept_violations == 0


def test_code_where_no_memory_is_is_an_internal_error_and_tried_again() -> None:
    guest = Emulated()
    for cpl in (3, 0):
        ran = guest.run(guest.vcpu.run([("exec", HOLE)], cpl))
        assert (ran.exit.reason, ran.done) == (ExitReason.INTERNAL_ERROR, False)
    guest.set_slot(3, HOLE >> 12, 1, guest.map(1))
    assert guest.run(guest.vcpu.run(None)).done


def test_an_access_past_the_last_gpa_is_refused_and_the_vcpu_runs_on() -> None:
    guest = Emulated()
    last = (1 << 64) - 4
    wait = guest.start(guest.vcpu.run([("w", last, X)]))
    with pytest.raises(Exception, match="past the last gpa"):
        wait.result()
    assert guest.play(3, [("r", RAM, 8)]).reads == [bytes(8)]
