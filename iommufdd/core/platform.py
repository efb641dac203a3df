"""The hardware there is, and what was made of it: page request threads, groups, device nodes, domain ids.

Models what the kernel keeps of units and functions between probing and removal [VT-d 8.3], [iommufd
device.c], [VFIO device_cdev.c].  Hardware that goes does not come back: what is found later is other
hardware, with units and groups of its own (docs/decisions/0015).  Domain ids are the same behind every unit,
and outlive none: one is free once its HWPT is destroyed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

from iommufdd.core.counts import UnitCounts
from iommufdd.core.device import IommufdDevice
from iommufdd.core.fault_policy import FaultPolicy
from iommufdd.core.group import IommufdGroup
from iommufdd.core.hardware import FunctionInfo, Hardware, Unit
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.iopf import Iopf
from iommufdd.core.log import Log
from iommufdd.core.vfio import VfioDeviceFile
from protocol.errors import UapiError
from protocol.flow import Flow, RwLock
from protocol.hw.pasid_entry import FIRST_SS_DID

Probe = Callable[[], Coroutine[Any, Any, Hardware]]
Spawn = Callable[[Flow[None]], None]


class Platform:
    """`probe` looks for hardware: ENODEV: there is none; EBUSY: another driver has it."""

    def __init__(
        self,
        hardware: Hardware,
        probe: Probe,
        policy: FaultPolicy,
        counts: UnitCounts,
        spawn: Spawn,
        log: Log,
    ) -> None:
        self.hardware = hardware
        self.iopfs: dict[Unit, Iopf] = {}
        self.groups: dict[int, IommufdGroup] = {}
        self.opened: dict[tuple[Unit, int], VfioDeviceFile] = {}  # by unit and requester id
        self.hwpts: dict[int, Hwpt] = {}  # by domain id
        self._probe = probe
        self._policy = policy
        self._counts = counts
        self.spawn = spawn
        self._log = log
        self._probing = RwLock()

    # -- hardware --------------------------------------------------------------------------------------

    def found(self, hardware: Hardware) -> None:
        """Probed: these are the units from now on, and none of them is known."""
        self.hardware = hardware
        self.iopfs = {unit: self._iopf(unit) for unit in hardware.units}
        self.groups = {info.group: IommufdGroup(info.group) for info, _ in hardware.functions}

    def _iopf(self, unit: Unit) -> Iopf:
        def find(rid: int) -> IommufdDevice | None:
            node = self.opened.get((unit, rid))
            return None if node is None else node.bound

        return Iopf(find, unit.respond, self.spawn, self._counts, self._log)

    async def live(self) -> Hardware:
        """The hardware, probed again if it went.  Errors as of `probe`."""
        async with self._probing:
            if not self.hardware.alive:
                self.found(await self._probe())
                self._log.info("the remapping unit is there again", units=len(self.hardware.units))
            return self.hardware

    def gone(self) -> None:
        """The hardware went: groups that are not whole never will be."""
        for iopf in self.iopfs.values():
            iopf.partial.discard()

    def hardware_of(self, device: IommufdDevice) -> Hardware:
        """ENODEV: it went with its unit."""
        if not self.hardware.alive or device.unit not in self.hardware.units:
            raise UapiError(errno.ENODEV, f"{device.info.name} went with its remapping unit")
        return self.hardware

    # -- device nodes ----------------------------------------------------------------------------------

    async def open(self, number: int, path: str) -> VfioDeviceFile:
        """The node of that number.  ENOENT: there is none; EBUSY: it is open; errors as of `live`."""
        hardware = await self.live()
        functions = hardware.functions
        if number >= len(functions):
            raise UapiError(errno.ENOENT, f"open {path!r}: there are {len(functions)} devices")
        info, unit = functions[number]
        if (unit, info.rid) in self.opened:
            raise UapiError(errno.EBUSY, f"{path} is open already")
        return self._opened(hardware, info, unit)

    def _opened(self, hardware: Hardware, info: FunctionInfo, unit: Unit) -> VfioDeviceFile:
        group, partial = self.groups[info.group], self.iopfs[unit].partial
        node = self.opened[unit, info.rid] = VfioDeviceFile(
            hardware, info, unit, group, self._policy, partial
        )
        return node

    async def close(self, node: VfioDeviceFile) -> None:
        """Unbound, and may be opened again when this returns."""
        # await: node: cannot change: the caller's own, whose fd is closed
        await node.unbind()
        del self.opened[node.unit, node.info.rid]

    @property
    def devices(self) -> list[IommufdDevice]:
        """Those that are bound."""
        return [node.bound for node in self.opened.values() if node.bound is not None]

    # -- domains ---------------------------------------------------------------------------------------

    def new_did(self) -> int:
        """A domain id that is free behind every unit.  ENOSPC."""
        ids = self.hardware.domain_ids
        did = next((d for d in range(FIRST_SS_DID, ids) if d not in self.hwpts), None)
        if did is None:
            raise UapiError(errno.ENOSPC, f"all {ids} domain ids are in use")
        return did

    async def destroy_hwpt(self, hwpt: Hwpt) -> None:
        """Its domain id is free when this returns, and no sooner: the units may have tagged something with
        it.
        """
        # await: hwpt: cannot change: the caller took it out of its iommufd's objects
        await hwpt.destroy()
        del self.hwpts[hwpt.domain.did]

    async def lose_kvm(self, hwpt: Hwpt) -> None:
        """KVM hung up: nobody maintains the table any more, so nobody may walk it (R28).  It may live,
        and wait for the lease with whatever it had told us of.
        """
        hwpt.maintained = False
        self._log.error("KVM is gone: its devices are detached", hwpt=hwpt.id, functions=len(hwpt.attached))
        for node in list(self.opened.values()):
            # await: hwpt, each node: cannot change: who comes meanwhile is refused (`check_walkable`), who
            # went is on it no more; and who destroys it has given its memory back, which is done once
            await node.leave(hwpt)
        await hwpt.give_back()

    # -- what must hold --------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """I24 for every unit."""
        found = []
        for unit, iopf in self.iopfs.items():
            on = {d.rid: d.hwpt for d in self.devices if d.unit is unit and d.hwpt is not None}
            found += iopf.partial.check(on)
        return found
