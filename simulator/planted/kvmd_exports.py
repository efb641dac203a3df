"""Mistakes in what kvmd lends, to whom, and what is pinned for them."""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

_EXPORTS = "kvmd.core.export.exports:Exports"
_TDP = "kvmd.core.export.tdp_fd:ExportedTdp"
_TDP_FD = "kvmd.core.export.importer:TdpFd"
_REGISTRATION = "kvmd.core.export.importer:Registration"
_PINNING = "kvmd.core.export.pinning:Pinning"
_REMOTE = "kvmd.importers:RemoteImporter"

KVMD_EXPORTS = (
    # -- a TDP FD ----------------------------------------------------------------------------------------
    Plant(
        "B-02-two-critical-sections",
        "Whether an address space is exported is asked before the request sleeps: of two that race both win.",
        "I10",
        [
            Edit(
                f"{_EXPORTS}._reserve",
                "self.tdps.__contains__, check",
                "lambda as_id: False, check",
            )
        ],
        races=["B-02"],
    ),
    Plant(
        "B-05-published-half-made",
        "A TDP FD can be used, and closed, before it is listed among its VM's.",
        "R13",
        [
            Edit(
                "kvmd.service.vm:_create_tdp_fd",
                "fd, _, _ = owner.app.files.open(TDP_FD, TdpFile(owner.app, tdp), tdp_fd_closed)",
                "listed = owner.vm.exports.tdps.pop(message.as_id)\n"
                "    fd, _, _ = owner.app.files.open(TDP_FD, TdpFile(owner.app, tdp), tdp_fd_closed)\n"
                "    owner.vm.exports.tdps[message.as_id] = listed",
            )
        ],
        races=["B-05", "R13"],
        simulated=False,  # nothing runs between the two here: it takes a second thread
    ),
    Plant(
        "B-06-busy-after-a-failed-copy",
        "A TDP FD whose result cannot be written stays exported, and nobody has it.",
        "R13",
        [Edit(f"{_EXPORTS}.create", "await self.close(exported)", "pass")],
        races=["B-06", "R13"],
    ),
    Plant(
        "B-18-zapped-at-release",
        "The last close of a TDP FD zaps a root that vCPUs run on, and flushes nothing.",
        "I6",
        [
            Edit(
                f"{_EXPORTS}.release",
                "self._tdp.mmu.put_root(exported.root)",
                "from kvmd.core.tables import tdp_mmu\n"
                "    tdp_mmu.zap_leafs(self._tdp.mmu, exported.root.everything)\n"
                "    self._tdp.mmu.put_root(exported.root)",
            )
        ],
        races=["B-18"],
    ),
    Plant(
        "R28-released-under-a-lease",
        "The last close of a TDP FD does not wait for who still walks on an importer's behalf.",
        "I13",
        [Edit(f"{_TDP_FD}.release", "await leases[0].ended", "break")],
        races=["R28"],
    ),
    Plant(
        "R28-one-look-at-leases",
        "The lease of an importer that registers while another's is waited for is not waited for.",
        "I13",
        [
            Edit(
                f"{_TDP_FD}.release",
                "while leases := [lease for lease in self.leases if not lease.ended.done]:\n"
                "        await leases[0].ended",
                "for lease in [lease for lease in self.leases if not lease.ended.done]:\n"
                "        await lease.ended",
            )
        ],
        races=["R28", "R26"],
    ),
    Plant(
        "R26-registers-while-taken-back",
        "An importer registers, and pins, while the table it is lent is being taken back.",
        "I15",
        [Edit(f"{_TDP}.register_importer", "self.check_alive()", "pass")],
        races=["R26"],
    ),
    Plant(
        "B-36-answers-after-release",
        "An importer that let its TDP FD go still gets the metadata of a root that is nobody's.",
        "I10",
        [Edit(f"{_TDP}.check_alive", "if self._state is not ExportState.LENT:", "if False:")],
        races=["B-36"],
    ),
    Plant(
        "B-38-another-process",
        "Faults for an HWPT of another process are served.",
        "I11",
        [Edit(f"{_TDP}.fault", "if mm_cookie != self.mm.cookie:", "if False:")],
        races=["B-38"],
    ),
    Plant(
        "B-27-noncoherent-later",
        "Non-coherent DMA may be registered while a TDP is exported as write-back memory.",
        "R15",
        [Edit(f"{_EXPORTS}.register_noncoherent_dma", "if self.tdps:", "if False:")],
        races=["B-27", "R15"],
    ),
    Plant(
        "B-28-vcpu-of-another-width",
        "A vCPU whose MAXPHYADDR takes another root leaves the shared table unnoticed.",
        "I10",
        [Edit(f"{_EXPORTS}.check_width", "if self.is_apart(exported, maxphyaddr):", "if False:")],
        races=["B-28"],
    ),
    Plant(
        "own-root-not-dismantled",
        "The IOMMU's own root is left as it is when its TDP FD is closed.",
        "I7",
        [Edit(f"{_EXPORTS}.close", "await self._tdp.zapper.dismantle([root])", "pass")],
        races=["B-23"],
    ),
    # -- importers ---------------------------------------------------------------------------------------
    Plant(
        "B-09-one-importer-is-told",
        "Importers are told by the ops they share, so of two on one TDP FD one hears.",
        "I15",
        [
            Edit(
                f"{_TDP}.flush_notify",
                "list(self._importers.values())]",
                "list(self._importers.values())[:1]]",
            )
        ],
        races=["B-09", "R8"],
    ),
    Plant(
        "B-09-unregisters-another",
        "Unregistering goes by name alone and takes away who has it now.",
        "I15",
        [
            Edit(
                f"{_TDP}.unregister_importer",
                "if self._importers.get(name) is ops:",
                "if name in self._importers:",
            )
        ],
        races=["B-09"],
        simulated=False,  # a name is its owner's until he unregisters, which he does once: EBUSY meets others
    ),
    Plant(
        "R26-leaves-before-its-lease",
        "An importer that leaves counts as gone while something still walks for it.",
        "I13",
        [Edit(f"{_REGISTRATION}.leave", "await self._lease.ended", "pass")],
        races=["R26", "R28"],
    ),
    Plant(
        "R26-unregistered-first",
        "An importer that leaves is told nothing from then on, though it walks until its lease ends.",
        "I13",
        [
            Edit(
                f"{_REGISTRATION}.leave",
                "await self._lease.ended",
                "self._tdp.exported.unregister_importer(self.name, self._ops)\n    await self._lease.ended",
            )
        ],
        races=["R26", "R28"],
    ),
    Plant(
        "R28-death-is-an-ack",
        "An importer that dies before it acked has acked: what walked for it may walk on.",
        "I13",
        [
            Edit(
                "kvmd.core.lease:ack_with_lease",
                "lease.ended.on_done(lambda _: acked.set(None))",
                "acked.set(None)",
            )
        ],
        races=["R28"],
    ),
    Plant(
        "remote-acks-not-awaited",
        "TDP_INVALIDATE and HMM_INVALIDATE are sent, and their replies not waited for.",
        "I6",
        [
            Edit(
                f"{_REMOTE}.invalidate",
                "self._tell(start, size, number).on_done(lambda wait: self._on_reply(wait, acked))",
                "self._tell(start, size, number)\n    acked.set(None)",
            )
        ],
        races=["R4", "R17"],
    ),
    Plant(
        "own-root-told-too-little",
        "An importer whose root did not change is not waited for either, though it was told before.",
        "I6",
        [Edit(f"{_TDP}.flush_notify", "return self._told", "return []")],
        races=["R17"],
    ),
    # -- pins --------------------------------------------------------------------------------------------
    Plant(
        "pin-stands-on-what-was",
        "A pin that slept in its fault does not ask again what it asked before.",
        "I22",
        [
            Edit(
                f"{_PINNING}._pin",
                "if self._stands(request, slot, gfn) else None",
                "if True else None",
            )
        ],
        races=["R1"],
    ),
    Plant(
        "pins-forgotten-with-nobody",
        "Requests go on believing in pins that went with their slot.",
        "I22",
        [Edit(f"{_PINNING}.forget", "request.gfns.difference_update(gone)", "pass")],
        races=["R21"],
    ),
    Plant(
        "pins-put-before-the-flush",
        "A slot's pinned pages are given back before what translates them is flushed.",
        "I6",
        [
            Edit(
                "kvmd.core.slots.slots_change:SlotsChange._replace",
                "await self._tdp.zapper.zap_all_fast(old.as_id, old.span)\n"
                "            self._pinning.put(pages)",
                "self._pinning.put(pages)\n"
                "            await self._tdp.zapper.zap_all_fast(old.as_id, old.span)",
            )
        ],
        races=["R21", "R4"],
    ),
    Plant(
        "unpinned-before-its-entry-goes",
        "A pin whose page the host has taken meanwhile is given up before its entry is flushed.",
        "I6",
        [
            Edit(
                f"{_PINNING}._take_back",
                "    if zapped:\n",
                "    self.put(pages)\n    pages = []\n    if zapped:\n",
            )
        ],
        races=["R4"],
    ),
)
