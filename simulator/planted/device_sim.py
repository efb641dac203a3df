"""Mistakes in device_sim: hardware that does not do what VT-d and PCIe promise."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

_UNIT = "device_sim.core.dmar:RemappingUnit"
_QUEUE = "device_sim.core.inval_queue:QueuedInvalidation"
_IOTLB = "device_sim.core.iotlb:Iotlb"
_DEVTLB = "device_sim.core.devtlb:DevTlb"
_FUNCTION = "device_sim.core.function:Function"
_PRI = "device_sim.core.pri:PageRequestInterface"
_PRQ = "device_sim.core.prq:PrqWriter"
_CONTEXTS = "device_sim.core.context_tables:ContextTables"

SILICON = (
    # -- caches ------------------------------------------------------------------------------------------
    Plant(
        "R4-iotlb-keeps-huge-leaves",
        "An IOTLB invalidation of one page leaves the huge leaf that translates it.",
        "I9",
        [
            Edit(
                f"{_IOTLB}.invalidate_pages",
                "_drop(domain.leaves[level], start, npages, INDEX_BITS * (level - 1))",
                "_drop(domain.leaves[level], start, npages, 0)",
            )
        ],
        races=["R4"],
    ),
    Plant(
        "R6-paging-structure-cache-stays",
        "Pointers to tables outlive an invalidation that does not say that leaves alone changed.",
        "R6",
        [Edit(f"{_IOTLB}.invalidate_pages", "if not leaves_only:", "if False:")],
        races=["R6"],
    ),
    Plant(
        "R7-device-tlb-keeps-huge-leaves",
        "A device TLB that is told to drop one page keeps the huge leaf that translates it.",
        "I6",
        [
            Edit(
                f"{_DEVTLB}.invalidate",
                "for key in _touched(leaves, start >> shift, last >> shift):",
                "for key in ():",
            )
        ],
        races=["R7", "R10"],
    ),
    Plant(
        "R7-device-tlb-keeps-everything",
        "A device TLB completes an invalidation and drops nothing.",
        "I9",
        [Edit(f"{_DEVTLB}.invalidate", "last = start + npages - 1", "return")],
        races=["R7", "R4"],
    ),
    Plant(
        "R4-device-tlb-drops-reads-alone",
        "A device TLB drops what it reads by and goes on writing.",
        "I9",
        [Edit(f"{_DEVTLB}.invalidate", "for blocks in self._blocks:", "for blocks in self._blocks[:1]:")],
        races=["R4", "R17"],
    ),
    Plant(
        "R14-device-tlb-writes-what-it-may-read",
        "A device TLB keeps what was granted to be read, and stores by it.",
        "R14",
        [Edit(f"{_DEVTLB}.fill", "if not rights & need:", "if not rights:")],
    ),
    Plant(
        "R25-survives-what-it-races",
        "What a device TLB was filled with last survives the invalidation that comes next.",
        "R25",
        [
            Edit(f"{_DEVTLB}.fill", "shift =", "self.filled = page\n    shift ="),
            Edit(
                f"{_FUNCTION}.invalidate_translations",
                "self.devtlb.invalidate(start, npages)",
                "filled = self.devtlb.__dict__.pop('filled', -1)\n"
                "    if start <= filled < start + npages:\n"
                "        self.devtlb.invalidate(start, filled - start)\n"
                "        start, npages = filled + 1, start + npages - filled - 1\n"
                "    self.devtlb.invalidate(start, npages)",
            ),
        ],
        races=["R25"],
    ),
    Plant(
        "R14-pasid-cache-stays",
        "A PASID entry stays cached when the driver has it forgotten.",
        "I29",
        [Edit(f"{_CONTEXTS}.invalidate_pasids", "del self._pasids[key]", "pass")],
        races=["R14", "R10"],
    ),
    Plant(
        "R18-context-cache-stays",
        "A context entry stays cached when the driver has its function forgotten.",
        "I29",
        [Edit(f"{_CONTEXTS}.invalidate_contexts", "del self._contexts[rid]", "pass")],
        races=["R18"],
    ),
    Plant(
        "R15-unit-without-its-fence",
        "The unit takes clears before what it reports is seen: an event stays out that nobody looks for.",
        "R15",
        [Edit("device_sim.core.unit_registers:RegisterSet.raise_status", "self._fence()", "pass")],
        races=["R15"],
    ),
    Plant(
        "R28-driver-gone-and-walking",
        "The driver is gone, and device TLBs keep what they translate.",
        "R28",
        [
            Edit(
                f"{_FUNCTION}.stop",
                "self.configure(ats=False, bus_master=False, pri_allocation=0)\n"
                "    self.configure(pasid=False)",
                "self.ats_enabled = self.dma_enabled = self.pasid_enabled = False\n    self.pri.disable()",
            ),
        ],
        races=["R28"],
    ),
    Plant(
        "R20-rights-of-what-was",
        "A cached entry without the right that is asked for answers, and is not walked again.",
        "R20",
        [Edit(f"{_IOTLB}.lookup", "if entry is not None and entry.rights & need:", "if entry is not None:")],
        races=["R20"],
    ),
    Plant(
        "absent-is-cached",
        "What was absent is cached, and no one flushes what becomes present.",
        "R20",
        [
            Edit(
                f"{_UNIT}._fill",
                "return NOT_PRESENT",
                "self.iotlb.fill(attached.did, page, NOT_PRESENT)\n        return NOT_PRESENT",
            ),
            Edit(
                f"{_IOTLB}.lookup",
                "entry.rights & need:",
                "(entry.rights & need or not entry.rights):",
            ),
        ],
        races=["B-32", "R20"],
    ),
    # -- the invalidation queue --------------------------------------------------------------------------
    Plant(
        "R18-late-and-done",
        "A wait behind an invalidation that timed out stores its status.",
        "I9",
        [
            Edit(
                f"{_QUEUE}._run",
                "break  # aborted",
                "pass",
            )
        ],
        races=["R18"],
    ),
    Plant(
        "I9-status-before-the-work",
        "A wait's status is stored, and device TLBs do what stands before it at the next kick.",
        "I9",
        [
            Edit(
                f"{_UNIT}._execute",
                "not endpoint.invalidate_translations(*descriptor.pages)",
                "self.__dict__.setdefault('put_off', []).append((endpoint, descriptor.pages))",
            ),
            Edit(
                f"{_UNIT}.kick",
                "has_more = self.queue.run()",
                "for endpoint, pages in self.__dict__.pop('put_off', ()):\n"
                "        endpoint.invalidate_translations(*pages)\n"
                "    has_more = self.queue.run()",
            ),
        ],
        races=["R4"],
    ),
    # -- page requests -----------------------------------------------------------------------------------
    Plant(
        "R9-last-is-dropped-unanswered",
        "A request that the full queue drops is not answered, though it is the last of its group.",
        "R9",
        [
            Edit(
                f"{_PRQ}.submit",
                "self._answer(request, ResponseCode.SUCCESS)",
                "pass",
            )
        ],
        races=["R9"],
    ),
    Plant(
        "R9-nobody-waits-for-room",
        "A device asks an overflowed queue again and again instead of waiting.",
        "R9",
        [Edit(f"{_FUNCTION}.make_accessible", "await self._unit.prq.wait_accepting()", "pass")],
        races=["R9"],
    ),
    Plant(
        "R9-tail-before-entry",
        "The queue's tail moves before the entry behind it is in memory.",
        "R9",
        [
            Edit(
                f"{_PRQ}._store",
                "words = _ENTRY.unpack(request.to_bytes())\n",
                "words = _ENTRY.unpack(request.to_bytes())\n"
                "    self._registers.show(Reg.PQT, ring.offset(after))\n",
            ),
        ],
        races=["R9"],
    ),
    Plant(
        "R9-room-and-nobody-is-told",
        "Who waits for room in the queue is not told of a clear that was taken on the way to the next event.",
        "R9",
        [
            Edit(
                f"{_PRQ}._take_clears",
                "self._registers.take_clears(Reg.PRS)\n    self._look_for_room()",
                "if self._registers.take_clears(Reg.PRS) & Prs.PRO:\n        self._accept()",
            ),
            Edit(f"{_PRQ}._raise_ppr", "self._look_for_room()", "pass"),
        ],
        races=["R9"],
    ),
    Plant(
        "R11-index-used-again",
        "A page request group takes an index whose last group is not answered yet.",
        "I8",
        [Edit(f"{_PRI}._free_index", "while self._next_index in self._groups:", "while False:")],
        races=["R11"],
    ),
    Plant(
        "R11-credits-are-lost",
        "The credits of an answered group do not come back.",
        "I8",
        [Edit(f"{_PRI}.respond", "self._credits += len(group.accesses)", "pass")],
        races=["R11"],
    ),
    Plant(
        "R10-nobody-is-told",
        "Page requests are switched off, and who waits for an answer waits for ever.",
        "R10",
        [Edit(f"{_PRI}.disable", "group.answered.set(ResponseCode.FAILURE)", "pass")],
        races=["R10", "R11"],
    ),
    Plant(
        "R20-asks-for-ever",
        "A device asks for a page in vain without an end.",
        "R20",
        [Edit(f"{_FUNCTION}.make_accessible", "if tried == MAX_REQUESTS:", "if False:")],
        races=["R20"],
        simulated=False,  # no small story has a device ask 64 times
    ),
    Plant(
        "R20-counts-the-access",
        "A device gives up an access that gets on, because the whole of it took many requests.",
        "R20",
        [
            Edit(
                f"{_FUNCTION}.make_accessible",
                "tried = tries.get(first.page, 0)",
                "tried = min(sum(tries.values()), MAX_REQUESTS)",
            )
        ],
        races=["R20"],
        simulated=False,  # likewise
    ),
    Plant(
        "page-requests-unasked",
        "A function may ask for pages without PRE in its context entry.",
        "R12",
        [Edit(f"{_CONTEXTS}.check_page_request", "if not context.pre:", "if False:")],
        races=["R12"],
        simulated=False,  # our driver gives PRE to each function that has page requests
    ),
)
