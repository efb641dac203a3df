"""The objects behind kvmd's fds: what a request over one finds.

How long each of the core's lives the core says: `vm_list`, `importer`, `mm/hmm`.  Each object's requests are
in a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from kvmd.config import Settings
from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.export.importer import Importer, TdpFd
from kvmd.core.mm.file import MemoryFile
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.userfaultfd import Userfaultfd
from kvmd.core.slots.guest_memfd import GuestMemfd
from kvmd.core.users import VmUsers
from kvmd.core.vm import Kvm
from kvmd.core.vm_list import VmList
from kvmd.memory import HostMemory
from protocol.rpc.channel import Channel
from protocol.rpc.files import Files
from protocol.rpc.loop import Loop

log = structlog.get_logger("kvmd")


@dataclass(slots=True, eq=False)
class VmFile:
    app: App
    vm: Kvm
    users: VmUsers  # each fd of the VM, its vCPUs, its TDP FDs and its guest_memfds is one

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


@dataclass(slots=True, eq=False)
class MemfdFile:
    file: MemoryFile


@dataclass(slots=True, eq=False)
class UffdFile:
    app: App
    uffd: Userfaultfd


@dataclass(slots=True, eq=False)
class TdpFile:
    app: App
    tdp: TdpFd


@dataclass(slots=True, eq=False)
class ImporterFile:
    """An importer's channel."""

    app: App
    importer: Importer
    channel: Channel | None = None


class LoopClock:
    """The clock of the machine we run on; a tick is the message loop's."""

    def __init__(self, loop: Loop) -> None:
        self.tick = loop.tick
        self.wall_ns = loop.kernel.wall_ns


class App:
    """What kvmd holds: the host's memory, the VMs, the processes."""

    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.loop = loop
        self.kernel = loop.kernel
        self.settings = settings
        self.memory = HostMemory(self.kernel, settings, LoopClock(loop), loop.next_turn)
        self.host = self.memory.host
        self.files = Files(loop)
        self.vms = VmList(self.host, loop.flows.spawn, lambda vm: log.info("vm destroyed", vm=vm.id))
        self.mms: dict[int, MmFile] = {}

    def close(self) -> None:
        self.files.close()
        self.memory.close()
