"""Mistakes in what kvmd does for a process: what it asks for of its memory, what is pinned and who pays."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

KVMD_PROCESS = (
    # -- mappings ------------------------------------------------------------------------------------------
    Plant(
        "I11-told-of-where-a-page-goes",
        "Who moves a page to another address tells of that, and not of the one it had.",
        "I11",
        [
            Edit(
                "kvmd.core.mm.mremap:_move",
                "await space.change(start, end, edit)",
                "await space.change(new, Hva(new + size), edit)",
            )
        ],
    ),
    Plant(
        "I11-unmapped-and-told-then",
        "What is unmapped is taken from the process first, and then from whoever maps it elsewhere.",
        "I11",
        [
            Edit(
                "kvmd.core.mm.space:AddressSpace._unmap",
                "async with announced(",
                "await self._clear_in_turns(low, high)\n        async with announced(",
            )
        ],
    ),
    Plant(
        "I21-write-protected-untold",
        "A userfaultfd takes the right to write from entries, and who maps the pages elsewhere keeps it.",
        "I21",
        [
            Edit(
                "kvmd.core.mm.userfaultfd:Userfaultfd.writeprotect",
                "await space.change(first, last, partial(self._protect, first, last, on=on))",
                "self._protect(first, last, on=on)",
            )
        ],
    ),
    Plant(
        "I11-freed-untold",
        "What is freed lazily the host may take at once, and others go on storing to it.",
        "I11",
        [
            Edit(
                "kvmd.core.mm.madvise:_free",
                "await space.change(start, end, partial(_make_lazy, space, start, end))",
                "_make_lazy(space, start, end)",
            )
        ],
    ),
    Plant(
        "I11-truncated-but-for-one",
        "Of the pages that a file loses the first stays mapped.",
        "I11",
        [
            Edit(
                "kvmd.core.mm.file:MemoryFile.truncate",
                "await self.unmap(first, None, copies_too=True)",
                "await self.unmap(first + 1, None, copies_too=True)",
            )
        ],
    ),
    # -- pins ----------------------------------------------------------------------------------------------
    Plant(
        "I6-unpinned-and-counted",
        "A page that is unpinned counts its pin for good, and is given up by nobody.",
        "I6",
        [Edit("kvmd.core.mm.mm:Mm.unpin", "page.pins -= 1", "pass")],
    ),
    Plant(
        "I6-pins-never-put",
        "What a VM had pinned it lets go of, and tells nobody.",
        "I6",
        [Edit("kvmd.core.export.pinning:Pinning.put", "self._frames.mm.unpin(page)", "pass")],
    ),
    Plant(
        "I22-everything-but-what-comes",
        "Who has everything pinned does not get the memory of a slot that comes.",
        "I22",
        [
            Edit(
                "kvmd.core.export.pinning:Pinning.follow",
                "for request in [request for request in self.requests() if request.everything]:",
                "for request in list[Request]():",
            )
        ],
    ),
    Plant(
        "I6-unpinned-and-charged",
        "Who unpins pages is charged for them on, until he may pin no more.",
        "I6",
        [Edit("kvmd.core.mm.locked:LockedVm.uncharge", "self.pages -= npages", "pass")],
    ),
    Plant(
        "I6-two-pay",
        "Who has paid for what another takes over goes on being charged for it.",
        "I6",
        [Edit("kvmd.core.mm.hmm:Mirror._pay_with", "self.payer.uncharge(npages)", "pass")],
    ),
    # -- by other ways than the slot's ---------------------------------------------------------------------
    Plant(
        "I11-swapped-out-is-a-hole",
        "Who reads a file finds zeroes where a page of it is in swap.",
        "I11",
        [
            Edit(
                "kvmd.core.mm.file:MemoryFile.pread",
                "if index in self._cache:",
                "if isinstance(self._cache.get(index), Page):",
            )
        ],
    ),
    Plant(
        "I21-zeroes-are-writable",
        "Who fills what is missing with zeroes gives the one page of zeroes away to be written.",
        "I21",
        [
            Edit(
                "kvmd.core.mm.userfaultfd:Userfaultfd._fill",
                "and page.kind is not PageKind.ZERO",
                "and True",
            )
        ],
    ),
    Plant(
        "I11-hole-stays-mapped",
        "A hole in a guest_memfd takes its pages from the guest, and not from a process that has mapped it.",
        "I11",
        [
            Edit(
                "kvmd.core.slots.private_memory:PrivateMemory._drop",
                "await memfd.unmap(pages.start, pages.stop, copies_too=False)",
                "pass",
            )
        ],
    ),
    Plant(
        "I6-process-without-a-limit",
        "All processes together have a limit of what may be pinned, and none has one of its own.",
        "I6",
        [
            Edit(
                "kvmd.core.mm.mm:Mm.__init__",
                'LockedVm("the process", memory.memlock_pages)',
                'LockedVm("the process", None)',
            )
        ],
    ),
)
