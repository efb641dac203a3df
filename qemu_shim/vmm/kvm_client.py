"""KVM, as a VMM calls it: thin names over the requests of `protocol/uapi/kvm.py`.

The front door stands for the host: a process starts there, opens /dev/kvm, and gets its VM.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol.kernel.port import Kernel
from protocol.rpc.channel import Body, Channel, Reply
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect
from protocol.uapi import names
from protocol.uapi.kvm import MAX_VMS_TOLD
from qemu_shim.vmm.file import File, copies
from qemu_shim.vmm.process import MemFd, Process
from qemu_shim.vmm.vcpu import Vcpu


class Kvmd:
    """kvmd's front door."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._vms: list[Vm] = []

    @classmethod
    async def connect(cls, loop: Loop, path: Path) -> Kvmd:
        return cls(Channel(loop, await connect(loop.kernel, path), "kvmd"))

    async def start_process(self) -> Process:
        """A host process: its address space lives until the last copy of its fd is closed."""
        reply = await self._channel.ask("MM_CREATE")
        return Process(self._channel.loop, reply.fds.take(0), "mm")

    async def create_vm(self, process: Process, kind: int = 0) -> Vm:
        """`kind`: KVM_X86_SW_PROTECTED_VM has private memory."""
        reply = await self._channel.ask("OPEN", {"path": names.KVM_PATH})
        dev_kvm = File(self._channel.loop, reply.fds.take(0), "/dev/kvm")
        try:
            made = await dev_kvm.ask("KVM_CREATE_VM", [process.dup()], type=kind)
        finally:
            dev_kvm.close()
        vm = Vm(self._channel.loop, made.fds.take(0), "vm")
        self._vms.append(vm)
        return vm

    @property
    def channel(self) -> Channel:
        """For what is asked of the host but not by a VMM (`qemu_shim/vmm/inspector.py`)."""
        return self._channel

    async def started_with(self) -> list[str]:
        """Its options, but for where its sockets are: `--devices 4`."""
        options: list[str] = (await self._channel.ask("STARTED_WITH")).body["options"]
        return options

    async def stats(self) -> Body:
        """Of the host, and of the VMs that were made here and whose fds are open, oldest first."""
        self._vms = [vm for vm in self._vms if not vm.closed]
        body: Body = {"vms": []}
        for start in range(0, max(len(self._vms), 1), MAX_VMS_TOLD):
            vms = copies(self._vms[start : start + MAX_VMS_TOLD])
            told = (await self._channel.ask("STATS", {}, vms)).body
            body = {**told, "vms": body["vms"] + told["vms"]}
        return body

    async def violations(self) -> list[str]:
        """What does not hold now, by kvmd's own check."""
        found: list[str] = (await self._channel.ask("CHECK")).body["violations"]
        return found

    def close(self) -> None:
        self._channel.close()


class GuestMemfd(MemFd):
    """Memory of a VM: a file that a process maps only if it was made for that."""

    async def punch_hole(self, offset: int, size: int) -> None:
        """The next touch finds zeroes."""
        await self.ask("PUNCH_HOLE", offset=offset, size=size)


class Vm(File):
    """Of every call, `argp` is where the struct lies, if that is to be checked, and `caller` the process that
    asks, if it is not the one that made the VM.
    """

    async def ioctl(
        self,
        op: str,
        *,
        argp: int | None = None,
        caller: Process | None = None,
        fds: Sequence[int] = (),
        **body: Any,
    ) -> Reply:
        if argp is not None:
            body["argp"] = argp
        if caller is not None:
            body["other_mm"], fds = True, copies([caller], *fds)
        return await self.ask(op, fds, **body)

    async def create_vcpu(self, vcpu_id: int, **how: Any) -> Vcpu:
        reply = await self.ioctl("KVM_CREATE_VCPU", vcpu_id=vcpu_id, **how)
        return Vcpu(self.loop, reply.fds.take(0), f"vcpu{vcpu_id}")

    async def set_user_memory_region(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = 0, **how: Any
    ) -> None:
        await self.ioctl("KVM_SET_USER_MEMORY_REGION", **_region(slot, gpa, size, hva, flags), **how)

    async def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int = 0,
        *,
        guest_memfd: GuestMemfd | int = 0xFFFF_FFFF,
        guest_memfd_offset: int = 0,
        pad1: int = 0,
        pad2: int = 0,
        **how: Any,
    ) -> None:
        """`guest_memfd`: an object of ours, or any fd number, open or not; looked at only with its flag."""
        fd = guest_memfd.dup() if isinstance(guest_memfd, GuestMemfd) else _dup(self.loop.kernel, guest_memfd)
        if fd is not None and not flags & names.KVM_MEM_GUEST_MEMFD:
            self.loop.kernel.close(fd)
            fd = None
        await self.ioctl(
            "KVM_SET_USER_MEMORY_REGION2",
            **_region(slot, gpa, size, hva, flags),
            guest_memfd=guest_memfd if isinstance(guest_memfd, int) else fd or 0,
            guest_memfd_offset=guest_memfd_offset,
            pad1=pad1,
            pad2=pad2,
            fds=() if fd is None else (fd,),
            **how,
        )

    async def check_extension(self, cap: int, **how: Any) -> int:
        ret: int = (await self.ioctl("KVM_CHECK_EXTENSION", cap=cap, **how)).body["ret"]
        return ret

    async def enable_cap(self, cap: int, *args: int, flags: int = 0, **how: Any) -> None:
        await self.ioctl("KVM_ENABLE_CAP", cap=cap, flags=flags, args=list(args), **how)

    async def get_dirty_log(self, slot: int, dirty_bitmap: int, **how: Any) -> None:
        """The bits are in our memory afterwards, at that address."""
        await self.ioctl("KVM_GET_DIRTY_LOG", slot=slot, dirty_bitmap=dirty_bitmap, **how)

    async def clear_dirty_log(
        self, slot: int, first_page: int, num_pages: int, dirty_bitmap: int, **how: Any
    ) -> None:
        await self.ioctl(
            "KVM_CLEAR_DIRTY_LOG",
            slot=slot,
            first_page=first_page,
            num_pages=num_pages,
            dirty_bitmap=dirty_bitmap,
            **how,
        )

    async def reset_dirty_rings(self, **how: Any) -> int:
        """How many harvested entries KVM took back."""
        ret: int = (await self.ioctl("KVM_RESET_DIRTY_RINGS", **how)).body["ret"]
        return ret

    async def create_guest_memfd(
        self, size: int, flags: int = 0, reserved: int = 0, **how: Any
    ) -> GuestMemfd:
        reply = await self.ioctl("KVM_CREATE_GUEST_MEMFD", size=size, flags=flags, reserved=reserved, **how)
        return GuestMemfd(self.loop, reply.fds.take(0), "guest_memfd")

    async def set_memory_attributes(
        self, address: int, size: int, attributes: int, flags: int = 0, **how: Any
    ) -> None:
        await self.ioctl(
            "KVM_SET_MEMORY_ATTRIBUTES", address=address, size=size, attributes=attributes, flags=flags, **how
        )

    async def page_track_add(self, gpa: int) -> None:
        await self.ioctl("PAGE_TRACK_ADD", gpa=gpa)

    async def page_track_remove(self, gpa: int) -> None:
        await self.ioctl("PAGE_TRACK_REMOVE", gpa=gpa)

    async def create_tdp_fd(self, as_id: int = 0, mode: int = 0, pad: int = 0, **how: Any) -> int:
        """The TDP FD: a number of ours, to be closed by us."""
        reply = await self.ioctl("KVM_CREATE_TDP_FD", as_id=as_id, mode=mode, pad=pad, **how)
        return reply.fds.take(0)


def _region(slot: int, gpa: int, size: int, hva: int, flags: int) -> dict[str, Any]:
    return {
        "slot": slot,
        "flags": flags,
        "guest_phys_addr": gpa,
        "memory_size": size,
        "userspace_addr": hva,
    }


def _dup(kernel: Kernel, fd: int) -> int | None:
    """A copy to send along; None if the number is not open."""
    try:
        return kernel.dup(fd)
    except (OSError, OverflowError):
        return None
