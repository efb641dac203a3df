"""What a VMM does for each design when its memory changes: the calls it makes, in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from protocol.errors import UapiError
from protocol.units import MIB
from qemu_shim.vmm.designs import DESIGNS, RamSlot, Refused
from qemu_shim.vmm.machine import Machine, MachineConfig

SLOT = RamSlot(0, 0, 2 * MIB, 0x7000_0000)
IOAS_ID, HWPT_ID, HVA = 5, 6, 0x7100_0000


class Calls:
    """A VM, a process and an iommufd that write down what is asked of them."""

    def __init__(self, refuse: str = "") -> None:
        self.made: list[tuple[Any, ...]] = []
        self.loop = SimpleNamespace(kernel=None)
        self._refuse = refuse

    def __getattr__(self, name: str) -> Any:
        answers = {"ioas_alloc": IOAS_ID, "hwpt_alloc": HWPT_ID, "hwpt_alloc_kvm": HWPT_ID, "mmap": HVA}

        async def call(*given: Any, **named: Any) -> Any:
            self.made.append((name, *(value for value in given if value is not self), *named.values()))
            if name == self._refuse:
                raise UapiError(12, "no room")
            return answers.get(name, 3)

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.made]


async def started(design: str, calls: Calls, *, pinned: bool = False) -> Machine:
    """A machine of which only memory is real."""
    held = cast(Any, calls)
    container = await DESIGNS[design].open(held, held)
    assert await container.hwpt(held, 1, [SLOT]) == HWPT_ID
    config = MachineConfig(design=DESIGNS[design], pinned=pinned)
    nothing = cast(Any, None)
    bare = (nothing, config, held, held, nothing, [SLOT], nothing, nothing)
    return Machine(*bare, [], container, held, HWPT_ID, [])


@pytest.mark.parametrize(
    ("design", "expected"),
    [
        ("shared", ["create_tdp_fd", "hwpt_alloc_kvm"]),
        ("managed", ["enable_cap", "create_tdp_fd", "hwpt_alloc_kvm"]),
        ("pinned", ["ioas_alloc", "ioas_map", "hwpt_alloc"]),
        ("mirror", ["ioas_alloc", "ioas_map", "hwpt_alloc"]),
        ("notifier", ["ioas_alloc", "ioas_map", "follow_kvm", "hwpt_alloc"]),
    ],
)
async def test_how_a_design_comes_by_its_hwpt(design: str, expected: list[str]) -> None:
    calls = Calls()
    guest = await started(design, calls)
    assert calls.names == expected
    assert [made for made in calls.made if made[0] == "ioas_alloc"] == (
        [("ioas_alloc", design != "pinned")] if "ioas_alloc" in expected else []
    )
    if "ioas_map" in expected:
        assert ("ioas_map", IOAS_ID, SLOT.hva, SLOT.size, SLOT.gpa) in calls.made
        with pytest.raises(Refused, match=design):
            _ = guest.tdp_fd
    else:
        assert guest.tdp_fd == 3


@pytest.mark.parametrize("design", DESIGNS)
async def test_memory_is_the_devices_before_it_is_the_guests_and_leaves_it_first(design: str) -> None:
    """QEMU's listener is called before KVM's memslots are changed, at both ends."""
    calls = Calls()
    guest = await started(design, calls)
    calls.made.clear()
    added = await guest.add_slot(7, 0x1000_0000, MIB)
    assert (added.hva, guest.slots) == (HVA, [SLOT, added])
    await guest.remove_slot(added)
    assert guest.slots == [SLOT]
    own = design in ("pinned", "mirror", "notifier")
    assert calls.names == [
        *("mmap", *["ioas_map"] * own, "set_user_memory_region"),
        *(*["ioas_unmap"] * own, "set_user_memory_region", "munmap"),
    ]
    if own:
        assert ("ioas_unmap", IOAS_ID, 0x1000_0000, MIB) in calls.made


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
async def test_what_is_pinned_is_not_ballooned(design: str, pinned: bool) -> None:
    calls = Calls()
    guest = await started(design, calls, pinned=pinned)
    calls.made.clear()
    if pinned or design == "pinned":
        with pytest.raises(Refused, match="ram_block_discard is disabled"):
            await guest.discard(0x1000, 0x2000)
        assert calls.made == []
    else:
        await guest.discard(0x1000, 0x2000)
        assert calls.made == [("madvise_dontneed", SLOT.hva + 0x1000, 0x2000)]


@pytest.mark.parametrize("refusing", ["ioas_map", "hwpt_alloc"])
async def test_memory_that_cannot_be_had_is_a_refusal_with_the_daemons_reason(refusing: str) -> None:
    with pytest.raises(Refused, match="for the device: no room") as caught:
        await started("pinned", Calls(refusing))
    assert (caught.value.errno, caught.value.reason) == (12, "no room")
