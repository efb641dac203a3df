"""IOMMUFD and VFIO devices, as a VMM calls them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from protocol.rpc.channel import Body, Channel
from protocol.rpc.loop import Loop
from protocol.rpc.socket import connect
from protocol.uapi import names
from qemu_shim.vmm.device_client import Portal
from qemu_shim.vmm.file import File, copies
from qemu_shim.vmm.kvm_client import Vm
from qemu_shim.vmm.process import MemFd, Process
from qemu_shim.vmm.stats import ask_all


class Iommufdd:
    """iommufdd's front door."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @classmethod
    async def connect(cls, loop: Loop, path: Path) -> Iommufdd:
        return cls(Channel(loop, await connect(loop.kernel, path), "iommufdd"))

    async def open_iommu(self, process: Process) -> Iommu:
        """Open /dev/iommu as `process`."""
        reply = await self._channel.ask("OPEN", {"path": names.IOMMU_PATH}, [process.dup()])
        return Iommu(self._channel.loop, reply.fds.take(0), "iommufd")

    async def open_device(self, number: int = 0) -> VfioDevice:
        reply = await self._channel.ask("OPEN", {"path": f"{names.VFIO_PATH}{number}"})
        return VfioDevice(self._channel.loop, reply.fds.take(0), f"vfio{number}")

    async def stats(self) -> Body:
        """Of every HWPT."""
        body, hwpts = await ask_all(self._channel, "hwpts", "did")
        return {**body, "hwpts": hwpts}

    async def started_with(self) -> list[str]:
        """Its options, but for where its sockets are: `--devices 4`."""
        options: list[str] = (await self._channel.ask("STARTED_WITH")).body["options"]
        return options

    async def violations(self) -> list[str]:
        """What iommufdd's own check finds wrong."""
        found: list[str] = (await self._channel.ask("CHECK")).body["violations"]
        return found

    def close(self) -> None:
        self._channel.close()


class Iommu(File):
    async def hwpt_alloc_kvm(self, dev_id: int, tdp_fd: int, flags: int = 0) -> int:
        """IOMMU_HWPT_ALLOC on a TDP FD, which stays the caller's; the HWPT's id [RFC 12/42]."""
        reply = await self.ask(
            "IOMMU_HWPT_ALLOC",
            [self.loop.kernel.dup(tdp_fd)],
            flags=flags,
            dev_id=dev_id,
            data_type=names.IOMMU_HWPT_DATA_KVM,
            data_len=names.HWPT_KVM_INFO_SIZE,
            data_uptr=tdp_fd.to_bytes(names.HWPT_KVM_INFO_SIZE, "little"),
            fd_table=[tdp_fd],
        )
        hwpt_id: int = reply.body["out_hwpt_id"]
        return hwpt_id

    async def hwpt_alloc(self, dev_id: int, ioas_id: int) -> int:
        """IOMMU_HWPT_ALLOC on an IOAS: what is mapped there is the HWPT's table, or comes on demand."""
        reply = await self.ask(
            "IOMMU_HWPT_ALLOC",
            dev_id=dev_id,
            pt_id=ioas_id,
            data_type=names.IOMMU_HWPT_DATA_NONE,
            data_len=0,
            data_uptr=None,
        )
        hwpt_id: int = reply.body["out_hwpt_id"]
        return hwpt_id

    async def ioas_alloc(self, *, on_demand: bool = False) -> int:
        flags = names.IOMMU_IOAS_ON_DEMAND if on_demand else 0
        ioas_id: int = (await self.ask("IOMMU_IOAS_ALLOC", flags=flags)).body["out_ioas_id"]
        return ioas_id

    async def ioas_map(
        self,
        ioas_id: int,
        process: Process,
        user_va: int,
        length: int,
        iova: int | None = None,
        *,
        readable: bool = True,
        writable: bool = True,
    ) -> int:
        """Map memory of `process` at `iova`, or where there is room; the iova."""
        flags = _map_flags(iova, readable=readable, writable=writable)
        body = {"flags": flags, "ioas_id": ioas_id, "user_va": user_va, "length": length, "iova": iova or 0}
        mapped: int = (await self.ask("IOMMU_IOAS_MAP", [process.dup()], **body)).body["iova"]
        return mapped

    async def ioas_map_file(
        self,
        ioas_id: int,
        process: Process,
        file: MemFd,
        start: int,
        length: int,
        iova: int | None = None,
        *,
        writable: bool = True,
    ) -> int:
        """Map `length` bytes of a memfd, charged to `process`, at `iova` or where there is room; the iova."""
        reply = await self.ask(
            "IOMMU_IOAS_MAP_FILE",
            copies([process, file]),
            flags=_map_flags(iova, readable=True, writable=writable),
            ioas_id=ioas_id,
            fd=file.number,
            start=start,
            length=length,
            iova=iova or 0,
            fd_table=[file.number],
        )
        mapped: int = reply.body["iova"]
        return mapped

    async def change_process(self, process: Process) -> None:
        """`process` pays for what the IOASes have pinned, all of it of files, from now on."""
        await self.ask("IOMMU_IOAS_CHANGE_PROCESS", [process.dup()])

    async def ioas_copy(
        self,
        src_ioas_id: int,
        src_iova: int,
        length: int,
        dst_ioas_id: int,
        dst_iova: int | None = None,
        *,
        writable: bool = True,
    ) -> int:
        """Map what is mapped in `src_ioas_id` in `dst_ioas_id` too, at `dst_iova` or where there is room; the
        iova.
        """
        reply = await self.ask(
            "IOMMU_IOAS_COPY",
            flags=_map_flags(dst_iova, readable=True, writable=writable),
            src_ioas_id=src_ioas_id,
            src_iova=src_iova,
            length=length,
            dst_ioas_id=dst_ioas_id,
            dst_iova=dst_iova or 0,
        )
        copied: int = reply.body["dst_iova"]
        return copied

    async def ioas_unmap(self, ioas_id: int, iova: int, length: int) -> int:
        """The bytes unmapped."""
        reply = await self.ask("IOMMU_IOAS_UNMAP", ioas_id=ioas_id, iova=iova, length=length)
        unmapped: int = reply.body["length"]
        return unmapped

    async def iova_ranges(self, ioas_id: int) -> list[tuple[int, int]]:
        """(first, last) of what may be mapped."""
        reply = await self.ask("IOMMU_IOAS_IOVA_RANGES", ioas_id=ioas_id)
        return [(start, last) for start, last in reply.body["allowed_iovas"]]

    async def allow_iovas(self, ioas_id: int, ranges: Sequence[tuple[int, int]]) -> None:
        """These (first, last) stay available, and room is found in them alone; none: everywhere."""
        memory = b"".join(iova.to_bytes(8, "little") for span in ranges for iova in span)
        await self.ask("IOMMU_IOAS_ALLOW_IOVAS", ioas_id=ioas_id, num_iovas=len(ranges), allowed_iovas=memory)

    async def set_huge_pages(self, ioas_id: int, *, on: bool) -> None:
        """Whether its HWPTs have leaves larger than 4 KiB from now on."""
        await self.ask(
            "IOMMU_OPTION", option_id=names.IOMMU_OPTION_HUGE_PAGES, object_id=ioas_id, val64=int(on)
        )

    async def set_rlimit_mode(self, mode: Literal["user", "mm"]) -> None:
        """Whose locked memory pins count in, chosen before there is any object."""
        await self.ask("IOMMU_OPTION", option_id=names.IOMMU_OPTION_RLIMIT_MODE, val64=int(mode == "mm"))

    async def follow_kvm(self, ioas_id: int, vm: Vm) -> None:
        """Map into an IOAS on demand what the VM's vCPUs fault in."""
        await self.ask("IOMMU_IOAS_FOLLOW_KVM", [vm.dup()], ioas_id=ioas_id)

    async def destroy(self, object_id: int) -> None:
        await self.ask("IOMMU_DESTROY", id=object_id)


def _map_flags(iova: int | None, *, readable: bool, writable: bool) -> int:
    flags = readable * names.IOMMU_IOAS_MAP_READABLE | writable * names.IOMMU_IOAS_MAP_WRITEABLE
    return flags if iova is None else flags | names.IOMMU_IOAS_MAP_FIXED_IOVA


class VfioDevice(File):
    async def bind(self, iommu: Iommu) -> int:
        reply = await self.ask("VFIO_DEVICE_BIND_IOMMUFD", [iommu.dup()])
        device_id: int = reply.body["out_devid"]
        return device_id

    async def attach(self, hwpt_id: int, *, pinned: bool = False) -> None:
        await self.ask("VFIO_DEVICE_ATTACH_IOMMUFD_PT", pt_id=hwpt_id, pinned=pinned)

    async def pin(self, iova: int, length: int) -> None:
        """What the guest gave to the device for good, and the device does not ask for [RFC 00/42]."""
        await self.ask("VFIO_DEVICE_PIN", iova=iova, length=length)

    async def unpin(self, iova: int, length: int) -> None:
        await self.ask("VFIO_DEVICE_UNPIN", iova=iova, length=length)

    async def detach(self) -> None:
        await self.ask("VFIO_DEVICE_DETACH_IOMMUFD_PT")

    async def map_portal(self) -> Portal:
        """Map the device's BAR into the guest."""
        reply = await self.ask("VFIO_DEVICE_MMAP", region=2)
        return Portal(self.loop, reply.fds.take(0))
