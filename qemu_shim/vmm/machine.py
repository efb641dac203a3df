"""A virtual machine with DSAs passed through: bring-up, tear-down, and what a scenario may do with it.

Bring-up follows the RFC's five steps: process, VM, memslots, vCPU; TDP FD; KVM HWPT on it; device bound and
attached; BAR mapped [RFC 00/42].  Another design differs in how it comes by its HWPT, which is all that the
machine asks its container for.  Tear-down is the same backwards, every fd closed by us.  The device may come
later, to a guest that runs (`bare_machine`, then `attached`), as it does when it is plugged in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from protocol.errors import PeerError, UapiError
from protocol.flow import Flows
from protocol.kernel.linux import LINUX
from protocol.kernel.port import Kernel
from protocol.rpc.channel import Channel
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect
from protocol.uapi import names
from protocol.units import GIB, MIB, PAGE_SHIFT, PAGE_SIZE, Gpa, align_down, align_up
from qemu_shim.guest.memory import GuestMemory
from qemu_shim.vmm.daemons import DEVICE_SIM, IOMMUFDD, KVMD, socket_of
from qemu_shim.vmm.designs import NO_DISCARD, SHARED, Container, Design, RamSlot, Refused
from qemu_shim.vmm.device_client import DeviceSim, Portal
from qemu_shim.vmm.dirty_ring import DirtyRing
from qemu_shim.vmm.inspector import Inspector
from qemu_shim.vmm.iommufd_client import Iommu, Iommufdd, VfioDevice
from qemu_shim.vmm.kvm_client import Kvmd, Vm
from qemu_shim.vmm.private_ram import PrivateRam
from qemu_shim.vmm.process import Process
from qemu_shim.vmm.vcpu import Program, RunResult, Vcpu

LOW_RAM_MAX = 2 * GIB  # what does not fit below goes above 4 GiB, around the hole for devices
HIGH_RAM_GPA = Gpa(4 * GIB)
FIRST_FREE_GPA = Gpa(16 * MIB)  # the guest kernel's own memory ends here


@dataclass(frozen=True, slots=True)
class MachineConfig:
    ram_bytes: int = 1 * GIB
    page_size: int = 4096  # of the host memory behind it
    maxphyaddr: int = 46
    devices: tuple[int, ...] = (0,)  # by their numbers: those it starts with
    vcpus: int = 1
    pinned: bool = False  # all of it, for a device that cannot ask for pages
    dirty_ring_bytes: int = 0  # of each vCPU; none: bitmaps log alone
    design: Design = SHARED
    private_block: int = 0  # RAM may be converted to private in blocks of so many bytes; 0: not at all
    free_from: Gpa = FIRST_FREE_GPA  # the guest kernel's own memory ends here


@dataclass(slots=True)
class Host:
    """The three daemons, by their front doors; `admin` is kvmd's for who looks after the host, if we are
    that.
    """

    loop: Loop
    kvmd: Kvmd
    iommufdd: Iommufdd
    device_sim: DeviceSim
    admin: Channel | None = None
    dumps_to: Path | None = None  # each machine's table is dumped there at its end
    dumps: int = 0
    killer: Callable[[str], Awaitable[None]] | None = None  # of whoever started the daemons
    killed: set[str] = field(default_factory=set)

    async def kill(self, daemon: str) -> None:
        """As of `kill -9`, by its name.  LookupError: there is none, or it is not ours."""
        if self.killer is None:
            raise LookupError(f"{daemon} was not started for this run: it is not ours to kill")
        await self.killer(daemon)
        self.killed.add(daemon)

    async def started_with(self) -> dict[str, list[str]]:
        """The options of each daemon, by its name."""
        return {
            KVMD.name: await self.kvmd.started_with(),
            IOMMUFDD.name: await self.iommufdd.started_with(),
            DEVICE_SIM.name: await self.device_sim.started_with(),
        }

    def dump_directory(self) -> Path:
        """The first machine's is the one that was named, the second's is `2` in it, and so on."""
        assert self.dumps_to is not None
        self.dumps += 1
        return self.dumps_to if self.dumps == 1 else self.dumps_to / str(self.dumps)


@dataclass(slots=True)
class BareMachine:
    """A guest can run, and has no device."""

    host: Host
    config: MachineConfig
    process: Process
    vm: Vm
    vcpus: list[Vcpu]
    slots: list[RamSlot]
    cpus: list[GuestCpu]
    memory: GuestMemory  # as the first of them sees it
    rings: list[DirtyRing]  # the vCPUs', if they log into such

    @property
    def vcpu(self) -> Vcpu:
        return self.vcpus[0]

    @property
    def cpu(self) -> GuestCpu:
        return self.cpus[0]

    def hva_of(self, gpa: int) -> int:
        slot = self.slot_of(gpa)
        return slot.hva + gpa - slot.gpa

    def slot_of(self, gpa: int) -> RamSlot:
        for slot in self.slots:
            if slot.gpa <= gpa < slot.gpa + slot.size:
                return slot
        raise LookupError(f"gpa {gpa:#x} is no RAM")


@dataclass(slots=True)
class PassedThrough:
    """A device of the machine: `dev_id` is iommufd's number of it."""

    number: int
    vfio: VfioDevice
    dev_id: int
    portal: Portal

    def close(self) -> None:
        self.portal.close()
        self.vfio.close()


@dataclass(slots=True)
class Machine(BareMachine):
    """All its devices are attached to one HWPT; the first gave it."""

    container: Container
    iommu: Iommu
    hwpt_id: int
    devices: list[PassedThrough]

    @property
    def device(self) -> VfioDevice:
        return self.devices[0].vfio

    @property
    def device_id(self) -> int:
        return self.devices[0].dev_id

    @property
    def portal(self) -> Portal:
        return self.devices[0].portal

    async def plug(self, number: int) -> PassedThrough:
        """One more device, by its number.  Refused: it cannot be attached to the machine's table."""
        vfio = await self.host.iommufdd.open_device(number)
        try:
            dev_id = await vfio.bind(self.iommu)
            await _attach(vfio, self.hwpt_id, self.config)
            plugged = PassedThrough(number, vfio, dev_id, await vfio.map_portal())
        except BaseException:
            vfio.close()
            raise
        self.devices.append(plugged)
        return plugged

    async def unplug(self, device: PassedThrough) -> None:
        """Detached by request, then its fds are closed."""
        self.devices.remove(device)
        await device.vfio.detach()
        device.close()

    @property
    def tdp_fd(self) -> int:
        """Refused: the design exports none."""
        if self.container.tdp_fd is None:
            raise Refused("export of the TDP", f"design {self.config.design.name} has a table of its own")
        return self.container.tdp_fd

    async def add_slot(self, slot: int, gpa: int, size: int, page_size: int | None = None) -> RamSlot:
        """More RAM: memory of our process, the device's view of it, and a memslot on it."""
        added = RamSlot(
            slot, gpa, size, await self.process.mmap(size, page_size=page_size or self.config.page_size)
        )
        await self.container.add(added)
        await self.vm.set_user_memory_region(slot, gpa, size, added.hva)
        self.slots.append(added)
        return added

    async def remove_slot(self, slot: RamSlot) -> None:
        """Take that RAM away: from the device before the memslot goes, from the process last."""
        self.slots.remove(slot)
        await self.container.remove(slot)
        await self.vm.set_user_memory_region(slot.slot, slot.gpa, 0, 0)
        await self.process.munmap(slot.hva, slot.size)

    async def discard(self, gpa: int, size: int) -> None:
        """What a balloon does with pages the guest gave up.  Refused."""
        if self.config.pinned or self.config.design.pins:
            raise Refused("ballooning", NO_DISCARD)
        await self.process.madvise_dontneed(self.hva_of(gpa), size)

    async def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """What the guest asks for with KVM_HC_MAP_GPA_RANGE; what the pages held is gone.  The device loses
        shared pages before the guest has private ones, and gets new ones after: QEMU sets the attribute
        first, where KVM lets both be; for memory that is converted in place the order is this one
        [QEMU kvm-all.c].  ValueError: not whole blocks of RAM that may be private.
        """
        slot = self.slot_of(gpa)
        offset, ram = gpa - slot.gpa, slot.attributes
        if ram is None or offset + size > slot.size:
            raise ValueError(f"{gpa:#x}+{size:#x} is no RAM that may be private")
        for at in ram.blocks(offset, size, private=not private):
            await self._convert(slot, ram, at, private=private)

    async def _convert(self, slot: RamSlot, ram: PrivateRam, at: int, *, private: bool) -> None:
        gpa, block = slot.gpa + at, ram.block
        if not private:
            await self.vm.set_memory_attributes(gpa, block, 0)
            ram.private.discard(at)
            await ram.memfd.punch_hole(at, block)
            await self.container.populate(slot, at, block)
            return
        await self.container.discard(slot, at, block)
        try:
            await self.vm.set_memory_attributes(gpa, block, names.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        except UapiError:
            await self.container.populate(slot, at, block)
            raise
        ram.private.add(at)
        await self.process.madvise_dontneed(slot.hva + at, block)

    async def dump(self, directory: Path) -> None:
        """Write the table as it is now, for other tools."""
        await Inspector(self.host.kvmd.channel).dump(directory, self.vm)


class GuestCpu:
    """A vCPU as the guest's own code sees it: an access either happens or is a bug of the guest's.

    The guest's tasks share it: one runs at a time.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self.bytes = 0  # loaded and stored
        self.pages = 0  # each access those it meets
        self._vcpu = vcpu
        self._busy = trio.Lock()

    async def access(self, accesses: Sequence[tuple[int, int | bytes]]) -> list[bytes]:
        """(gpa, size) loads, (gpa, bytes) stores, in order; what was loaded.  LookupError: no RAM there."""
        ran = await self._run(
            [("r", gpa, what) if isinstance(what, int) else ("w", gpa, what) for gpa, what in accesses]
        )
        for gpa, what in accesses:
            self._count(gpa, what if isinstance(what, int) else len(what))
        return ran.reads

    async def store_nothing(self, gpa: int) -> None:
        """`lock addb $0`: stores the byte that is there, whoever else stores to it meanwhile."""
        await self._run([("add", gpa, 1, 0)])
        self._count(gpa, 1)

    async def _run(self, program: Program) -> RunResult:
        async with self._busy:
            ran = await self._vcpu.run(program)
        if ran.errno:
            raise UapiError(ran.errno, f"KVM_RUN: {ran.why}")
        if ran.mmio is not None:
            raise LookupError(f"the guest touched gpa {ran.mmio.phys_addr:#x}, where no RAM is")
        return ran

    def _count(self, gpa: int, size: int) -> None:
        self.bytes += size
        self.pages += (align_up(gpa + size, PAGE_SIZE) - align_down(gpa, PAGE_SIZE)) >> PAGE_SHIFT


@asynccontextmanager
async def connect_host(
    directory: Path,
    admin: Path | None = None,
    *,
    kernel: Kernel = LINUX,
    flows: Callable[[Callable[[BaseException], None]], Flows] = Flows,
) -> AsyncIterator[Host]:
    """Reach the daemons whose sockets are in `directory`, and kvmd's `admin` socket if it is given; serves
    messages for as long as it is open.
    """
    crashes: list[BaseException] = []
    loop = Loop(kernel, flows(crashes.append))
    try:
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            nursery.start_soon(loop.serve)
            stack.callback(nursery.cancel_scope.cancel)
            kvmd = await Kvmd.connect(loop, socket_of(KVMD, directory))
            stack.callback(kvmd.close)
            iommufdd = await Iommufdd.connect(loop, socket_of(IOMMUFDD, directory))
            stack.callback(iommufdd.close)
            device_sim = await DeviceSim.connect(loop, socket_of(DEVICE_SIM, directory))
            stack.callback(device_sim.close)
            host = Host(loop, kvmd, iommufdd, device_sim)
            if admin is not None:
                host.admin = Channel(loop, await connect(loop.kernel, admin), "kvmd-admin")
                stack.callback(host.admin.close)
            yield host
    finally:
        loop.close()
    if crashes:
        raise crashes[0]


@asynccontextmanager
async def machine(host: Host, config: MachineConfig) -> AsyncIterator[Machine]:
    """A running machine; everything it opened is closed at the end, the device detached first."""
    async with bare_machine(host, config) as bare, attached(bare) as built:
        yield built


@asynccontextmanager
async def bare_machine(host: Host, config: MachineConfig) -> AsyncIterator[BareMachine]:
    async with AsyncExitStack() as stack:
        process = await host.kvmd.start_process()
        stack.callback(process.close)
        vm = await host.kvmd.create_vm(process, names.KVM_X86_SW_PROTECTED_VM if config.private_block else 0)
        stack.callback(vm.close)
        if config.dirty_ring_bytes:
            await vm.enable_cap(names.KVM_CAP_DIRTY_LOG_RING, config.dirty_ring_bytes)
            await vm.enable_cap(names.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)
        slots = await _add_ram(process, vm, config, stack)
        vcpus = []
        for number in range(config.vcpus):
            vcpus.append(await vm.create_vcpu(number))
            stack.callback(vcpus[-1].close)
            await vcpus[-1].set_cpuid(config.maxphyaddr)
        rings = []
        for vcpu in vcpus if config.dirty_ring_bytes else ():
            rings.append(await vcpu.dirty_ring())
            stack.callback(rings[-1].close)
        cpus = [GuestCpu(vcpu) for vcpu in vcpus]
        memory = GuestMemory(cpus[0], config.free_from, Gpa(slots[0].gpa + slots[0].size))
        yield BareMachine(host, config, process, vm, vcpus, slots, cpus, memory, rings)


@asynccontextmanager
async def attached(bare: BareMachine) -> AsyncIterator[Machine]:
    """The machine with its devices, whatever its guest did before."""
    host, config = bare.host, bare.config
    async with AsyncExitStack() as stack:
        container = await config.design.open(bare.vm, bare.process)
        stack.callback(container.close)
        iommu = await host.iommufdd.open_iommu(bare.process)
        stack.callback(iommu.close)
        first = await host.iommufdd.open_device(config.devices[0])
        stack.callback(first.close)
        dev_id = await first.bind(iommu)
        hwpt_id = await container.hwpt(iommu, dev_id, bare.slots)
        await _attach(first, hwpt_id, config)
        portal = await first.map_portal()
        stack.callback(portal.close)
        of_bare = (host, config, bare.process, bare.vm, bare.vcpus, bare.slots, bare.cpus)
        of_bare_too = (bare.memory, bare.rings)
        devices = [PassedThrough(config.devices[0], first, dev_id, portal)]
        built = Machine(*of_bare, *of_bare_too, container, iommu, hwpt_id, devices)
        try:
            for number in config.devices[1:]:
                await built.plug(number)
            yield built
            if host.dumps_to is not None:
                await built.dump(host.dump_directory())
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                await _quiesce(built)
            for device in built.devices:
                if device.vfio is not first:  # which may have been taken out, and is closed below
                    device.close()


async def _attach(device: VfioDevice, hwpt_id: int, config: MachineConfig) -> None:
    try:
        await device.attach(hwpt_id, pinned=config.pinned)
    except UapiError as error:
        raise Refused("attaching the device", error.why, error.errno) from None


async def _add_ram(process: Process, vm: Vm, config: MachineConfig, stack: AsyncExitStack) -> list[RamSlot]:
    low = min(config.ram_bytes, LOW_RAM_MAX)
    pieces = [(0, low)]
    if config.ram_bytes > low:
        pieces.append((HIGH_RAM_GPA, config.ram_bytes - low))
    slots = []
    for slot, (gpa, size) in enumerate(pieces):
        hva = await process.mmap(size, page_size=config.page_size)
        if config.private_block:
            ram = PrivateRam(await vm.create_guest_memfd(size), config.private_block)
            stack.callback(ram.memfd.close)
            flags = names.KVM_MEM_GUEST_MEMFD
            await vm.set_user_memory_region2(slot, gpa, size, hva, flags, guest_memfd=ram.memfd)
        else:
            ram = None
            await vm.set_user_memory_region(slot, gpa, size, hva)
        slots.append(RamSlot(slot, gpa, size, hva, ram))
    return slots


async def _quiesce(built: Machine) -> None:
    """Detach and destroy by request, so that nothing depends on the order in which fds close."""
    # A daemon may be gone, or the scenario did it already: closing the fds does the rest.
    for device in reversed(built.devices):
        with suppress(UapiError, PeerError):
            await device.vfio.detach()
    with suppress(UapiError, PeerError):
        await built.iommu.destroy(built.hwpt_id)
