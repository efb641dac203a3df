"""The ways to give a device the guest's memory, as a VMM carries them out (docs/decisions/0011).

A design is chosen when a machine starts.  Its container, QEMU's word for it, gives the HWPT that the device
is attached to and is told when the guest's memory changes: before a memslot comes, before one goes, and
around a conversion of private memory [QEMU hw/vfio/listener.c].  With KVM's table it has nothing to do then;
with one of iommufdd's it maps and unmaps.

What a design cannot do it refuses with a reason, and the refusal is an answer like any other.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from protocol.errors import UapiError
from protocol.kernel.port import Kernel
from protocol.uapi import names
from qemu_shim.vmm.iommufd_client import Iommu
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.private_ram import PrivateRam
from qemu_shim.vmm.process import Process


class Refused(UapiError):
    """What the design cannot do, and why; of a daemon, or of the VMM itself (EOPNOTSUPP)."""

    def __init__(self, what: str, why: str, number: int = errno.EOPNOTSUPP) -> None:
        super().__init__(number, f"{what}: {why}")
        self.what = what
        self.reason = why


@dataclass(frozen=True, slots=True)
class RamSlot:
    """`attributes`: parts of it may be private."""

    slot: int
    gpa: int
    size: int
    hva: int
    attributes: PrivateRam | None = None

    def shared(self) -> list[tuple[int, int]]:
        """What of it is the device's: offsets and sizes of what is mapped at a time."""
        ram = self.attributes
        if ram is None:
            return [(0, self.size)]
        return [(offset, ram.block) for offset in ram.blocks(0, self.size, private=False)]


class Container(Protocol):
    """A device's view of the guest's memory.  `tdp_fd`: KVM's table, if that is what the device is given.

    Raises Refused for memory it cannot give to the device.
    """

    @property
    def tdp_fd(self) -> int | None: ...

    async def hwpt(self, iommu: Iommu, dev_id: int, slots: list[RamSlot]) -> int:
        """What the device is attached to; once."""

    async def add(self, slot: RamSlot) -> None:
        """The memslot will be there when this returns."""

    async def remove(self, slot: RamSlot) -> None:
        """The memslot will be gone when this returns."""

    async def populate(self, slot: RamSlot, offset: int, size: int) -> None:
        """That part of it was converted to shared."""

    async def discard(self, slot: RamSlot, offset: int, size: int) -> None:
        """It will be converted to private when this returns."""

    def close(self) -> None: ...


class KvmContainer:
    """KVM's table, exported: memslots are all there is to say of it."""

    def __init__(self, kernel: Kernel, tdp_fd: int) -> None:
        self._kernel = kernel
        self._tdp_fd = tdp_fd

    @property
    def tdp_fd(self) -> int:
        return self._tdp_fd

    @classmethod
    async def open(cls, vm: Vm, process: Process, *, own_root: bool = False) -> KvmContainer:
        if own_root:
            await vm.enable_cap(names.KVM_CAP_TDP_FD_OWN_ROOT)
        return cls(vm.loop.kernel, await vm.create_tdp_fd())

    async def hwpt(self, iommu: Iommu, dev_id: int, slots: list[RamSlot]) -> int:
        return await iommu.hwpt_alloc_kvm(dev_id, self._tdp_fd)

    async def add(self, slot: RamSlot) -> None:
        """KVM hears of it with the memslot."""

    async def remove(self, slot: RamSlot) -> None:
        """The same."""

    async def populate(self, slot: RamSlot, offset: int, size: int) -> None:
        """With the attributes: a page request gets whichever page the guest has."""

    async def discard(self, slot: RamSlot, offset: int, size: int) -> None:
        """The same."""

    def close(self) -> None:
        self._kernel.close(self._tdp_fd)


class IoasContainer:
    """A table of iommufdd's, filled from an IOAS that has every memslot mapped."""

    tdp_fd = None

    def __init__(self, vm: Vm, process: Process, *, on_demand: bool, follow_kvm: bool) -> None:
        self._vm = vm
        self._process = process
        self._on_demand = on_demand
        self._follow_kvm = follow_kvm
        self._at: tuple[Iommu, int] | None = None  # where memslots are mapped

    @classmethod
    async def open(
        cls, vm: Vm, process: Process, *, on_demand: bool = False, follow_kvm: bool = False
    ) -> IoasContainer:
        return cls(vm, process, on_demand=on_demand, follow_kvm=follow_kvm)

    async def hwpt(self, iommu: Iommu, dev_id: int, slots: list[RamSlot]) -> int:
        ioas_id = await iommu.ioas_alloc(on_demand=self._on_demand)
        self._at = iommu, ioas_id
        for slot in slots:
            await self.add(slot)
        if self._follow_kvm:
            await iommu.follow_kvm(ioas_id, self._vm)
        try:  # what was mapped is pinned now
            return await iommu.hwpt_alloc(dev_id, ioas_id)
        except UapiError as error:
            raise Refused("the guest's memory for the device", error.why, error.errno) from None

    async def add(self, slot: RamSlot) -> None:
        for offset, size in slot.shared():
            await self.populate(slot, offset, size)

    async def remove(self, slot: RamSlot) -> None:
        if slot.shared():
            await self.discard(slot, 0, slot.size)

    async def populate(self, slot: RamSlot, offset: int, size: int) -> None:
        iommu, ioas_id = self._mapped_at
        gpa = slot.gpa + offset
        try:
            await iommu.ioas_map(ioas_id, self._process, slot.hva + offset, size, gpa)
        except UapiError as error:
            raise Refused(f"memory at gpa {gpa:#x} for the device", error.why, error.errno) from None

    async def discard(self, slot: RamSlot, offset: int, size: int) -> None:
        iommu, ioas_id = self._mapped_at
        await iommu.ioas_unmap(ioas_id, slot.gpa + offset, size)

    @property
    def ioas_id(self) -> int:
        """Where memslots are mapped."""
        return self._mapped_at[1]

    @property
    def _mapped_at(self) -> tuple[Iommu, int]:
        assert self._at is not None, "hwpt() comes first"
        return self._at

    def close(self) -> None:
        """It goes with the iommufd."""


@dataclass(frozen=True, slots=True)
class Stroke:
    """How a design is drawn: its colour on a light and on a dark page, the width and dashes of its line.

    Where lines coincide the thinner ones are drawn over the wider ones.
    """

    light: str
    dark: str
    width: float
    dashes: str = "none"


@dataclass(frozen=True, slots=True)
class Design:
    """All that is said of a design: its name, a summary, what it does, how it is drawn.

    `owners`: whose tables there are, by the names of the gauges of table pages; `pins`: every page is there
    for good, so that a device that cannot ask for pages will do, and the VMM may take none out of the guest's
    memory; `whole_dirty`: no log tells what the device wrote, so all it may write counts in every round
    [QEMU hw/vfio/common.c]; `touch_serves`: what the CPU has touched is there for the device too.
    """

    name: str
    summary: str
    open: Callable[[Vm, Process], Awaitable[Container]]
    stroke: Stroke
    owners: tuple[str, ...]
    pins: bool = False
    whole_dirty: bool = False
    touch_serves: bool = True

    def check_no_block(self) -> None:
        """May a device end a descriptor at an absent page, and the guest touch the page and go on?"""
        if not self.touch_serves:
            raise Refused("a device that does not block on faults", NO_TOUCH)


NO_DISCARD = (
    "ram_block_discard is disabled: a page taken out of the guest's memory would stay pinned for the device, "
    "and the guest be given another one"
)
NO_TOUCH = "the guest's touch of the page does not put it into the device's table, only a page request does"

SHARED = Design(
    "shared",
    "KVM's one table, walked by the unit as well",
    KvmContainer.open,
    Stroke("#a8498a", "#e09bc7", 6),
    owners=("shared",),
)
MANAGED = Design(
    "managed",
    "a second root of KVM's, filled with the first",
    partial(KvmContainer.open, own_root=True),
    Stroke("#0072b2", "#56b4e9", 4.6),
    owners=("cpu", "iommu"),
)
PINNED = Design(
    "pinned",
    "a table of iommufdd's, all memory in it pinned from the start",
    IoasContainer.open,
    Stroke("#d55e00", "#ff8a3d", 1.6, "3 2"),
    owners=("cpu", "iommufd"),
    pins=True,
    whole_dirty=True,
)
MIRROR = Design(
    "mirror",
    "a table of iommufdd's, filled by IO page faults",
    partial(IoasContainer.open, on_demand=True),
    Stroke("#6e6e6e", "#b9b9b9", 2.2),
    owners=("cpu", "iommufd"),
    whole_dirty=True,
    touch_serves=False,
)
NOTIFIER = Design(
    "notifier",
    "the same, and filled with what KVM says it faulted in",
    partial(IoasContainer.open, on_demand=True, follow_kvm=True),
    Stroke("#008a66", "#2fc79b", 3.4, "7 3"),
    owners=("cpu", "iommufd"),
    whole_dirty=True,
    touch_serves=False,  # a note comes later, or not at all
)
DESIGNS = {design.name: design for design in (PINNED, MIRROR, NOTIFIER, MANAGED, SHARED)}
