"""nested: the RFC has no nested translation, so a KVM HWPT is no nest parent (RFC-43, RFC-55).

The reason is the fault path: a fault on a nested domain would have to be told apart into one of the guest's
first stage and one of KVM's second.  Whoever tries is told so; so are those who want of a KVM HWPT what
only nesting or dirty tracking would give (RFC-44, RFC-56).  The device that is attached works on.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from dataclasses import dataclass

from protocol.uapi import names
from qemu_shim.api import Context, Guest, Scenario

FIRST_STAGE_DATA = 1  # IOMMU_HWPT_DATA_VTD_S1
ONLY_PARENT = "no nest parent, faults of a nested domain are not handled"


@dataclass(frozen=True, slots=True)
class _Attempt:
    what: str
    number: int
    why: str
    call: Awaitable[object]


def _attempts(guest: Guest) -> list[_Attempt]:
    machine = guest.machine
    iommu, hwpt, tdp_fd, dev_id = machine.iommu, machine.hwpt_id, machine.tdp_fd, machine.device_id
    nest, dirty = names.IOMMU_HWPT_ALLOC_NEST_PARENT, names.IOMMU_HWPT_ALLOC_DIRTY_TRACKING

    def child(data_type: int, data: bytes) -> Awaitable[object]:
        return iommu.ask(
            "IOMMU_HWPT_ALLOC",
            dev_id=dev_id,
            pt_id=hwpt,
            data_type=data_type,
            data_len=len(data),
            data_uptr=data or None,
        )

    return [
        _Attempt(
            "KVM HWPT as a nest parent from the start",
            errno.EOPNOTSUPP,
            ONLY_PARENT,
            iommu.hwpt_alloc_kvm(dev_id, tdp_fd, nest),
        ),
        _Attempt(
            "KVM HWPT with dirty tracking",
            errno.EOPNOTSUPP,
            "flags",
            iommu.hwpt_alloc_kvm(dev_id, tdp_fd, dirty),
        ),
        _Attempt(
            "child of the KVM HWPT",
            errno.EINVAL,
            ONLY_PARENT,
            child(names.IOMMU_HWPT_DATA_NONE, b""),
        ),
        _Attempt(
            "child with a first stage of the guest's",
            errno.EINVAL,
            ONLY_PARENT,
            child(FIRST_STAGE_DATA, bytes(24)),
        ),
        _Attempt(
            "invalidation of the guest's first stage",
            errno.ENOENT,
            "nested",
            iommu.ask("IOMMU_HWPT_INVALIDATE", hwpt_id=hwpt),
        ),
        _Attempt(
            "dirty bits of the KVM HWPT",
            errno.ENOENT,
            "",
            iommu.ask("IOMMU_HWPT_GET_DIRTY_BITMAP", hwpt_id=hwpt),
        ),
    ]


async def play(ctx: Context) -> None:
    guest = await ctx.boot(records_present=True)
    before = await _objects(ctx, guest)
    attempts = _attempts(guest)
    for each in attempts:
        await ctx.expect_refused(each.what, each.number, each.why, each.call)
    ctx.expect_equal(await _objects(ctx, guest), before, "HWPTs, importers and TDPs after all that")
    async with ctx.counted() as cost:
        await guest.fill(guest.pages(1)[0])
    ctx.expect_equal(cost.io_faults, 1, "page requests of DMA afterwards")
    ctx.figures |= {"refused": len(attempts)}
    ctx.row("attempts, all refused", len(attempts))


async def _objects(ctx: Context, guest: Guest) -> tuple[int, int, int]:
    hwpts = (await ctx.host.iommufdd.stats())["hwpts"]
    vm = (await guest.inspect())["stats"]
    return len(hwpts), vm["importers"], vm["exported_tdps"]


SCENARIO = Scenario(
    name="nested",
    summary="a KVM HWPT is no nest parent: refused with the RFC's reason, nothing is left of the attempts",
    tags=("Nested translation is not supported", "RFC-43", "RFC-44", "RFC-55", "RFC-56"),
    play=play,
    designs=("shared",),
)
