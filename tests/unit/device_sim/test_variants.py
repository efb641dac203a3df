"""Units and functions that lack something: what they refuse, in which order they are switched on, FPD."""

from __future__ import annotations

import errno
from typing import Any, get_args

import pytest

from device_sim.config import FIRST_RID, DeviceSimSettings, parse
from device_sim.core.dmar import RequestRefused
from device_sim.core.function import DmaRange, Function
from device_sim.core.traits import Traits, capabilities
from protocol.errors import UapiError
from protocol.hw.dsa import FAULT_CAPABILITIES
from protocol.uapi.link import FunctionInfo
from protocol.units import Iova
from tests.kit.raw_driver import Stopped
from tests.kit.silicon import (
    DID,
    RID,
    Silicon,
    descriptor,
    devtlb_all,
    iotlb_domain,
    iotlb_pages,
    pasid_cache,
    pasid_entry,
)

FPD = 2
SPT_2, SPT_4, SSS_1, SSS_3, SGN_5, SCT_5 = 0x59, 0x5B, 0x78, 0x7A, 0x84, 0x44


def lacking(**fields: Any) -> Silicon:
    cap, ecap = capabilities(**fields)
    silicon = Silicon(cap=cap, ecap=ecap)
    silicon.attach()
    return silicon


# -- fault processing disable --------------------------------------------------------------------------


def hide_faults(silicon: Silicon, entry: bytes) -> None:
    hidden = bytes([entry[0] | FPD]) + entry[1:]
    silicon.write_pasid_entry(RID, hidden)
    silicon.execute(pasid_cache(DID))


def misuse(silicon: Silicon, reason: int) -> bytes:
    """Make page 7 fault for that reason; the PASID entry under which it does."""
    root = silicon.tables.root
    if reason == SSS_3:
        silicon.map(7, 1)
        at = silicon.tables.entry_at(7, 2)
        silicon.tables.store(at, silicon.tables.load(at) | 1 << 11)
    elif reason == SSS_1:
        silicon.tables.store(silicon.tables.entry_at(7, 4), 0x7000_0000 | 7)
    entries = {SPT_2: bytes(64), SPT_4: pasid_entry(root, pgtt=3)}
    return entries.get(reason, pasid_entry(root))


@pytest.mark.parametrize("reason", [SPT_2, SPT_4, SSS_1, SSS_3, SGN_5])
def test_a_qualified_fault_is_recorded_unless_fpd_is_set(reason: int) -> None:
    """Rejected it is all the same."""
    page = 1 << 40 if reason == SGN_5 else 7
    for hidden in (False, True):
        silicon = Silicon()
        silicon.attach()
        entry = misuse(silicon, reason)
        silicon.write_pasid_entry(RID, entry)
        if hidden:
            hide_faults(silicon, entry)
        with pytest.raises(RequestRefused) as refused:
            silicon.translate(page)
        assert int(refused.value.reason) == reason
        recorded = [] if hidden else [reason]
        assert [record.reason for record in silicon.faults()] == recorded
        assert (silicon.unit.faults.recorded, silicon.events) == (len(recorded), len(recorded))


def test_a_fault_before_any_entry_is_found_cannot_be_hidden() -> None:
    silicon = Silicon()
    with pytest.raises(RequestRefused):
        silicon.translate(7)
    assert [record.reason for record in silicon.faults()] == [SPT_2]


# -- invalidation queue --------------------------------------------------------------------------------


@pytest.mark.rfc("RFC-91")
def test_a_unit_without_page_selective_invalidation_stops_at_such_a_descriptor() -> None:
    silicon = lacking(psi=0)
    with pytest.raises(Stopped, match="4"):
        silicon.execute(iotlb_pages(DID, 7))
    silicon.driver.recover()
    silicon.execute(iotlb_domain(DID))


@pytest.mark.rfc("RFC-91")
@pytest.mark.parametrize("mamv", [0, 3])
def test_a_mask_beyond_mamv_stops_the_queue(mamv: int) -> None:
    silicon = lacking(mamv=mamv)
    silicon.execute(iotlb_pages(DID, 0, mamv))
    with pytest.raises(Stopped, match="4"):
        silicon.execute(iotlb_pages(DID, 0, mamv + 1))


def test_a_unit_without_device_tlbs_refuses_their_descriptors_and_translation_requests() -> None:
    silicon = lacking(dt=0)
    with pytest.raises(Stopped, match="3"):
        silicon.execute(devtlb_all(RID))
    with pytest.raises(RequestRefused):
        silicon.translate(7)
    assert [record.reason for record in silicon.faults()] == [SCT_5]


def test_when_a_wait_with_pd_completes_every_request_before_it_lies_in_memory() -> None:
    silicon = lacking()
    silicon.start(silicon.function.make_accessible([DmaRange(Iova(0x7000), 8, True)], block=True))
    drain = descriptor(5 | 1 << 5 | 1 << 7 | 9 << 32)
    fence = descriptor(5 | 1 << 6)
    assert silicon.execute(fence) == [], "no status is written that was not asked for"
    assert silicon.execute(drain) == [9]
    assert [asked.page for asked in silicon.requests()] == [7]


# -- config space --------------------------------------------------------------------------------------


def switched(silicon: Silicon, *steps: dict[str, Any], traits: Traits | None = None) -> Function:
    made = Function(0x6B00, silicon.unit, silicon.memory, lambda: 0, traits)
    for step in steps:
        made.configure(**step)
    return made


PASID, ATS, PRI = {"pasid": True}, {"ats": True}, {"pri_allocation": 64}


@pytest.mark.rfc("RFC-60")
@pytest.mark.parametrize("steps", [(ATS, PASID), (PRI,), (PASID, PRI), (ATS, PASID, PRI)], ids=str)
def test_pasid_comes_before_ats_and_ats_before_page_requests(steps: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.EINVAL):
        switched(Silicon(), *steps)
    on = switched(Silicon(), PASID, ATS, PRI)
    assert (on.pasid_enabled, on.ats_enabled, on.pri.allocation, on.dma_enabled) == (True, True, 64, False)


@pytest.mark.parametrize(
    ("traits", "steps"),
    [
        (Traits(pasid=False), (PASID,)),
        (Traits(ats=False), (ATS,)),
        (Traits(pri=False), (ATS, PRI)),
    ],
)
def test_a_capability_that_is_not_there_is_not_switched_on(
    traits: Traits, steps: tuple[dict[str, Any], ...]
) -> None:
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.EINVAL):
        switched(Silicon(), *steps, traits=traits)


@pytest.mark.rfc("RFC-62")
def test_page_requests_that_are_on_are_ebusy_and_are_on_again_after_a_reset() -> None:
    made = switched(Silicon(), ATS, traits=Traits(pri_on=True))
    assert made.pri.enabled
    with pytest.raises(UapiError, check=lambda error: error.errno == errno.EBUSY):
        made.configure(pri_allocation=64)
    made.configure(pri_allocation=0)
    assert not made.pri.enabled
    made.stop()
    assert made.pri.enabled
    assert not made.ats_enabled


# -- the command line ----------------------------------------------------------------------------------


def settings(*argv: str) -> DeviceSimSettings:
    return parse(["--socket", "s", "--driver-socket", "d", *argv])[1]


def test_one_unit_and_one_device_are_changed_and_the_others_are_as_for_all() -> None:
    made = settings(
        *("--devices", "3", "--units", "2", "--max-page", "2M", "--no-psi"),
        *("--unit", "1:no-snoop-control,mamv=3"),
        *("--device", "2:unit=1,group=0,no-pri,fault-capability=partial"),
    )
    first, second = made.units
    assert (first.ecap.sc, second.ecap.sc) == (True, False)
    assert [unit.cap.mamv for unit in made.units] == [18, 3]
    assert {(unit.cap.max_huge_page_level, unit.cap.psi) for unit in made.units} == {(2, False)}
    assert [device.rid for device in made.devices] == [FIRST_RID, FIRST_RID + 8, FIRST_RID + 16]
    assert [(device.unit, device.group, device.function.pri) for device in made.devices] == [
        (0, 0, True),
        (0, 1, True),
        (1, 0, False),
    ]
    assert [device.fault_capability for device in made.devices] == ["full", "full", "partial"]


def test_a_partial_device_asks_for_data_alone_and_one_that_cannot_fault_has_no_page_requests() -> None:
    made = settings(
        *("--devices", "3", "--device", "1:fault-capability=partial"),
        *("--device", "2:fault-capability=none"),
    )
    found = [(device.function.pri, device.function.control_faults) for device in made.devices]
    assert found == [(True, True), (True, False), (False, False)]


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("--no-scalable-mode", "smts"),
        ("--no-walk-coherency", "smpwc"),
        ("--no-second-stage", "ssts"),
        ("--no-first-stage", "fsts"),
        ("--no-device-tlb", "dt"),
        ("--no-prs", "prs"),
        ("--no-snoop-control", "sc"),
    ],
)
def test_each_option_takes_away_its_bit_and_no_other(option: str, field: str) -> None:
    ((whole,), (less,)) = settings().units, settings(option).units
    assert (getattr(whole.ecap, field), getattr(less.ecap, field)) == (True, False)
    assert (whole.ecap.value ^ less.ecap.value).bit_count() == 1
    assert whole.cap == less.cap


def test_what_a_device_can_be_is_what_the_driver_is_told_of() -> None:
    assert get_args(FunctionInfo.model_fields["fault_capability"].annotation) == FAULT_CAPABILITIES


def test_how_much_of_a_queue_is_executed_at_once_is_said_for_all_or_for_one_unit() -> None:
    made = settings("--units", "2", "--descriptors-at-once", "256", "--unit", "1:descriptors-at-once=1")
    assert [unit.descriptors_at_once for unit in made.units] == [256, 1]
    assert settings().units[0].descriptors_at_once is None


@pytest.mark.parametrize("number", ["0", "257", "-1", "all"])
def test_a_number_of_descriptors_that_is_none_is_refused(number: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        settings(f"--descriptors-at-once={number}")


def test_caching_mode_is_cap_cm() -> None:
    assert settings("--caching-mode").units[0].cap.value ^ settings().units[0].cap.value == 1 << 7


@pytest.mark.parametrize(
    "wrong",
    [["--unit", "1:no-psi"], ["--device", "0:unit=1"], ["--device", "x"], ["--device", "0:nonsense"]],
    ids=str,
)
def test_what_is_not_there_cannot_be_changed(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings(*wrong)
    assert "error" in capsys.readouterr().err


def test_a_device_may_have_few_page_requests_outstanding() -> None:
    made = settings("--devices", "2", "--pri-capacity", "8", "--device", "1:pri-capacity=2")
    assert [device.function.pri_capacity for device in made.devices] == [8, 2]
