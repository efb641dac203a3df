"""Mistakes in iommufdd as the driver of units: what it flushes, stores into their tables, lets walk."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

_QI = "iommufdd.core.qi"
_QUEUE = "iommufdd.core.inval_queue:InvalidationQueue"
_UNIT = "iommufdd.core.intel_iommu:IntelIommu"
_TABLES = "iommufdd.core.translation_tables:TranslationTables"
_HWPT = "iommufdd.core.hwpt:Hwpt"
_KVM_HWPT = "iommufdd.core.hwpt_kvm:HwptKvm"
_DEVICE = "iommufdd.core.device:IommufdDevice"
_DOMAIN = "iommufdd.core.domain:Domain"

IOMMUFDD_DRIVER = (
    # -- what is invalidated -----------------------------------------------------------------------------
    Plant(
        "R7-device-tlb-first",
        "The device TLB is invalidated before the IOTLB, and refetches from there what it has just lost.",
        "I9",
        [
            Edit(
                f"{_QI}:invalidate",
                "return [iotlb, *(everything(rid) for rid in rids), wait()]",
                "return [*(everything(rid) for rid in rids), iotlb, wait()]",
            ),
            Edit(
                f"{_QI}:invalidate",
                "return [iotlb, *(DevTlbInv(sid=rid, size=sized, addr=device_addr) for rid in rids), wait()]",
                "return [*(DevTlbInv(sid=rid, size=sized, addr=device_addr) for rid in rids), iotlb, wait()]",
            ),
        ],
        races=["R7"],
    ),
    Plant(
        "R7-no-device-tlb",
        "A domain is flushed from the IOTLB, and the device TLBs of its functions are not.",
        "I9",
        [
            Edit(
                f"{_HWPT}.forget",
                "rids = self.behind(unit) if unit.ecap.dt else []",
                "rids = []",
            )
        ],
        races=["R7", "B-32"],
    ),
    Plant(
        "B-21-hint-keeps-tables",
        "Each page-selective invalidation says that leaves alone changed, so pointers to tables stay cached.",
        "R6",
        [
            Edit(
                f"{_QI}:invalidate",
                "am=am, addr=addr, dw=True, dr=True)",
                "am=am, addr=addr, dw=True, dr=True, ih=True)",
            )
        ],
        races=["B-21", "R6"],
    ),
    Plant(
        "B-29-misaligned-is-dropped",
        "A range that is not whole pages is flushed without the page it ends in.",
        "R17",
        [
            Edit(
                f"{_QI}:invalidate",
                "npages = (size + (start & PAGE_OFFSET_MASK) + PAGE_OFFSET_MASK) >> PAGE_SHIFT",
                "npages = size >> PAGE_SHIFT",
            )
        ],
        races=["B-29", "R17"],
        simulated=False,  # our KVM flushes whole pages
    ),
    Plant(
        "B-30-pages-of-32-bits",
        "The number of pages to flush is cut to 32 bits, and a multiple of 2^32 flushes one.",
        "R17",
        [
            Edit(
                f"{_QI}:invalidate",
                "addr, am = psi_cover(first, max(npages, 1))",
                "addr, am = psi_cover(first, max(npages & 0xFFFF_FFFF, 1))",
            )
        ],
        races=["B-30", "R17"],
    ),
    Plant(
        "R8-one-function-is-told",
        "Of several functions on one HWPT behind a unit the first alone forgets.",
        "R8",
        [Edit(f"{_HWPT}.behind", "not in self.without_ats]", "not in self.without_ats][:1]")],
        races=["R8"],
    ),
    Plant(
        "R8-one-unit-is-told",
        "Of several units with a function on one HWPT the first alone forgets.",
        "R8",
        [
            Edit(
                f"{_HWPT}.forget",
                "for unit in dict.fromkeys(self.attached.values()):",
                "for unit in list(self.attached.values())[:1]:",
            )
        ],
        races=["R8"],
    ),
    Plant(
        "R17-refused-and-acked",
        "A unit that refuses to forget counts as one that has.",
        "R17",
        [Edit(f"{_HWPT}.forget", "if error.errno != errno.ENODEV:", "if False:")],
        races=["R17"],
        simulated=False,  # our units refuse no descriptor of our driver's
    ),
    Plant(
        "I9-acked-and-not-flushed",
        "TDP_INVALIDATE is acked, and nothing was asked of the units.",
        "I9",
        [Edit(f"{_KVM_HWPT}.invalidate", "await self.forget(iova_of_gpa(start), size)", "pass")],
        races=["R4"],
    ),
    Plant(
        "R4-units-are-not-asked",
        "What an HWPT is to forget no unit is asked to forget.",
        "I9",
        [
            Edit(
                f"{_HWPT}.forget",
                "await unit.submit(qi.invalidate(unit.cap, self.domain.did, rids, start, size))",
                "pass",
            )
        ],
        races=["R4", "R17"],
    ),
    Plant(
        "I9-not-waited-for",
        "Descriptors are in the ring, and their submitter does not wait until they are done.",
        "I9",
        [
            Edit(
                f"{_QUEUE}.submit",
                "await submission.done\n",
                "pass\n",
            )
        ],
        races=["R4"],
    ),
    Plant(
        "completed-by-the-head",
        "A submission is done once the unit has fetched its wait, whatever that stored.",
        "I9",
        [
            Edit(
                f"{_QUEUE}._is_done",
                "if submission.done is None:",
                "if True:",
            )
        ],
        races=["R18"],
    ),
    Plant(
        "R18-time-out-is-an-ack",
        "An invalidation that timed out twice counts as done, and the device keeps what it has.",
        "I9",
        [Edit(f"{_UNIT}.submit", "await self._take_off(timed_out.rid)", "return")],
        races=["R18"],
    ),
    Plant(
        "R18-others-are-not-held",
        "While a function is taken off the bus the invalidations of others for it are acked at once.",
        "R18",
        [Edit(f"{_UNIT}._answerable", "await done", "pass")],
        races=["R18"],
    ),
    Plant(
        "R18-off-but-a-master",
        "A function that completes nothing loses its context entry, and keeps its bus mastering.",
        "I9",
        [Edit(f"{_UNIT}._take_off", "await self._end_dma(rid)", "pass")],
        races=["R18"],
    ),
    Plant(
        "R18-off-and-not-forgotten",
        "A function that completes nothing loses its context entry, and the unit is not told.",
        "I29",
        [Edit(f"{_UNIT}._take_off", "await self.submit(qi.forget_function(rid))", "pass")],
        races=["R18", "R14"],
    ),
    # -- entries of the unit's tables --------------------------------------------------------------------
    Plant(
        "R14-present-goes-first",
        "Of an entry wider than a word the one with P is stored first.",
        "I29",
        [Edit(f"{_TABLES}._put", "reversed(range(len(words)))", "range(len(words))")],
        races=["R14"],
    ),
    Plant(
        "R14-cleared-while-present",
        "A PASID entry is cleared word by word while it is present.",
        "I29",
        [
            Edit(
                f"{_TABLES}._retire",
                "self._memory.store64(at, self._memory.load64(at) & ~1)",
                "pass",
            ),
            Edit(
                f"{_TABLES}._clear",
                'assert not self._memory.load64(at) & 1, f"I29: {what}: the entry is present"',
                "pass",
            ),
        ],
        races=["R14"],
    ),
    Plant(
        "R14-cleared-and-not-flushed",
        "A PASID entry goes, and the unit keeps what it cached of it.",
        "I29",
        [
            Edit(
                f"{_DEVICE}.leave",
                "await self._have_forgotten(hwpt)",
                "pass",
            )
        ],
        races=["R14", "R10"],
    ),
    Plant(
        "R14-cleared-before-the-flush",
        "The rest of a PASID entry is cleared before the unit has forgotten it.",
        "I29",
        [
            Edit(
                f"{_DEVICE}.leave",
                "await self._have_forgotten(hwpt)\n    self.unit.clear_pasid_entry(self.rid, RID_PASID)",
                "self.unit.clear_pasid_entry(self.rid, RID_PASID)\n    await self._have_forgotten(hwpt)",
            )
        ],
        races=["R14"],
    ),
    # -- which unit may walk a table ---------------------------------------------------------------------
    Plant(
        "R15-not-coherent",
        "A unit whose walks are not coherent walks a table whose lines nobody flushes.",
        "R15",
        [Edit(f"{_DOMAIN}._needs", "ecap.smpwc or not self.COHERENT_WALKS", "True")],
        races=["R15"],
    ),
    Plant(
        "R15-driver-without-its-fence",
        "The driver looks at a queue before its clear of the status bit is seen: the next event stays out.",
        "R15",
        [Edit("iommufdd.core.unit_registers:UnitRegisters.clear", "self.fence()", "pass")],
        races=["R15"],
    ),
    Plant(
        "R16-fewer-levels",
        "A unit that walks fewer levels than the table has gets its root.",
        "R16",
        [Edit(f"{_DOMAIN}._needs", "self.level in cap.levels", "True")],
        races=["R16"],
    ),
    Plant(
        "B-17-index-for-a-width",
        "The domain's number of levels is compared with the unit's address width: it always fits.",
        "R16",
        [Edit(f"{_DOMAIN}._needs", "self.width <= cap.mgaw", "self.level <= cap.mgaw")],
        races=["B-17", "R16"],
    ),
    Plant(
        "R16-larger-leaves",
        "A unit gets a table with larger leaves than it knows.",
        "R16",
        [Edit(f"{_DOMAIN}._needs", "huge <= cap.max_huge_page_level", "True")],
        races=["R16"],
    ),
    Plant(
        "R16-bit-11-not-asked",
        "KVM may set bit 11, which this unit reserves, and is not asked.",
        "R16",
        [Edit("iommufdd.core.kvm_domain:check_metadata", "if not mask & bits.SNOOP:", "if False:")],
        races=["R16"],
        simulated=False,  # our KVM does not lend such a table, and it would have to
    ),
    Plant(
        "B-32-caching-mode",
        "A unit that caches absent entries walks a table whose new entries nobody flushes.",
        "R16",
        [Edit(f"{_DOMAIN}._needs", "not cap.cm", "True")],
        races=["B-32"],
    ),
)
