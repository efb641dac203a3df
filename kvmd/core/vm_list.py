"""The VMs of a host.

Models vm_list [KVM kvm_main.c].  With its last user (`users`) a VM leaves the list, and is destroyed; its
process is forgotten with whatever was the last to have to do with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvmd.core.host import HostKernel
from kvmd.core.mm.mm import Mm
from kvmd.core.users import VmUsers
from kvmd.core.vm import Kvm, VmType, create_vm
from protocol.flow import Flow


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

    async def create(self, mm: Mm, kind: VmType) -> tuple[Kvm, VmUsers]:
        """KVM_CREATE_VM; its fd is the first user."""
        vm = await create_vm(self._host, mm, kind)
        self._vms.append(vm)
        return vm, VmUsers(lambda: self._remove(vm))

    def _remove(self, vm: Kvm) -> None:
        self._vms.remove(vm)
        self._spawn(self._destroy(vm))

    # awaits: vm: cannot change: it has no user, and is in no list
    async def _destroy(self, vm: Kvm) -> None:
        await vm.destroy()
        self._destroyed(vm)
        self._host.put_mm(vm.mm)
