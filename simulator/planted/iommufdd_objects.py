"""Mistakes in iommufdd's devices and HWPTs: who comes and goes, page requests, tables of its own."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

_HWPT = "iommufdd.core.hwpt:Hwpt"
_KVM_HWPT = "iommufdd.core.hwpt_kvm:HwptKvm"
_PAGING = "iommufdd.core.hwpt_paging:HwptPaging"
_IOPF = "iommufdd.core.iopf"
_DEVICE = "iommufdd.core.device:IommufdDevice"
_ON_DEMAND = "iommufdd.core.ioas_on_demand:IoasOnDemand"
_PINS = "iommufdd.core.mirror_pins:MirrorPins"
_PLATFORM = "iommufdd.core.platform:Platform"

IOMMUFDD_OBJECTS = (
    # -- attaching and detaching -------------------------------------------------------------------------
    Plant(
        "R10-no-drain",
        "A device leaves and its page requests under way are not drained.",
        "R10",
        [
            Edit(
                f"{_DEVICE}.leave",
                "await _try(self.unit.submit(qi.drain(did, self.rid, ecap, ats=ats)))",
                "pass",
            )
        ],
        races=["R10", "B-20"],
    ),
    Plant(
        "R10-groups-not-waited-for",
        "A device leaves while groups of its page requests are still being worked on.",
        "R10",
        [Edit(f"{_DEVICE}.leave", "await self._wait_quiet()", "pass")],
        races=["R10", "B-20"],
    ),
    Plant(
        "R10-partial-groups-stay",
        "Half a page request group outlives the HWPT it was asked for on.",
        "I24",
        [Edit(f"{_DEVICE}.leave", "self._partial.discard([self.rid])", "pass")],
        races=["R10", "R11"],
        simulated=False,  # our units queue all of a group, or overflow, before they look at a drain
    ),
    Plant(
        "R10-bus-master-stays",
        "A device is detached, and may still master the bus.",
        "R10",
        [
            Edit(
                f"{_DEVICE}.leave",
                "await _try(self._config.set_function(self.rid, bus_master=False))",
                "pass",
            )
        ],
        races=["R10"],
    ),
    Plant(
        "R12-late-request-is-served",
        "What a device asks for once it is drained is served on the HWPT it is about to leave.",
        "R12",
        [Edit(f"{_DEVICE}.asks_on", " if self.state is DeviceState.ATTACHED else None", "")],
        races=["R12", "R10"],
    ),
    Plant(
        "R12-groups-are-not-counted",
        "Who takes a device off does not know of the groups of it that are being worked on.",
        "R12",
        [
            Edit(
                f"{_IOPF}:Iopf.take",
                "device.begin_group()",
                "pass",
            ),
            Edit(
                f"{_IOPF}:Iopf._handle",
                "\n            device.end_group()",
                "",
            ),
        ],
        races=["R12", "R10"],
    ),
    Plant(
        "B-10-unregistered-while-walked",
        "An HWPT that goes unregisters from KVM before the units have let go of the memory.",
        "I13",
        [
            Edit(
                f"{_KVM_HWPT}.destroy",
                "await super().destroy()\n    with suppress(UapiError):  # KVM is gone\n"
                "        await self._tdp.unregister()\n",
                "with suppress(UapiError):\n        await self._tdp.unregister()\n"
                "    await super().destroy()\n",
            )
        ],
        races=["B-10", "R26"],
    ),
    Plant(
        "B-12-iopf-of-another-is-taken",
        "A device that leaves switches page requests off that somebody else had switched on.",
        "R10",
        [Edit(f"{_DEVICE}.leave", "if self._owns_pri:", "if True:")],
        races=["B-12"],
    ),
    Plant(
        "B-12-iopf-is-not-switched-on",
        "A device comes onto an HWPT whose pages come when asked for, and cannot ask.",
        "I8",
        [Edit(f"{_DEVICE}.enter", "await self._enable_iopf(pinned=pinned)", "pass")],
        races=["B-12"],
    ),
    Plant(
        "R18-attached-while-taken-off",
        "An attach under way gives a function its bus mastering back behind who took it off the bus.",
        "R18",
        [
            Edit(f"{_DEVICE}.enter", "self.unit.check_on_bus(self.rid)  # again", "pass  # again"),
            Edit(f"{_DEVICE}.enter", "self.unit.check_on_bus(self.rid)  # and", "pass  # and"),
        ],
        races=["R18"],
    ),
    Plant(
        "R18-a-master-while-taken-off",
        "An attach under way lets a function that is off the bus master it, and looks afterwards only.",
        "R18",
        [Edit(f"{_DEVICE}.enter", "self.unit.check_on_bus(self.rid)  # again", "pass  # again")],
        races=["R18"],
    ),
    Plant(
        "R28-not-walkable-any-more",
        "A device that waited its turn goes onto a table that nobody maintains any more.",
        "R28",
        [
            Edit(f"{_DEVICE}.enter", "hwpt.check_walkable()", "pass"),
            Edit(f"{_DEVICE}.check", "hwpt.check_walkable()", "pass"),
        ],
        races=["R28"],
    ),
    Plant(
        "R28-kvm-is-gone",
        "KVM is gone and its devices stay on the table that nobody maintains.",
        "R28",
        [Edit(f"{_PLATFORM}.lose_kvm", "await node.leave(hwpt)", "pass")],
        races=["R28"],
    ),
    Plant(
        "R28-kvm-waits-for-the-lease",
        "KVM hangs up on its importer and lives: the units keep its memory, and it waits for their lease.",
        "R28",
        [Edit(f"{_PLATFORM}.lose_kvm", "await hwpt.give_back()", "pass")],
        races=["R28", "R27"],
    ),
    Plant(
        "R28-hung-up-on-and-walking",
        "A link that broke counts as silicon that is gone: invalidations are done that it has not heard of.",
        "I9",
        [
            Edit(
                "iommufdd.silicon:Silicon._gone",
                "self._lease.ended.on_done(lambda _: self._let_go())",
                "self._let_go()",
            )
        ],
        races=["R28"],
    ),
    Plant(
        "R10-nothing-to-go-back-to",
        "What a group is replaced on has no user meanwhile: it is destroyed, and the devices go back to it.",
        "R10",
        [
            Edit("iommufdd.core.group:IommufdGroup._replace", "old.users += 1", "pass"),
            Edit("iommufdd.core.group:IommufdGroup._replace", "old.users -= 1", "pass"),
        ],
        races=["R10"],
    ),
    Plant(
        "R28-kvm-went-meanwhile",
        "KVM goes between its answer and the units' taking its memory, and the HWPT is made all the same.",
        "R28",
        [Edit("iommufdd.core.hwpt_alloc:alloc_kvm", "if not hwpt.maintained:", "if False:")],
        races=["R28"],
    ),
    Plant(
        "R10-attached-though-unbound",
        "An attach that waited for the group attaches a device that was unbound meanwhile.",
        "R10",
        [
            Edit(
                "iommufdd.core.group:IommufdGroup._attach",
                "if device.state is DeviceState.UNBOUND:",
                "if False:",
            )
        ],
        races=["R10", "R13"],
    ),
    Plant(
        "domain-id-free-while-memory-is-taken-back",
        "An HWPT that is destroyed while its lost KVM's memory is taken back does not wait for that.",
        "R10",
        [Edit("iommufdd.core.hwpt:Hwpt.give_back", "async with self._giving_back:", "if True:")],
        races=["R10"],
    ),
    Plant(
        "domain-id-free-too-early",
        "A domain id is another's before the units have let go of the domain.",
        "R10",
        [
            Edit(
                f"{_PLATFORM}.destroy_hwpt",
                "await hwpt.destroy()\n    del self.hwpts[hwpt.domain.did]",
                "del self.hwpts[hwpt.domain.did]\n    await hwpt.destroy()",
            )
        ],
        races=["R10"],
    ),
    Plant(
        "R13-closed-meanwhile",
        "An iommufd that was closed while its HWPT was made gets the HWPT all the same.",
        "R13",
        [Edit("iommufdd.core.hwpt_alloc:alloc_kvm", "ctx.check_open()", "pass")],
        races=["R13"],
    ),
    Plant(
        "R13-tdp-is-put-twice",
        "An HWPT whose making failed half way puts its TDP FD, and then who made it does.",
        "R13",
        [
            Edit(
                "iommufdd.core.hwpt_alloc:alloc_kvm",
                "await ctx.platform.destroy_hwpt(hwpt)\n        raise",
                "await ctx.platform.destroy_hwpt(hwpt)\n        tdp.release()\n        raise",
            )
        ],
        races=["R13", "B-08"],
    ),
    Plant(
        "R13-did-is-left",
        "A domain that could not be registered keeps its id.",
        "R13",
        [Edit("iommufdd.core.hwpt_alloc:_import_tdp", "del platform.hwpts[domain.did]", "pass")],
        races=["R13"],
    ),
    # -- page requests -----------------------------------------------------------------------------------
    Plant(
        "R9-partial-kept-in-overflow",
        "After an overflow groups whose last request was dropped are kept, and meet the next of their index.",
        "R9",
        [Edit(f"{_IOPF}:Iopf.prq_event", "self.partial.discard()", "pass")],
        races=["R9"],
    ),
    Plant(
        "R9-overflow-stays",
        "PRO is not cleared, so the unit drops requests for ever.",
        "R9",
        [
            Edit(
                "iommufdd.core.page_requests:PageRequestQueue.look",
                "registers.clear(Reg.PRS, Prs.PRO)",
                "pass",
            )
        ],
        races=["R9"],
    ),
    Plant(
        "R9-request-seen-too-late",
        "PPR is cleared after the queue was read, and a request that came between waits for the next.",
        "R9",
        [
            Edit(
                "iommufdd.core.page_requests:PageRequestQueue.look",
                "registers.clear(Reg.PRS, Prs.PPR)\n    tail = self._tail()\n",
                "tail = self._tail()\n    registers.clear(Reg.PRS, Prs.PPR)\n",
            )
        ],
        races=["R9"],
        simulated=False,  # our units tell again at the next kick, and each group that was taken brings one
    ),
    Plant(
        "R11-answered-for-each-request",
        "Each request of a group that nobody serves is answered, not its last alone.",
        "I8",
        [Edit(f"{_IOPF}:Iopf.take", "if request.last:", "if True:")],
        races=["R11"],
    ),
    Plant(
        "R11-success-and-failure",
        "A group one of whose pages cannot be had is answered with success.",
        "I8",
        [Edit(f"{_IOPF}:_fault_in", "if code is not ResponseCode.SUCCESS:", "if False:")],
        races=["R11"],
    ),
    Plant(
        "B-37-always-failure",
        "What concerns one page is answered with Response Failure, which ends the function's page requests.",
        "I8",
        [
            Edit(
                f"{_HWPT}.fault",
                "code = ResponseCode.INVALID if error.errno in _OF_ONE_PAGE else ResponseCode.FAILURE",
                "code = ResponseCode.FAILURE",
            )
        ],
        races=["B-37"],
    ),
    Plant(
        "B-31-canonical-for-a-cpu",
        "An address of a guest is refused if it would not be canonical for a CPU.",
        "I8",
        [Edit(f"{_HWPT}.fault", "if request.addr >> self.domain.width:", "if request.addr >> 47:")],
        races=["B-31"],
    ),
    # -- tables of its own -------------------------------------------------------------------------------
    Plant(
        "R1-lookup-never-stale",
        "A mirror maps what its lookup found, though the host took it while the answer was on its way.",
        "I5",
        [
            Edit(
                "iommufdd.core.hmm:Lookup.stale",
                "any(first < end and start < last for first, last in self._gone)",
                "False",
            )
        ],
        races=["R1"],
    ),
    Plant(
        "R1-lookups-are-not-told",
        "An invalidation takes entries and tells no lookup that is going on.",
        "I5",
        [Edit(f"{_ON_DEMAND}.invalidate", "self.watched.lookups.invalidate(start, end)", "pass")],
        races=["R1"],
    ),
    Plant(
        "R4-mirror-acks-unflushed",
        "HMM_INVALIDATE is acked when entries are gone, before the units have forgotten them.",
        "I6",
        [Edit(f"{_ON_DEMAND}.invalidate", "await hwpt.give_up()", "pass")],
        races=["R4"],
    ),
    Plant(
        "R8-one-mirror-is-told",
        "Of two HWPTs that mirror one process the first alone loses what the host takes.",
        "R8",
        [Edit(f"{_ON_DEMAND}.invalidate", "mirrors = self.mirrors", "mirrors = self.mirrors[:1]")],
        races=["R8"],
    ),
    Plant(
        "R4-flush-of-another-not-awaited",
        "Who finds nothing left to flush acks, though another's flush of it is under way.",
        "I6",
        [Edit(f"{_PAGING}.give_up", "others = list(self._flushes)", "others = ()")],
        races=["R4", "B-18"],
    ),
    Plant(
        "R17-failed-flush-is-forgotten",
        "What a unit refused to forget is not flushed again.",
        "R17",
        [Edit(f"{_PAGING}.flush", "self._stale += stale", "pass")],
        races=["R17"],
        simulated=False,  # our units refuse no descriptor of our driver's
    ),
    Plant(
        "R23-table-free-at-once",
        "A table page of iommufdd's own is free when it is cut off, before the units were flushed.",
        "I7",
        [
            Edit(
                "iommufdd.core.io_pagetable:IoPageTable._apply",
                "self._held.update(cut for cut, _ in edit.cut)",
                "self._held.update(cut for cut, _ in edit.cut)\n"
                "    self._pool.free(cut for cut, _ in edit.cut)",
            ),
            Edit(
                "iommufdd.core.io_pagetable:IoPageTable.flushed",
                "self._pool.free(change.cut)",
                "pass",
            ),
        ],
        races=["R23", "R5"],
    ),
    Plant(
        "R23-nothing-is-stale",
        "Entries of iommufdd's own that go are not told to the units.",
        "I6",
        [Edit(f"{_PAGING}._made_stale", "if change.size:", "if False:")],
        races=["R23", "R4", "R21"],
    ),
    Plant(
        "area-gone-and-mapped",
        "A fault maps pages of an area that went while they were looked up.",
        "I28",
        [
            Edit(
                "iommufdd.core.hwpt_mirror:HwptMirror.install",
                "if area not in self._watched.areas:",
                "if False:",
            )
        ],
        races=["R21"],
    ),
    Plant(
        "installed-over-a-pin",
        "A fault maps what the process has now over what is pinned there.",
        "I28",
        [
            Edit(
                "iommufdd.core.hwpt_mirror:HwptMirror.install",
                " or iova in self.pins",
                "",
            )
        ],
        races=["R22"],
    ),
    Plant(
        "pinned-over-a-pin",
        "A pin over a pinned page pins it anew, and maps what the process has there by now.",
        "I28",
        [
            Edit(f"{_PINS}._pin_span", "if pin is None:", "if True:"),
            Edit(f"{_PINS}._pin_span", "min(gap_end, end)", "end"),
        ],
        races=["R22"],
    ),
    Plant(
        "pin-on-a-table-that-went",
        "A pin that waited for the lock pins into an HWPT that was destroyed meanwhile.",
        "I28",
        [
            Edit(
                "iommufdd.core.hwpt_mirror:HwptMirror._check_there",
                "if self not in self.ioas.hwpts:",
                "if False:",
            )
        ],
        races=["R10"],
        simulated=False,  # who pins waits since before his device left, who destroys waits behind him
    ),
    Plant(
        "unpinned-and-mapped",
        "What is unpinned stays mapped, and the frame goes to whoever comes next.",
        "I28",
        [Edit(f"{_PINS}.unpin", "self._hwpt.take(run[0].start, run[-1].end)", "pass")],
        races=["R4"],
    ),
    Plant(
        "unpinned-before-the-flush",
        "The host has its pages back before the units have forgotten them.",
        "I6",
        [
            Edit(
                f"{_PINS}.give_back",
                "await self._hwpt.give_up()\n    await self._let_go_of_owed()",
                "await self._let_go_of_owed()\n    await self._hwpt.give_up()",
            )
        ],
        races=["R4"],
    ),
    Plant(
        "pin-of-what-was-taken",
        "A pin maps what the host answered, though the process has something else there by now.",
        "I28",
        [Edit(f"{_PINS}._pin_gap", "if not lookup.stale(hva, Hva(hva + size)):", "if True:")],
        races=["R1"],
        simulated=False,  # what is pinned is mapped: as if the process had changed it right behind the pin
    ),
    Plant(
        "pages-unpinned-before-the-flush",
        "Pages of an IOAS are unpinned before the units have forgotten them.",
        "I6",
        [
            Edit(
                "iommufdd.core.pages:Pages._hide",
                "await hwpt.give_up()",
                "pass",
            )
        ],
        races=["R4", "R21"],
    ),
    Plant(
        "pages-unpinned-under-another-area",
        "Pages that two areas show are unpinned with the first of them.",
        "I26",
        [
            Edit(
                "iommufdd.core.pages:Pages._release",
                "for other in self.shown]",
                "for other in ()]",
            )
        ],
        races=["R4"],
    ),
)
