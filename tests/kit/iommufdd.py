"""KVM and the remapping unit as an HWPT and its devices see them: slow, and failing when told to.

Everything they are asked is written to one log, in order; the unit also keeps the state it was left in.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from iommufdd.core import qi
from iommufdd.core.counts import Counts
from iommufdd.core.domain import Domain
from iommufdd.core.hardware import FunctionInfo
from iommufdd.core.hmm import CallerMm, Invalidate
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.hwpt_paging import HwptPaging
from iommufdd.core.io_pagetable import IoPageTable
from iommufdd.core.ioas import Ioas
from iommufdd.core.kvm_domain import KvmDomain
from iommufdd.core.source import Source, Sources
from protocol.errors import UapiError
from protocol.flow import Wait, done
from protocol.hw.caps import Cap, Ecap
from protocol.hw.pasid_entry import PasidEntry
from protocol.hw.qi import Descriptor, ResponseCode
from protocol.pt.mem import TableWriter
from protocol.pt.table_pool import TablePool
from protocol.units import LEVEL_1G, PAGE_SIZE, Hpa, Level, Pasid
from tests.kit.by_hand import ByHand

RID = 0x6A08
DID = 2
ROOT = 0x10_0000
# PSI, MAMV 18, SAGAW 4 and 5 levels, MGAW 57, leaves of 2M and 1G
CAP = Cap(1 << 39 | 18 << 48 | 1 << 10 | 1 << 11 | 56 << 16 | 3 << 34)
# DT, SC, PRS, PDS, SMTS, SSTS, SMPWC
ECAP = Ecap(1 << 2 | 1 << 7 | 1 << 29 | 1 << 42 | 1 << 43 | 1 << 46 | 1 << 48)
GONE = errno.ENODEV


class Fails:
    """The nth call from now on, and those after it, end with this errno."""

    def __init__(self) -> None:
        self.calls_left = -1
        self.errno = 0
        self.lasting = True

    def after(self, calls: int, number: int, *, lasting: bool = True) -> None:
        self.calls_left, self.errno, self.lasting = calls, number, lasting

    def check(self) -> None:
        if self.calls_left == 0:
            if not self.lasting:
                self.calls_left = -1
            raise UapiError(self.errno, "told to fail")
        if self.calls_left > 0:
            self.calls_left -= 1


def function(rid: int = RID, **changed: Any) -> FunctionInfo:
    """A function that can do everything, but for what is changed."""
    usual: dict[str, Any] = {
        "rid": rid,
        "name": f"dsa{rid - RID >> 3}",
        "group": rid,
        **dict.fromkeys(("pasid", "ats", "pri", "pasid_required"), True),
        "fault_capability": "full",
    }
    return FunctionInfo(**{**usual, **changed})


def io_pagetable(pages: int = 64) -> IoPageTable:
    """An empty one in memory of its own."""
    writer = TableWriter(Hpa(ROOT), memoryview(bytearray(pages * PAGE_SIZE)))
    return IoPageTable(writer, TablePool(writer, pages * PAGE_SIZE), Level(4), LEVEL_1G)


class NoLog:
    def info(self, event: str, **values: Any) -> None: ...
    def warning(self, event: str, **values: Any) -> None: ...
    def error(self, event: str, **values: Any) -> None: ...


async def nobody(mm: CallerMm, on_invalidate: Invalidate) -> Source:
    raise AssertionError("nothing is mapped here")


class Surroundings(ByHand):
    """Tdp, Unit, Memory and ConfigSpace in one; `hold` makes the next calls wait until `let_go`."""

    def __init__(self, cap: Cap = CAP, ecap: Ecap = ECAP) -> None:
        super().__init__()
        self.cap = cap
        self.ecap = ecap
        self.log: list[Any] = []
        self.fails = Fails()
        self.fault_errno = 0
        self.held: list[Wait[None]] | None = None
        self.alive = True
        self.entries: dict[int, bytes] = {}
        self.switched: dict[int, dict[str, int]] = {}  # what is on
        self.off_bus: set[int] = set()  # functions
        self.pins = 0  # asked for so far
        self.pri_on = False  # somebody else switched page requests on

    def hwpt(self, level: int = 4, did: int = DID) -> HwptKvm:
        return HwptKvm(KvmDomain(Hpa(ROOT), Level(level), did, LEVEL_1G), self, self)

    def paging(self, did: int = DID + 1) -> HwptPaging:
        table = io_pagetable()
        domain = Domain(table.root, Level(4), did, LEVEL_1G)
        return HwptPaging(domain, self, Ioas(Counts(), Sources(nobody)), table)

    def hold(self) -> None:
        self.held = []

    def let_go(self) -> None:
        held, self.held = self.held, None
        for wait in held or []:
            wait.set(None)
        self.flows.run_ready()

    def let_one_go(self) -> None:
        """What waits; the next call waits again."""
        held, self.held = self.held or [], []
        for wait in held:
            wait.set(None)
        self.flows.run_ready()

    async def _take(self, *what: Any) -> None:
        self.fails.check()
        self.log.append(what)
        wait = done(None)
        if self.held is not None:
            wait = Wait()
            self.held.append(wait)
        await wait

    # -- Tdp -------------------------------------------------------------------------------------------

    async def fault(self, gfn: int, *, read: bool, write: bool, exec: bool) -> None:
        rights = "".join(c for c, on in zip("rwx", (read, write, exec), strict=True) if on)
        await self._take("fault", gfn, rights)
        if self.fault_errno:
            raise UapiError(self.fault_errno, "KVM says no")

    async def pin(self, gfn: int, npages: int) -> int:
        self.pins += 1
        pin = self.pins
        await self._take("pin", gfn, npages)
        return pin

    async def pin_all(self) -> int:
        self.pins += 1
        pin = self.pins
        await self._take("pin_all")
        return pin

    async def unpin(self, pin: int) -> None:
        await self._take("unpin", pin)

    async def unregister(self) -> None:
        await self._take("unregister")

    def release(self) -> None:
        self.log.append(("release",))

    # -- Hardware --------------------------------------------------------------------------------------

    async def submit(self, descriptors: Sequence[Descriptor]) -> None:
        await self._take("submit", b"".join(qi.raw(descriptors)))

    def respond(self, rid: int, prgi: int, code: ResponseCode, pasid: Pasid | None = None) -> bool:
        self.log.append(("respond", rid, prgi, code))
        return self.alive

    async def remove_memory(self, memory: int) -> None:
        await self._take("remove_memory", memory)

    def check_on_bus(self, rid: int) -> None:
        if rid in self.off_bus:
            raise UapiError(errno.EIO, "off the bus")

    def put_pasid_entry(self, rid: int, pasid: Pasid, entry: PasidEntry) -> None:
        self.log.append(("pasid_entry", rid, pasid, True))
        self.entries[rid] = entry.to_bytes()

    def retire_pasid_entry(self, rid: int, pasid: Pasid) -> None:
        self.log.append(("pasid_entry", rid, pasid, False))

    def clear_pasid_entry(self, rid: int, pasid: Pasid) -> None:
        self.log.append(("pasid_entry", rid, pasid, None))
        self.entries[rid] = bytes(64)

    async def set_function(
        self,
        rid: int,
        *,
        pasid: bool | None = None,
        ats: bool | None = None,
        pri_allocation: int | None = None,
        bus_master: bool | None = None,
    ) -> None:
        named = {"pasid": pasid, "ats": ats, "pri": pri_allocation, "master": bus_master}
        ((what, value),) = ((what, value) for what, value in named.items() if value is not None)
        await self._take(what, rid, value)
        if what == "pri" and value and self.pri_on:
            raise UapiError(errno.EBUSY, "page requests are on")
        self.switched.setdefault(rid, {})[what] = value
