"""A design nobody thought of: said by the bits of a policy, in one file, and compared with those we have.

What is played and on what is the file below; neither kvmd nor qemu-shim has a line for it.  Its root is the
IOMMU's own as that of `managed`, but ages, logs and tracks as a CPU's does, has no leaf above 4 KiB, and is
filled by devices alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_shim.study.compare.schema import Comparison, DesignFigures
from tests.integration.scratch import Scratch, scratched

SIXTH = '''"""Pages that the CPU has written are copied by the device."""
from protocol.uapi import names
from qemu_shim.api import Context, Design, Stroke, scenario
from qemu_shim.vmm.designs import KvmContainer

BEHAVIOURS = (
    names.KVM_TDP_FD_ROOT_AGES | names.KVM_TDP_FD_ROOT_LOGS | names.KVM_TDP_FD_ROOT_TRACKS
)


async def open_lazy(vm, process):
    await vm.enable_cap(names.KVM_CAP_TDP_FD_ROOT_POLICY, BEHAVIOURS, 1)
    return await KvmContainer.open(vm, process)


LAZY = Design(
    "lazy",
    "a second root of KVM's, filled by the device's faults",
    open_lazy,
    Stroke("#555", "#aaa", 2),
    owners=("cpu", "iommu"),
    touch_serves=False,
)


@scenario(designs=("managed", "shared", "lazy"))
async def copied(ctx: Context) -> None:
    guest = await ctx.boot()
    pages = guest.pages(16)
    for page in pages[:8]:
        await guest.write(page, b"hello")
    for src, dst in zip(pages[:8], pages[8:]):
        await guest.copy(dst, src)
    for dst in pages[8:]:
        ctx.expect_equal(await guest.read(dst, 5), b"hello", "the copy")
'''


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    with scratched() as made:
        yield made


def test_a_sixth_design_is_compared_and_touches_no_other_file(scratch: Scratch, tmp_path: Path) -> None:
    program, figures = tmp_path / "sixth.py", tmp_path / "figures.json"
    program.write_text(SIXTH)
    status, out, err = scratch.run("compare", str(program), "--json", str(figures))
    assert status == 0, out + err
    found = of(Comparison.model_validate_json(figures.read_bytes()))
    assert set(found) == {"managed", "shared", "lazy"}
    assert len({it.work.dma_bytes for it in found.values()}) == 1
    records = 1  # a page of them
    assert found["managed"].faults.io == found["shared"].faults.io == 8 + records, "what no CPU has written"
    assert found["lazy"].faults.io == 16 + records, "what a CPU has written as well"
    assert "lazy" in out


def of(comparison: Comparison) -> dict[str, DesignFigures]:
    (workload,) = comparison.workloads
    return {it.design: it for it in workload.designs}
