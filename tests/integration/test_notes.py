"""The notes of the RFC's cover letter, played by hand on daemons of their own: what each run must come to."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from qemu_shim.scenarios.series.memory import TOLD
from tests.kit.daemons import BIN
from tests.patience import WHOLE_RUN_S

Figures = dict[str, Any]


def run(name: str, *options: str) -> tuple[list[str], Figures]:
    """Lines and figures of a run that held."""
    ended = subprocess.run(
        [str(BIN / "qemu-shim"), "run", "--json", name, *options],
        capture_output=True,
        text=True,
        timeout=WHOLE_RUN_S,
        check=False,
    )
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    assert (report["problems"], ended.returncode) == ([], 0)
    return report["lines"], report["figures"]


@pytest.mark.rfc("RFC-73")
@pytest.mark.defect("B-24")
@pytest.mark.parametrize("tries", [1, 16])
def test_a_dma_write_to_a_tracked_page_is_refused_after_one_request_and_a_vcpus_store_emulated(
    tries: int,
) -> None:
    _, figures = run("write-tracking", "--tries", str(tries))
    assert figures["stores_emulated"] == tries
    assert figures["dma_refused"] == figures["requests"] == figures["io_faults"] == 2 * tries
    assert figures["requests_of_reads"] == 0, "the entry is readable"


@pytest.mark.rfc("RFC-11", "RFC-27", "RFC-48", "RFC-52", "RFC-58")
@pytest.mark.defect("B-27")
def test_each_weak_unit_is_refused_with_its_reason_and_dma_always_snoops() -> None:
    lines, figures = run("coherency")
    assert (figures["refused"], figures["attached"], figures["pgsnp"]) == (3, 1, 1)
    assert figures["entries"] > 16
    for number, why in enumerate(("SMPWC", "ECAP.SC)", "SMTS"), 1):
        alloc, attach = (line for line in lines if f"device {number}:" in line)
        assert "[EOPNOTSUPP]" in alloc
        assert "[EINVAL]" in attach
        assert why in alloc
        assert why in attach
    later, first = lines[-2:]
    assert "[EBUSY]" in later
    assert "[EINVAL]" in first


@pytest.mark.rfc("RFC-29", "RFC-71", "RFC-104")
@pytest.mark.defect("B-22")
def test_dma_to_cached_mmio_never_reaches_the_page_at_that_hpa_and_a_slot_there_later_works() -> None:
    _, figures = run("mmio", "--rounds", "4")
    assert (figures["mmio_entries_made"], figures["dma_refused"], figures["generations"]) == (5, 10, 8)


@pytest.mark.rfc("RFC-43", "RFC-44", "RFC-55", "RFC-56")
@pytest.mark.defect("B-16")
def test_a_kvm_hwpt_is_no_nest_parent_for_the_rfcs_reason() -> None:
    lines, figures = run("nested")
    assert figures["refused"] == len(lines) == 6
    assert sum("faults of a nested domain are not handled" in line for line in lines) == 3


def test_interrupt_messages_reach_the_vmm_and_a_memslot_over_their_window_no_device() -> None:
    lines, figures = run("msi", "--interrupts", "100")
    assert (figures["interrupts"], figures["faults"], figures["window_pages"]) == (100, 10, 256)
    assert [line.split(" behind ")[0] for line in lines] == ["nothing", "a memslot"]


@pytest.mark.rfc("RFC-05", "RFC-89", "RFC-96")
def test_no_device_finds_what_lies_in_smm_ram_and_importers_hear_of_its_flushes() -> None:
    lines, figures = run("smm")
    assert (figures["leaks"], figures["roots"]) == (0, 2)
    assert (figures["told_of_migration"], figures["told_of_deletion"]) == (1, 1)
    assert "only 0 can be exported" in lines[0]


@pytest.mark.rfc("RFC-97")
@pytest.mark.defect("B-34", "B-35")
@pytest.mark.parametrize("huge", [0, 1])
def test_a_migrated_copy_is_equal_and_write_protection_costs_io_faults(huge: int) -> None:
    _, figures = run("migration", "--rounds", "3", "--pages", "128", "--huge", str(huge))
    for kind in ("bitmap", "ring"):
        pages, sent = figures[f"{kind}_pages"], figures[f"{kind}_sent"]
        assert figures[f"{kind}_rounds"] == 5
        assert figures[f"{kind}_last"] <= pages < sent <= 5 * pages
        assert 0 < figures[f"{kind}_protection_faults"] <= figures[f"{kind}_device"]


@pytest.mark.rfc("RFC-77", "RFC-87", "RFC-94", "RFC-99")
def test_whatever_the_host_does_under_dma_loses_no_data_and_is_told_to_importers() -> None:
    _, figures = run("memory", "--rounds", "2")
    assert figures["copies"] > 40
    assert len(figures["actions"]) == 10
    assert figures["invalidation_descriptors"] >= sum(cost["flushes"] for cost in figures["actions"].values())
    for name, cost in figures["actions"].items():
        assert tuple(cost) == TOLD
        assert cost["affected"] > 0, name
    for name in ("swap_out", "migrate", "numa_hint", "punch hole", "fork"):
        assert figures["actions"][name]["io_faults"] > 0, name
