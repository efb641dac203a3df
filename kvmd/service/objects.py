"""The objects behind kvmd's fds, and how long each lives.

A VM lives while any fd that belongs to it does: its own, a vCPU's, a TDP FD's, wherever the last copy is
held [RFC 04/42]; a process lives while its mm fd does.  Each object's requests are in a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import time_ns
from typing import TypeVar

import structlog

from kvmd.config import Settings
from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.export.pinning import Account
from kvmd.core.export.tdp_fd import ExportedTdp
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.slots.guest_memfd import GuestMemfd
from kvmd.core.vm import Kvm
from kvmd.importers import Lease, RemoteImporter
from kvmd.memory import HostMemory
from protocol.flow import Flow
from protocol.rpc.channel import Channel
from protocol.rpc.files import Files
from protocol.rpc.loop import Loop

log = structlog.get_logger("kvmd")

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class VmFile:
    app: App
    vm: Kvm
    refs: int = 1  # fds of the VM, its vCPUs, its TDP FDs and its guest_memfds

    @property
    def vm_file(self) -> VmFile:
        return self


@dataclass(slots=True, eq=False)
class VcpuFile:
    owner: VmFile
    vcpu: Vcpu
    ring_fd: int | None = None  # the memory of its dirty ring

    @property
    def vm_file(self) -> VmFile:
        return self.owner


@dataclass(slots=True, eq=False)
class GuestMemfdFile:
    owner: VmFile
    memfd: GuestMemfd


@dataclass(slots=True, eq=False)
class MmFile:
    app: App
    mm: Mm


@dataclass(slots=True, eq=False)
class MirrorFile:
    """The channel of another MMU to the memory of a process."""

    app: App
    mirror: Mirror
    channel: Channel | None = None
    lease: Lease | None = None


@dataclass(slots=True, eq=False)
class MemfdFile:
    file: MemoryFile


@dataclass(slots=True, eq=False)
class UffdFile:
    app: App
    uffd: Userfaultfd


@dataclass(slots=True, eq=False)
class TdpFile:
    owner: VmFile
    exported: ExportedTdp
    leases: list[Lease] = field(default_factory=list)  # what keeps the table lent out


@dataclass(slots=True, eq=False)
class Importer:
    """An importer's channel; it holds no reference, its TDP FD does."""

    tdp: TdpFile
    channel: Channel | None = None
    name: str = ""
    ops: RemoteImporter | None = None
    lease: Lease | None = None
    pins: Account | None = None


class LoopClock:
    """The clock of the machine we run on; a tick is the message loop's."""

    def __init__(self, loop: Loop) -> None:
        self.tick = loop.tick
        self.wall_ns = time_ns


class App:
    """What kvmd holds: the host's memory, the VMs, the processes."""

    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.loop = loop
        self.settings = settings
        self.memory = HostMemory(settings, LoopClock(loop), loop.next_turn)
        self.host = self.memory.host
        self.files = Files(loop)
        self.vms: list[Kvm] = []
        self.mms: dict[int, MmFile] = {}

    def close(self) -> None:
        self.files.close()
        self.memory.close()

    # -- lifetimes -------------------------------------------------------------------------------------

    def put_vm(self, owner: VmFile) -> None:
        owner.refs -= 1
        if owner.refs == 0:
            self.vms.remove(owner.vm)
            self.loop.flows.spawn(self._destroy_vm(owner.vm))

    async def _destroy_vm(self, vm: Kvm) -> None:
        await vm.destroy()
        log.info("vm destroyed", vm=vm.id)
        self.forget(vm.mm)

    async def exit_mm(self, mm: Mm) -> None:
        await mm.exit()
        self.forget(mm)

    def forget(self, mm: Mm) -> None:
        """Somebody has nothing to do with `mm` any more: perhaps he was the last."""
        if mm.exited and not mm.notifiers:
            self.host.forget_mm(mm)


async def holding(owner: VmFile, flow: Flow[T]) -> T:
    """A request in progress keeps the VM as an ioctl keeps its file: it may outlive the fd it came over."""
    owner.refs += 1
    try:
        return await flow
    finally:
        owner.app.put_vm(owner)
