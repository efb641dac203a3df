"""Ours: what user space asks of a whole memslot of 4 KiB pages, through messages to kvmd.

One VM that lends its table to nobody, one vCPU that stores to every page; the same steps as of
rivals/kvm_log.c.

    python -m bench.ours.ranges COUNT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from statistics import median
from time import perf_counter_ns

import trio

from bench.timing import require_one_core
from protocol.daemon import configure_log
from protocol.uapi import names
from protocol.units import GIB, PAGE_SIZE
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.machine import Host, connect_host
from qemu_shim.vmm.process import Process
from qemu_shim.vmm.supervisor import supervised
from qemu_shim.vmm.vcpu import Vcpu

AT = 4 * GIB
BATCH = 256  # stores of one KVM_RUN
CLEAN = 9


def pages_of(count: int) -> int:
    """As of rivals/rival.h: 20,000 is 1 GiB."""
    return max(512, count * 262144 // 20000 // 512 * 512)


def main(count: int) -> None:
    require_one_core()
    configure_log("warning")
    parts = trio.run(timed, pages_of(count))
    whole = parts["get all dirty"]
    sys.stdout.write(json.dumps({"p50": whole, "p99": whole, "parts": parts}) + "\n")


async def timed(pages: int) -> dict[str, float]:
    """Nanoseconds of each step."""
    async with supervised({}, "warning") as supervisor, connect_host(supervisor.directory) as host:
        slot = await Slot.made(host, pages)
        await slot.touch()
        parts = {"logging on": await slot.log(on=True)}
        parts["get clean"] = median([await slot.get(0) for _ in range(CLEAN)])
        await slot.touch()
        parts["get all dirty"] = await slot.get(pages)
        await slot.log(on=False)
        await slot.touch()
        parts["DONTNEED"] = await took(lambda: slot.process.madvise_dontneed(slot.hva, slot.size))
        await slot.touch()
        parts["delete a slot"] = await slot.set(0, 0)
        slot.close()
        slot = await Slot.made(host, pages, manual=True)
        await slot.touch()
        await slot.log(on=True)
        await slot.touch()
        await slot.get(pages)
        parts["clear"] = await took(lambda: slot.vm.clear_dirty_log(0, 0, pages, slot.bitmap))
        slot.close()
        return parts


async def took(call: Callable[[], Awaitable[object]]) -> float:
    began = perf_counter_ns()
    await call()
    return perf_counter_ns() - began


class Slot:
    """Number 0 of a VM of its own."""

    def __init__(self, process: Process, vm: Vm, vcpu: Vcpu, pages: int) -> None:
        self.process, self.vm, self.vcpu, self.pages = process, vm, vcpu, pages
        self.size = pages * PAGE_SIZE
        self.hva = self.bitmap = 0

    @classmethod
    async def made(cls, host: Host, pages: int, *, manual: bool = False) -> Slot:
        process = await host.kvmd.start_process()
        vm = await host.kvmd.create_vm(process)
        if manual:
            await vm.enable_cap(names.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
        slot = cls(process, vm, await vm.create_vcpu(0), pages)
        slot.hva = await process.mmap(slot.size)
        slot.bitmap = await process.mmap(max(PAGE_SIZE, pages // 8))
        await process.write(slot.bitmap, bytes(pages // 8))  # so that no copy waits for its memory
        await slot.log(on=False)
        return slot

    async def set(self, size: int, flags: int) -> float:
        return await took(lambda: self.vm.set_user_memory_region(0, AT, size, self.hva, flags))

    async def log(self, *, on: bool) -> float:
        return await self.set(self.size, names.KVM_MEM_LOG_DIRTY_PAGES if on else 0)

    async def touch(self) -> None:
        """The guest stores to every page."""
        for gpa in range(AT, AT + self.size, BATCH * PAGE_SIZE):
            ran = await self.vcpu.run([("w", gpa + page * PAGE_SIZE, b"x") for page in range(BATCH)])
            assert not ran.errno, ran.why

    async def get(self, wanted: int) -> float:
        """A report of `wanted` pages."""
        nanoseconds = await took(lambda: self.vm.get_dirty_log(0, self.bitmap))
        told = int.from_bytes(await self.process.read(self.bitmap, self.pages // 8), "little").bit_count()
        assert told == wanted, f"{told} pages are dirty, not {wanted}"
        return nanoseconds

    def close(self) -> None:
        for file in (self.vcpu, self.vm, self.process):
            file.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
