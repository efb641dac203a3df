"""`--trace FILE`: the lines of a run, against counters kept elsewhere."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from protocol.units import PAGE_SIZE
from qemu_shim.vmm.daemons import DEVICE_SIM, KVMD, DaemonSpec, Places
from qemu_shim.vmm.machine import Host, connect_host
from tests.integration.plain import Plain
from tests.kit.daemons import BIN, System, system
from tests.kit.vmm import rigged, vm_stats


def names(text: str) -> Counter[str]:
    return Counter(line.partition(":")[0] for line in text.splitlines())


@asynccontextmanager
async def worked(running: System) -> AsyncIterator[Host]:
    """After faults of both kinds and an invalidation; what tear-down traces is yet to come."""
    async with connect_host(running.directory) as host, rigged(host) as rig:
        pages = rig.memory.allocate(8)
        await rig.memory.touch([pages + n * PAGE_SIZE for n in range(4)])
        for n in range(4, 8):
            await rig.fill(pages + n * PAGE_SIZE)
        await rig.process.madvise_dontneed(rig.hva + pages, 4 * PAGE_SIZE)
        yield host


async def test_a_line_an_event_as_many_as_the_counters_say(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("kvmd", "iommufdd")]
    with system({file.name: ["--trace", str(file)] for file in files}) as running:
        async with worked(running) as host:
            vm, unit = await vm_stats(host), (await host.device_sim.stats())["unit"]
            kvmd, iommufdd = [await trio.Path(file).read_text() for file in files]
    mapped = vm["pf_fixed"] + vm["io_pf_fixed"]
    seen = names(kvmd)
    assert seen["kvm_page_fault"] == vm["ept_violations"]
    assert seen["kvm_mmu_set_spte"] == mapped
    assert len(re.findall(r"level 1 old_spte 0 new_spte", kvmd)) == mapped
    assert len(re.findall(r"level 1 old_spte [0-9a-f]+ new_spte 0\n", kvmd)) == 4
    assert seen["kvm_unmap_hva_range"] == 1
    seen = names(iommufdd)
    assert seen["prq_report"] == unit["page_requests"]
    assert seen["qi_submit"] == unit["page_requests"] + unit["invalidation_descriptors"]  # a response each
    assert seen["attach_device_to_domain"] == 1
    assert "inv_wait" not in iommufdd


@pytest.mark.parametrize("daemon", [KVMD, DEVICE_SIM], ids=lambda daemon: daemon.command)
def test_a_trace_file_that_cannot_be_made_keeps_the_daemon_from_starting(
    daemon: DaemonSpec, tmp_path: Path
) -> None:
    command, *options = daemon.argv(Places(tmp_path, tmp_path, tmp_path))
    ended = subprocess.run(
        [str(BIN / command), *options, "--trace", str(tmp_path / "no" / "where")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "No such file or directory" in ended.stderr


async def test_a_trace_file_on_a_full_disk_ends_tracing_and_not_the_daemon() -> None:
    with system({"kvmd": ["--trace", "/dev/full"]}) as running:
        async with worked(running):
            pass
        peer = Plain.connect(running.socket("kvmd"))
        assert peer.ask("CHECK")[0] == {"violations": []}
        peer.close()
        assert "no more tracing" in running.log("kvmd")
