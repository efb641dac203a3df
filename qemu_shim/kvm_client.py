"""KVM, as a VMM calls it: thin names over the requests of `protocol/uapi/kvm.py`.

The front door stands for the host: a process starts there, opens /dev/kvm, and gets its VM.
"""

from __future__ import annotations

from pathlib import Path

from protocol.rpc.channel import Body, Channel
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect
from protocol.uapi import names
from qemu_shim.file import File
from qemu_shim.process import Process
from qemu_shim.vcpu import Vcpu


class Kvmd:
    """kvmd's front door."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @classmethod
    async def connect(cls, loop: Loop, path: Path) -> Kvmd:
        return cls(Channel(loop, await connect(path), "kvmd"))

    async def start_process(self) -> Process:
        """A host process: its address space lives until the last copy of its fd is closed."""
        reply = await self._channel.ask("MM_CREATE")
        return Process(self._channel.loop, reply.fds.take(0), "mm")

    async def create_vm(self, process: Process) -> Vm:
        reply = await self._channel.ask("OPEN", {"path": names.KVM_PATH})
        dev_kvm = File(self._channel.loop, reply.fds.take(0), "/dev/kvm")
        try:
            made = await dev_kvm.ask("KVM_CREATE_VM", [process.dup()])
        finally:
            dev_kvm.close()
        return Vm(self._channel.loop, made.fds.take(0), "vm")

    @property
    def channel(self) -> Channel:
        """For what is asked of the host but not by a VMM (`qemu_shim/inspector.py`)."""
        return self._channel

    async def stats(self) -> Body:
        return (await self._channel.ask("STATS")).body

    async def violations(self) -> list[str]:
        """What does not hold now, by kvmd's own check."""
        found: list[str] = (await self._channel.ask("CHECK")).body["violations"]
        return found

    def close(self) -> None:
        self._channel.close()


class Vm(File):
    async def create_vcpu(self, vcpu_id: int) -> Vcpu:
        reply = await self.ask("KVM_CREATE_VCPU", vcpu_id=vcpu_id)
        return Vcpu(self.loop, reply.fds.take(0), f"vcpu{vcpu_id}")

    async def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        await self.ask(
            "KVM_SET_USER_MEMORY_REGION",
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=hva,
        )

    async def create_tdp_fd(self, as_id: int = 0, mode: int = 0, pad: int = 0) -> int:
        """The TDP FD: a number of ours, to be closed by us."""
        reply = await self.ask("KVM_CREATE_TDP_FD", as_id=as_id, mode=mode, pad=pad)
        return reply.fds.take(0)
