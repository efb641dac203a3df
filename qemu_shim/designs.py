"""Five ways to give a device the guest's memory, as a VMM carries them out (docs/decisions/0011).

A design is chosen when a machine starts.  Its container, QEMU's word for it, gives the HWPT that the device
is attached to and is told when the guest's memory changes: before a memslot comes, before one goes [QEMU
hw/vfio/common.c].  With KVM's table it has nothing to do then; with one of iommufdd's it maps and unmaps.

What a design cannot do it refuses with a reason, and the refusal is an answer like any other.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from protocol.uapi import names
from qemu_shim.iommufd_client import Iommu
from qemu_shim.kvm_client import Vm


class Refused(Exception):
    """What the design cannot do, and why."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why


@dataclass(frozen=True, slots=True)
class RamSlot:
    slot: int
    gpa: int
    size: int
    hva: int


class Container(Protocol):
    """A device's view of the guest's memory.  `tdp_fd`: KVM's table, if that is what the device is given."""

    @property
    def tdp_fd(self) -> int | None: ...

    async def hwpt(self, iommu: Iommu, dev_id: int, slots: list[RamSlot]) -> int:
        """What the device is attached to; once."""

    async def add(self, slot: RamSlot) -> None:
        """The memslot will be there when this returns."""

    async def remove(self, slot: RamSlot) -> None:
        """The memslot will be gone when this returns."""

    def close(self) -> None: ...


class KvmTable:
    """KVM's table, exported: memslots are all there is to say of it."""

    def __init__(self, tdp_fd: int) -> None:
        self._tdp_fd = tdp_fd

    @property
    def tdp_fd(self) -> int:
        return self._tdp_fd

    @classmethod
    async def open(cls, vm: Vm, *, own_root: bool = False) -> KvmTable:
        if own_root:
            await vm.enable_cap(names.KVM_CAP_TDP_FD_OWN_ROOT)
        return cls(await vm.create_tdp_fd())

    async def hwpt(self, iommu: Iommu, dev_id: int, slots: list[RamSlot]) -> int:
        return await iommu.hwpt_alloc_kvm(dev_id, self._tdp_fd)

    async def add(self, slot: RamSlot) -> None:
        """KVM hears of it with the memslot."""

    async def remove(self, slot: RamSlot) -> None:
        """The same."""

    def close(self) -> None:
        os.close(self._tdp_fd)


@dataclass(frozen=True, slots=True)
class Design:
    """`keeps`: why the VMM may not take a page out of the guest's memory; `whole_dirty`: no log tells what
    the device wrote, so all it may write counts in every round [QEMU hw/vfio/common.c].
    """

    name: str
    summary: str
    open: Callable[[Vm], Awaitable[Container]]
    faults: bool = True  # pages may be absent: the device must be able to ask for them
    keeps: str = ""
    whole_dirty: bool = False

    def check_discard(self) -> None:
        if self.keeps:
            raise Refused("ballooning", self.keeps)


SHARED = Design("shared", "KVM's one table, walked by the unit as well", KvmTable.open)
MANAGED = Design(
    "managed", "a second root of KVM's, filled with the first", partial(KvmTable.open, own_root=True)
)

DESIGNS = {design.name: design for design in (MANAGED, SHARED)}
