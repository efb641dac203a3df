"""The VMs of a host, and what keeps each of them.

Models vm_list and users_count [KVM kvm_main.c, kvm_get_kvm, kvm_put_kvm]: a VM lives while any fd that
belongs to it does, its own, a vCPU's, a guest_memfd's, a TDP FD's, wherever the last copy is held [RFC
04/42]; and a request in progress keeps it, as an ioctl keeps its file.  With its last user it leaves the
list, and is destroyed; its process is forgotten with whatever was the last to have to do with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from kvmd.core.host import HostKernel
from kvmd.core.mm.mm import Mm
from kvmd.core.vm import Kvm, VmType, create_vm
from protocol.flow import Flow

T = TypeVar("T")


class VmUsers:
    """Who keeps one VM; whoever makes it is the first.  `last` is called when the last has gone."""

    def __init__(self, vm: Kvm, last: Callable[[Kvm], None]) -> None:
        self.vm = vm
        self.count = 1
        self._last = last

    def get(self) -> None:
        assert self.count, "nobody keeps this VM any more"
        self.count += 1

    def put(self) -> None:
        assert self.count, "a VM put more often than it was got"
        self.count -= 1
        if not self.count:
            self._last(self.vm)

    async def holding(self, flow: Flow[T]) -> T:
        """A request in progress may outlive the fd it came over."""
        self.get()
        try:
            return await flow
        finally:
            self.put()

    async def put_after(self, closing: Flow[None]) -> None:
        """The last close of a file that keeps the VM: what that takes, then its reference."""
        await closing
        self.put()


class VmList:
    """`spawn` runs a flow nobody waits for; `destroyed` hears of each VM that is gone."""

    def __init__(
        self, host: HostKernel, spawn: Callable[[Flow[None]], None], destroyed: Callable[[Kvm], None]
    ) -> None:
        self._host = host
        self._spawn = spawn
        self._destroyed = destroyed
        self._vms: list[Kvm] = []

    def __iter__(self) -> Iterator[Kvm]:
        return iter(self._vms)

    def __len__(self) -> int:
        return len(self._vms)

    async def create(self, mm: Mm, kind: VmType) -> VmUsers:
        """KVM_CREATE_VM; its fd is the first user."""
        vm = await create_vm(self._host, mm, kind)
        self._vms.append(vm)
        return VmUsers(vm, self._remove)

    def _remove(self, vm: Kvm) -> None:
        self._vms.remove(vm)
        self._spawn(self._destroy(vm))

    # awaits: vm: cannot change: it has no user, and is in no list
    async def _destroy(self, vm: Kvm) -> None:
        await vm.destroy()
        self._destroyed(vm)
        self._host.put_mm(vm.mm)
