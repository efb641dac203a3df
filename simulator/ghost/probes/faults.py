"""The way of a fault, of a vCPU, of a device, or asked for in advance; and the roots that are lent for it."""

from __future__ import annotations

from typing import Any

from iommufdd.core.hwpt import Hwpt
from iommufdd.core.hwpt_kvm import HwptKvm
from iommufdd.core.hwpt_mirror import HwptMirror
from kvmd.core.cpu.vcpu import Vcpu
from kvmd.core.export.exports import Exports
from kvmd.core.export.tdp_fd import ExportedTdp
from kvmd.core.faults.fault_path import FaultPath
from kvmd.core.faults.page_fault import FaultingVcpu, FaultResult, PageFault
from kvmd.core.slots.memslot import Memslot
from kvmd.core.tables.flush import Flusher
from kvmd.core.tables.tdp_mmu import MapOutcome
from kvmd.core.tables.tdp_table import Root
from kvmd.core.vm import Kvm
from protocol.errors import UapiError
from protocol.hw.prq import PageRequest
from protocol.pt import bits
from protocol.pt.geometry import address_bits
from simulator.ghost.probes.watch import During, Seams, Trying, Watch, step_by_step

seams = Seams()


@seams.around(FaultPath, "handle_fault")
async def _handle_fault(
    watch: Watch, original: Any, path: FaultPath, fault: PageFault, vcpu: FaultingVcpu | None = None
) -> Any:
    with watch.must_end("fault"):
        result = await original(path, fault, vcpu)
    if result is FaultResult.NO_PAGE:
        root = path._mmu.exported_root(fault.as_id) if vcpu is None else _runs_on(vcpu, fault.as_id)
        if root is not None:
            watch.ghost.faults.failed(root.hpa, fault.gfn, bits.WRITE if fault.write else bits.READ)
    return result


def _runs_on(vcpu: FaultingVcpu, as_id: int) -> Root | None:
    """As it is: to ask the vCPU may give it another one."""
    roots: list[Root | None] = getattr(vcpu, "roots", [None] * (as_id + 1))
    return roots[as_id]


@seams.around(FaultPath, "_try")
async def _try(
    watch: Watch, original: Any, path: FaultPath, fault: PageFault, vcpu: FaultingVcpu | None
) -> Any:
    before = watch.ghost.heard.changes
    result = await step_by_step(original(path, fault, vcpu), _Try(watch, Trying(fault.gfn)))
    if result is None:
        watch.ghost.faults.tried(fault.gfn, before, watch.ghost.heard.changes)
    return result


class _Try(During):
    def __init__(self, watch: Watch, trying: Trying) -> None:
        super().__init__(watch, "trying", trying)
        self._trying = trying

    def __exit__(self, *how: object) -> None:
        super().__exit__(*how)
        trying, ghost = self._trying, self._watch.ghost
        if trying.mapped and not trying.is_short:
            ghost.own.mapped(ghost.view_of(trying.mapped), trying.mapped, trying.page)
        trying.mapped, trying.is_short = 0, False


@seams.around(FaultPath, "_store")
def _store(
    watch: Watch,
    original: Any,
    path: FaultPath,
    root: Root,
    fault: PageFault,
    slot: Memslot,
    *args: Any,
) -> Any:
    watch.ghost.faults.maps_into(root.hpa)
    watch.goes_by(path._frames.slots, slot, f"a fault on page {fault.gfn:#x}")
    trying = watch.trying
    assert trying is not None, "who stores tries"
    try:
        mapped = original(path, root, fault, slot, *args)
    except UapiError:
        trying.is_short = True
        raise
    trying.met_frozen |= mapped.outcome is MapOutcome.RETRY
    if root.role.policy.cpus:
        trying.mapped = root.hpa
    return mapped


@seams.around(Flusher, "drain")
async def _drain(watch: Watch, original: Any, flusher: Flusher) -> None:
    trying = watch.trying
    if trying is not None and not trying.changes and watch.flushing[flusher._vm_id]:
        watch.ghost.faults.waits_for_acks(trying.page, met_frozen=trying.met_frozen)
    await original(flusher)


async def _fault_in(watch: Watch, original: Any, hwpt: Hwpt, request: PageRequest) -> None:
    watch.looked_up[request] = 0
    try:
        await original(hwpt, request)
    except UapiError as error:
        watch.looked_up[request] = error.errno
        raise


seams.around(HwptKvm, "fault_in")(_fault_in)
seams.around(HwptMirror, "fault_in")(_fault_in)


@seams.around(Hwpt, "fault")
async def _fault(watch: Watch, original: Any, hwpt: Hwpt, request: PageRequest) -> Any:
    code = await original(hwpt, request)
    refused = watch.looked_up.pop(request, None)
    if refused is not None or request.addr >> address_bits(hwpt.domain.level) == 0:
        watch.ghost.groups.finds(request, code, refused)
    return code


@seams.around(Exports, "close")
async def _close(watch: Watch, original: Any, exports: Exports, exported: ExportedTdp) -> None:
    """A root that devices alone walked goes with its last export."""
    root = exported.root
    lent = sum(not lease.ended.done for lease in watch.leases.pop(id(exported), ()))
    watch.ghost.lent.ends(watch.ghost.view_of(root.hpa), leases=lent)
    await original(exports, exported)
    if not root.role.policy.cpus:
        watch.ghost.root_left(root.hpa)


@seams.around(Exports, "register_noncoherent_dma")
def _register_noncoherent_dma(watch: Watch, original: Any, exports: Exports) -> None:
    original(exports)
    for as_id in range(exports._slots.address_spaces):
        watch.ghost.lent.snoops_no_more(watch.view(exports._slots, as_id))


@seams.around(Kvm, "set_maxphyaddr")
def _set_maxphyaddr(watch: Watch, original: Any, vm: Kvm, vcpu: Vcpu, maxphyaddr: int) -> None:
    original(vm, vcpu, maxphyaddr)
    level = vm.host.features.root_level(maxphyaddr)
    for as_id in range(vm.slots.address_spaces):
        watch.ghost.lent.runs_on(vcpu.arch.id, watch.view(vm.slots, as_id), level)
