"""KVM's own stores: the wall clock, written where the guest says."""

from __future__ import annotations

import struct

import pytest

from kvmd.core.cpu.msr import MSR_KVM_WALL_CLOCK_NEW, set_msr
from tests.kit.lent import Backed

RAM, PAGE = 0x10_0000, 4096


class WallClock(Backed):
    """Four pages for it to lie in, and which of them were logged."""

    def __init__(self) -> None:
        super().__init__(RAM >> 12, 4)
        self.logged: list[int] = []
        self.vm.dirty_log.mark = (  # type: ignore[method-assign]
            lambda slot, gfn, *who: self.logged.append(gfn)
        )

    def write_wall_clock(self, gpa: int) -> bool:
        return self.run(set_msr(self.vcpu.ram, self.vm.wall_clock_epoch_ns, MSR_KVM_WALL_CLOCK_NEW, gpa))

    def struct_at(self, offset: int) -> tuple[int, ...]:
        return struct.unpack("<III", self.ram(offset, 12))


@pytest.mark.parametrize("offset", [0x10, PAGE - 2])
def test_the_wall_clock_is_when_the_vm_began_and_the_store_is_logged(offset: int) -> None:
    guest = WallClock()
    guest.bare.clock.now_ns += 5 * 10**9
    assert guest.write_wall_clock(RAM + offset)
    assert guest.struct_at(offset) == (2, 1_700_000_000, 42)
    assert set(guest.logged) == {RAM + at >> 12 for at in (offset, offset + 11)}
    guest.write_wall_clock(RAM + offset)
    assert guest.struct_at(offset)[0] == 4, "the version moves on, and is even when it is done"


def test_an_odd_version_is_taken_for_an_update_in_progress() -> None:
    guest = WallClock()
    for old, new in ((1, 4), (7, 10), (0xFFFF_FFFF, 2)):
        guest.run(guest.mm.write(guest.hva, struct.pack("<I", old)))
        guest.write_wall_clock(RAM)
        assert guest.struct_at(0)[0] == new


@pytest.mark.parametrize("gpa", [0, 0x666_0000, (1 << 64) - 4, RAM + 4 * PAGE - 6])
def test_where_no_ram_is_nothing_is_said_and_nothing_breaks(gpa: int) -> None:
    guest = WallClock()
    assert guest.write_wall_clock(gpa)
    assert guest.struct_at(0) == (0, 0, 0)


def test_other_registers_are_not_set() -> None:
    guest = WallClock()
    assert not guest.run(set_msr(guest.vcpu.ram, guest.vm.wall_clock_epoch_ns, 0x10, RAM))
