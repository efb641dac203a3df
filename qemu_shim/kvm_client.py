"""KVM and the host process, as a VMM calls them: thin names over the requests of `protocol/uapi/kvm.py`.

Every object is a channel of its own, over the fd the kernel would have given; closing it drops the reference.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import UapiError
from protocol.rpc.channel import Body, Channel, Reply
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect
from protocol.uapi import names


class File:
    """An fd that answers requests."""

    def __init__(self, loop: Loop, fd: int, name: str) -> None:
        self.loop = loop
        self._fd = fd
        self._channel = Channel(loop, socket.socket(fileno=fd), name)

    async def ask(self, op: str, fds: Sequence[int] = (), **body: Any) -> Reply:
        """One request; raises UapiError, or PeerGone when the daemon hung up."""
        return await self._channel.ask(op, body, fds)

    def dup(self) -> int:
        """A copy of the fd, to pass on."""
        return os.dup(self._fd)

    def close(self) -> None:
        """Drop our reference."""
        if not self._channel.closed:
            self._channel.close()


@dataclass(frozen=True, slots=True)
class MmioExit:
    """KVM_EXIT_MMIO: the access the guest could not make."""

    gpa: int
    size: int
    is_write: bool


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

    async def stats(self) -> Body:
        return (await self._channel.ask("STATS")).body

    async def violations(self) -> list[str]:
        """What does not hold now, by kvmd's own check."""
        found: list[str] = (await self._channel.ask("CHECK")).body["violations"]
        return found

    def close(self) -> None:
        self._channel.close()


class Process(File):
    """The VMM's own address space."""

    async def mmap(
        self, size: int, *, addr: int | None = None, prot: str = "rw", page_size: int = 4096
    ) -> int:
        reply = await self.ask("MMAP", addr=addr, size=size, prot=prot, page_size=page_size)
        hva: int = reply.body["addr"]
        return hva

    async def munmap(self, addr: int, size: int) -> None:
        await self.ask("MUNMAP", addr=addr, size=size)

    async def madvise_dontneed(self, addr: int, size: int) -> None:
        await self.ask("MADVISE", addr=addr, size=size, advice="dontneed")

    async def move_pages(self, addr: int, size: int) -> int:
        moved: int = (await self.ask("MOVE_PAGES", addr=addr, size=size)).body["moved"]
        return moved

    async def read(self, addr: int, size: int) -> bytes:
        data: bytes = (await self.ask("READ", addr=addr, size=size)).body["data"]
        return data

    async def write(self, addr: int, data: bytes) -> None:
        await self.ask("WRITE", addr=addr, data=data)


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


class Vcpu(File):
    async def set_cpuid(self, maxphyaddr: int) -> None:
        await self.ask("KVM_SET_CPUID2", maxphyaddr=maxphyaddr)

    async def run(self, accesses: Sequence[tuple[int, int | bytes]]) -> tuple[list[bytes], MmioExit | None]:
        """KVM_RUN; what the reads gave, and the exit if one came before the end.

        Raises UapiError with the errno KVM_RUN gave.
        """
        body = (await self.ask("KVM_RUN", accesses=list(accesses))).body
        if body["errno"]:
            raise UapiError(body["errno"], f"KVM_RUN: {body['why']}")
        mmio = body.get("mmio")
        left = None if mmio is None else MmioExit(mmio["phys_addr"], mmio["len"], mmio["is_write"])
        return body["reads"], left
