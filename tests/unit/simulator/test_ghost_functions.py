"""What the ghost says of functions that come and go, and of the entries that lead units to tables."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from iommufdd.core.counts import UnitCounts
from iommufdd.core.device import IommufdDevice
from iommufdd.core.fault_policy import FaultPolicy
from iommufdd.core.partial import PartialGroups
from protocol.errors import EHWPOISON
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from protocol.units import Iova
from simulator.ghost.functions import Functions, Walked, Walker
from simulator.ghost.ghost import Ghost
from simulator.ghost.groups import ENGINES_AT_IT, Groups
from simulator.ghost.heard import Heard
from simulator.ghost.leading import LeadingEntries
from simulator.ghost.probes.watching import watching
from simulator.ghost.violation import Verdicts
from simulator.planted.plant import Edit, Plant
from simulator.search.replay import Replay
from simulator.stories.library import STORIES
from simulator.world.schedule import Judged
from tests.kit.iommufdd import Surroundings, function
from tests.planted.plugin import Plants

RID = 0x6A10


def said(*steps: Callable[[Functions], None]) -> list[str]:
    verdicts = Verdicts()
    functions = Functions(verdicts, Heard())
    for step in steps:
        step(functions)
    return [violation.invariant for violation in verdicts.found]


def comes(functions: Functions) -> None:
    functions.comes(RID)
    functions.asks(RID, on=True)
    functions.masters(RID, on=True)
    functions.came(RID, on_demand=True)


def goes(functions: Functions) -> None:
    functions.masters(RID, on=False)
    functions.switched_off(RID, waiting=0)
    functions.asks(RID, on=False)
    functions.drained(RID, unread=[])
    functions.left(RID, unanswered=[], cached=0)


def test_a_function_that_comes_is_served_and_goes_is_well() -> None:
    assert said(comes, lambda f: f.served(RID), goes, comes, goes) == []


def test_who_could_ask_before_its_link_broke_can_behind_it() -> None:
    on = [lambda f: f.asks(RID, on=True), lambda f: f.unlinked(), lambda f: f.comes(RID)]
    assert said(*on, lambda f: f.came(RID, on_demand=True)) == []
    off = [lambda f: f.asks(RID, on=True), lambda f: f.forget_all(), lambda f: f.comes(RID)]
    assert said(*off, lambda f: f.came(RID, on_demand=True)) == ["I8"]


def test_a_request_of_a_unit_that_is_gone_may_still_be_served() -> None:
    """It lies with iommufdd, which took it out of the queue; the answer reaches nobody."""
    assert said(comes, lambda f: f.forget_all(), lambda f: f.served(RID)) == []


@pytest.mark.parametrize(
    ("steps", "invariant"),
    [
        ([lambda f: f.masters(RID, on=True), lambda f: f.left(RID, unanswered=[], cached=0)], "R10"),
        ([goes, lambda f: f.comes(RID), lambda f: f.left(RID, unanswered=[3], cached=0)], "R10"),
        ([goes, lambda f: f.comes(RID), lambda f: f.left(RID, unanswered=[], cached=1)], "R10"),
        ([lambda f: f.drained(RID, unread=[0])], "R10"),
        ([lambda f: f.switched_off(RID, waiting=1)], "R10"),
        ([goes, lambda f: f.served(RID)], "R12"),
        ([lambda f: f.drained(RID, unread=[]), lambda f: f.served(RID)], "R12"),
        ([lambda f: f.taken_off(RID)], "R18"),
        ([goes, lambda f: f.taken_off(RID), comes], "R18"),
        ([goes, lambda f: f.comes(RID), lambda f: f.came(RID, on_demand=True)], "I8"),
    ],
)
def test_what_is_left_of_one_is_seen(steps: list[Callable[[Functions], None]], invariant: str) -> None:
    assert said(comes, *steps)[:1] == [invariant]


def test_page_requests_of_another_stay_as_they_were() -> None:
    """They were on before it was attached, and its driver switches them off (B-12)."""
    assert said(lambda f: f.asks(RID, on=True), comes, goes) == ["R10"]
    assert said(lambda f: f.asks(RID, on=True), comes, lambda f: f.failed(RID), goes) == [], "PCIe ended them"


def test_nothing_is_said_of_one_whose_unit_went() -> None:
    assert said(comes, Functions.forget_all, lambda f: f.left(RID, unanswered=[1], cached=1)) == []


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, []),
        ({"levels": [5]}, ["R16"]),
        ({"width": 47}, ["R16"]),
        ({"leaf": 2}, ["R16"]),
        ({"caches_absent": True}, ["R16"]),
        ({"coherent": False}, ["R15"]),
    ],
)
def test_a_table_that_a_unit_cannot_walk_is_not_given_to_it(
    changed: dict[str, Any], wrong: list[str]
) -> None:
    unit = Walker([4, 5], 48, 3, coherent=True, caches_absent=False)._replace(**changed)
    assert said(lambda f: f.walks(RID, unit, Walked(4, 3, in_cpu_caches=True))) == wrong
    own = Walked(4, 3, in_cpu_caches=False)
    assert said(lambda f: f.walks(RID, unit, own)) == [each for each in wrong if each != "R15"]


# -- page request groups ---------------------------------------------------------------------------------


def fails(rid: int, index: int) -> Callable[[Groups], None]:
    """KVM has no memory for a page of it."""
    request = PageRequest(rid, index, Iova(0x7000), last=True, read=True)
    return lambda groups: groups.finds(request, ResponseCode.FAILURE, errno.ENOMEM)


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ([fails(RID, 0)], False),
        ([], True),
        ([fails(RID, 1), fails(RID + 8, 0)], True),  # others
        ([fails(RID, 0), lambda groups: groups.answers(RID, 0, ResponseCode.FAILURE, [])], True),  # the last
    ],
)
def test_a_group_fails_for_what_became_of_it_alone(
    before: list[Callable[[Groups], None]], wrong: bool
) -> None:
    verdicts = Verdicts()
    groups = Groups(verdicts, Heard())
    for step in before:
        step(groups)
    groups.answers(RID, 0, ResponseCode.FAILURE, [7])
    assert [found.invariant for found in verdicts.found] == ["I8"] * wrong


def test_groups_that_were_out_when_their_function_went_are_known() -> None:
    groups = Groups(Verdicts(), Heard())
    for index in range(3):
        groups.sent(RID, index)
    groups.taken(RID, 0)
    groups.answered(RID, 1)
    groups.forgotten(RID)
    assert (groups.late(RID), groups.unread(RID)) == ([0, 2], [2])
    groups.answered(RID, 2)
    groups.answered(RID, 0)
    assert groups.late(RID) == []


def test_a_full_queue_is_not_asked_again_and_again() -> None:
    verdicts = Verdicts()
    groups = Groups(verdicts, Heard())
    for _ in range(3):
        for _ in range(ENGINES_AT_IT):
            groups.dropped(RID, 7)
        groups.dropped(RID, 8)
        groups.accepted()
    assert verdicts.found == []
    for _ in range(ENGINES_AT_IT + 1):
        groups.dropped(RID, 7)
    assert [violation.invariant for violation in verdicts.found] == ["R9"]


@pytest.mark.parametrize(
    ("code", "nowhere", "wrong"),
    [
        (ResponseCode.SUCCESS, [], False),
        (ResponseCode.SUCCESS, [7], True),
        (ResponseCode.INVALID, [7], False),
        (ResponseCode.FAILURE, [7], True),
        (ResponseCode.FAILURE, [], False),  # not for a page of it
    ],
)
def test_an_answer_says_what_became_of_the_pages(code: ResponseCode, nowhere: list[int], wrong: bool) -> None:
    verdicts = Verdicts()
    Groups(verdicts, Heard()).answers(RID, 0, code, nowhere)
    assert [violation.invariant for violation in verdicts.found] == ["I8"] * wrong


@pytest.mark.parametrize(
    ("code", "refused", "wrong"),
    [
        (ResponseCode.SUCCESS, 0, False),
        (ResponseCode.SUCCESS, errno.ENOMEM, True),
        (ResponseCode.INVALID, errno.EFAULT, False),
        (ResponseCode.INVALID, None, True),  # B-31: no canonical address, and KVM has a page there
        (ResponseCode.FAILURE, errno.ENOMEM, False),
        (ResponseCode.FAILURE, EHWPOISON, True),  # B-37
        (ResponseCode.FAILURE, None, True),
    ],
)
def test_a_function_is_told_what_was_found_of_its_page(
    code: ResponseCode, refused: int | None, wrong: bool
) -> None:
    verdicts = Verdicts()
    request = PageRequest(RID, 0, Iova(0x7000), last=True, read=True)
    Groups(verdicts, Heard()).finds(request, code, refused)
    assert [violation.invariant for violation in verdicts.found] == ["I8"] * wrong


@pytest.mark.parametrize(("refused", "wrong"), [(errno.ENOMEM, []), (errno.EFAULT, ["I8"]), (0, ["I8"])])
def test_a_group_may_fail_where_a_table_of_the_drivers_own_has_no_memory(
    refused: int, wrong: list[str]
) -> None:
    verdicts = Verdicts()
    groups = Groups(verdicts, Heard())
    code = ResponseCode.INVALID if refused == errno.EFAULT else ResponseCode.FAILURE
    groups.finds(PageRequest(RID, 0, Iova(0x7000), last=True, read=True), code, refused)
    groups.answers(RID, 0, ResponseCode.FAILURE, [7])
    assert [violation.invariant for violation in verdicts.found] == wrong


# -- entries ---------------------------------------------------------------------------------------------

ENTRY = "PASID", RID


@pytest.mark.parametrize(
    ("stores", "wrong"),
    [
        ("1=2 0=5", False),  # the other words first, P last
        ("0=5 1=2", True),
        ("1=2 0=5 0=4 forget 1=0 0=0", False),
        ("1=2 0=5 1=0", True),
        ("1=2 0=5 0=1", True),  # word 0 has more than P
        ("1=2 0=5 cache 0=4 1=0", True),
        ("1=2 0=5 cache 0=4 forget 1=0 0=0", False),
        ("1=2 0=5 cache 0=4 forget 1=0 0=0 1=2 0=5", False),
    ],
)
def test_an_entry_that_a_unit_may_have_is_not_changed(stores: str, wrong: bool) -> None:
    verdicts = Verdicts()
    entries = LeadingEntries(verdicts, Heard())
    for step in stores.split():
        if "=" in step:
            word, value = map(int, step.split("="))
            entries.stored(ENTRY, word, value)
        else:
            entries.cached("unit", [ENTRY] if step == "cache" else [])
    assert [violation.invariant for violation in verdicts.found][:1] == ["I29"] * wrong


# -- the product as it would be wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("stays", [False, True])
def test_half_a_group_that_outlives_its_attachment_is_seen(stays: bool, plant: Plants) -> None:
    if stays:
        plant("R10-partial-groups-stay")
    ghost = Ghost(Verdicts())
    with watching(ghost):
        world, partial = Surroundings(), PartialGroups(UnitCounts())
        device = IommufdDevice(function(), world, world, FaultPolicy(), partial)
        hwpt = world.hwpt()
        world.run(device.enter(hwpt, pinned=True))
        partial.gather(PageRequest(device.rid, 0, Iova(0x7000), last=False, read=True), hwpt)
        world.run(device.leave())
    assert [violation.invariant for violation in ghost.verdicts.found] == ["I24"] * stays


@pytest.mark.parametrize("stays", [False, True])
def test_a_function_that_stays_where_it_was_is_not_where_it_is_attached(stays: bool) -> None:
    went = "await device.enter(hwpt, pinned=pinned)"
    edit = Edit("iommufdd.core.group:IommufdGroup._replace", went, went.replace("hwpt", "old"))
    with Plant("stays", "", "R10", [edit]).apply() if stays else nullcontext():
        end = Judged(STORIES.__getitem__, "replace", "mirror")()(Replay(()))
    assert end.invariant == ("R10" if stays else ""), end
