"""The ghost's books on page request groups, on stores that are to be told, and on what must end."""

from __future__ import annotations

import pytest

from protocol.pt.bits import READ, WRITE
from simulator.ghost.backing import Shown
from simulator.ghost.ghost import Ghost
from simulator.ghost.groups import Groups
from simulator.ghost.heard import Heard
from simulator.ghost.held import Held
from simulator.ghost.ledger import Ledger
from simulator.ghost.lent import Lent
from simulator.ghost.liveness import CASE_OF, Liveness
from simulator.ghost.spans import Translation
from simulator.ghost.stores import Stores
from simulator.ghost.violation import Verdicts

RID = 0x6A08


def invariants(verdicts: Verdicts) -> list[str]:
    return [violation.invariant for violation in verdicts.found]


def test_each_group_is_answered_once() -> None:
    verdicts = Verdicts()
    groups = Groups(verdicts, Heard())
    groups.sent(RID, 0)
    groups.sent(RID + 8, 0)
    groups.answered(RID, 0)
    groups.sent(RID, 0)
    assert groups.outstanding == [(RID + 8, 0), (RID, 0)]
    groups.forgotten(RID)
    groups.answered(RID + 8, 0)
    groups.answered(RID, 0)  # on its way when page requests went off
    assert invariants(verdicts) == []
    groups.answered(RID, 0)
    assert invariants(verdicts) == ["I8"]


def test_an_index_in_use_is_not_used_again() -> None:
    verdicts = Verdicts()
    groups = Groups(verdicts, Heard())
    groups.sent(RID, 4)
    groups.sent(RID, 4)
    assert invariants(verdicts) == ["I8"]


@pytest.mark.parametrize(
    ("steps", "lost"),
    [
        ("store mark begin end settle", False),
        ("store begin end settle", False),  # it tells of every page it has
        ("store other settle", True),
        ("store other mark settle", True),  # that report passed it by
        ("store mark other settle", False),
        ("begin store end settle", False),  # user space copies the page after the report
        ("begin end store settle", True),
        ("begin end store mark settle", False),
        ("begin_other store end mark settle", False),  # marked a little later, before a report began
        ("begin_other store end settle", True),
        ("store mark other unmark settle", True),  # the report did not have it
        ("store mark other unmark other settle", True),
        ("store move settle", True),
        ("store mark move settle", False),
        ("store move move mark settle", False),
        ("off store settle", False),
        ("store off settle", False),
    ],
)
def test_a_store_is_told_or_lost(steps: str, lost: bool) -> None:
    verdicts, reports = Verdicts(), []
    stores = Stores(verdicts)
    stores.log("vm", 0, 8, True)
    for epoch, step in enumerate(steps.split()):
        match step:
            case "store":
                stores.stored(epoch, "vm", 5)
            case "mark" | "unmark":
                stores.marked("vm", 5, on=step == "mark")
            case "begin" | "begin_other":
                reports.append(stores.begin(epoch, "vm", [5] if step == "begin" else [6]))
            case "end":
                stores.end(reports.pop())
            case "other":
                stores.end(stores.begin(epoch, "vm", [6]))
            case "move":
                stores.move("vm", 0, 8, 16)
                assert stores.untold("vm") == [16 + 5]
                stores.move("vm", 16, 24, 0)
            case "off":
                stores.log("vm", 0, 8, False)
            case "settle":
                stores.settled(epoch)
    assert invariants(verdicts) == (["I25"] if lost else [])


def test_what_is_outstanding_ends_within_the_bound() -> None:
    verdicts = Verdicts()
    liveness = Liveness(verdicts, bound=100)
    liveness.begins(0, "fault", 1)
    liveness.look(100)
    liveness.ends(100, "fault", 1)
    liveness.look(1000)
    assert invariants(verdicts) == []
    liveness.begins(1000, "invalidation", "a")
    liveness.look(1101)
    assert invariants(verdicts) == ["R18"]


@pytest.mark.parametrize(("kind", "invariant"), CASE_OF.items())
def test_what_ends_late_is_late(kind: str, invariant: str) -> None:
    verdicts = Verdicts()
    liveness = Liveness(verdicts, bound=100)
    for began, ended, wrong in ((0, 100, []), (1000, 1101, [invariant])):
        liveness.begins(began, kind, 1)
        liveness.ends(ended, kind, 1)
        assert invariants(verdicts) == wrong


@pytest.mark.parametrize(("kind", "invariant"), CASE_OF.items())
def test_where_nothing_can_run_any_more_what_is_out_never_ends(kind: str, invariant: str) -> None:
    verdicts = Verdicts()
    liveness = Liveness(verdicts, bound=100)
    liveness.stuck()
    assert invariants(verdicts) == []
    liveness.begins(0, kind, 1)
    liveness.stuck()
    assert invariants(verdicts) == [invariant]


@pytest.mark.parametrize(
    ("counted", "charged", "wrong"),
    [(2, 513, 0), (1, 513, 1), (3, 513, 1), (2, 512, 1), (2, 514, 1), (3, 514, 2)],
)
def test_as_many_pins_are_counted_and_charged_for_as_somebody_has(
    counted: int, charged: int, wrong: int
) -> None:
    verdicts = Verdicts()
    held = Held(verdicts)
    for npages in (512, 1, 1):
        held.pins("page", "user", npages)
    held.unpins("page", "user", 1)
    held.counts_pins("page", 5, counted)
    held.counts_paid("user", "the user", charged)
    assert invariants(verdicts) == ["I6"] * wrong


def test_who_pays_instead_is_charged_instead() -> None:
    verdicts = Verdicts()
    held = Held(verdicts)
    held.pins("page", "old", 512)
    held.pays("old", "new", 512)
    held.counts_paid("old", "the process", 0)
    held.counts_paid("new", "the process", 512)
    assert verdicts.found == []
    held.counts_paid("new", "the process", 0)
    assert invariants(verdicts) == ["I6"]


@pytest.mark.parametrize("left", [False, True])
def test_who_has_nothing_has_nothing_pinned(left: bool) -> None:
    ghost = Ghost(Verdicts())
    ghost.held.pins("page", "user", 1)
    if not left:
        ghost.held.unpins("page", "user", 1)
    ghost.settled()
    assert invariants(ghost.verdicts) == ["I6"] * left


def test_the_ledger_knows_who_had_a_page_last_and_until_when() -> None:
    ledger = Ledger()
    assert ledger.take(1, 0x100, 4, "a") == []
    assert ledger.take(2, 0x102, 4, "b") == ["a"]
    assert ledger.give_up(3, 0x100, 2)
    assert not ledger.give_up(4, 0x100, 2)
    owner, last = ledger.owner(0x103), ledger.given_up(0x101)
    assert owner is not None
    assert last is not None
    assert (owner.name, owner.since, last.name, last.since) == ("b", 2, "a", 3)
    assert ledger.owner(0x100) is ledger.given_up(0x103) is None
    ledger.take(5, 0x101, 1, "c")
    assert ledger.given_up(0x101) is None


def test_what_a_process_had_goes_with_it() -> None:
    ghost = Ghost(Verdicts())
    ghost.root_made(0x1000, 1, None, "kvm")
    ghost.entry_stored(0x1000, 5 << 12 | 7)
    ghost.frames_taken(5, 1, "mm")
    for holder in (("devtlb", "a", "r"), ("vcpu", "0")):
        ghost.cached(holder, 0x1000, 0, 1, Translation(5, 1))
    ghost.groups.sent(RID, 0)
    ghost.liveness.begins(0, "page request group", (RID, 0))
    ghost.liveness.begins(0, "fault", 1)
    ghost.process_gone("device_sim")
    assert [cached.holder for cached in ghost.caches.translations()] == [("vcpu", "0")]
    assert ghost.groups.outstanding == []
    ghost.process_gone("iommufdd")
    ghost.process_gone("kvmd")
    assert [cached.holder for cached in ghost.caches.translations()] == []
    ghost.frames_taken(5, 1, "mm of the next")
    ghost.settled()
    assert ghost.verdicts.found == []


@pytest.mark.parametrize("dead", ["", "device_sim"])
def test_what_only_units_walk_nobody_walks_when_they_are_gone(dead: str) -> None:
    """Their driver finds that out later, and takes it down."""
    ghost, view = Ghost(Verdicts()), ("ioas", 1)
    ghost.table_taken(0x1000, "iommufdd")
    ghost.root_made(0x1000, 1, view, "iommufdd")
    ghost.shows(view, 0, 1, Shown("mm1", 0, READ | WRITE))
    ghost.backs("mm1", 0, 1, Translation(5, READ | WRITE))
    ghost.entry_stored(0x1000, 5 << 12 | 3)
    if dead:
        ghost.process_gone(dead)
    ghost.frames_taken(5, 1, "mm1")
    ghost.backs("mm1", 0, 1, None)
    ghost.frames_given_up(5, 1)
    assert [violation.invariant for violation in ghost.verdicts.found] == ([] if dead else ["I11", "I6"])


def test_what_is_outstanding_when_nothing_is_under_way_is_found() -> None:
    ghost = Ghost(Verdicts())
    ghost.liveness.begins(0, "invalidation", 1)
    ghost.settled()
    assert invariants(ghost.verdicts) == ["R18"]


DEVTLB = ("devtlb", "a", "r")


def dead_kvm_s(ghost: Ghost) -> int:
    """A root that a device has some of; its name now."""
    ghost.table_taken(0x1000, "kvmd")
    ghost.root_made(0x1000, 1, None, "kvm")
    ghost.entry_stored(0x1000, 5 << 12 | 7)
    ghost.cached(DEVTLB, 0x1000, 0, 1, Translation(5, 1))
    return ghost.process_gone("kvmd")[0x1000]


def test_a_dead_kvm_s_table_is_walked_until_iommufdd_is_told() -> None:
    ghost = Ghost(Verdicts())
    root = dead_kvm_s(ghost)
    ghost.device_used(DEVTLB, 0, 5, write=True)
    ghost.cached(DEVTLB, root, 1, 2, Translation(9, 1))
    ghost.pointer_cached(("psc", "u"), root, 0, 512, 0x1000)
    ghost.keeps(DEVTLB, [])
    ghost.keeps_pointers(("psc", "u"), [])
    ghost.closed(root)
    assert ghost.verdicts.found == []
    ghost.cached(DEVTLB, root, 1, 2, Translation(9, 1))
    ghost.device_used(DEVTLB, 1, 9, write=False)
    assert [violation.invariant for violation in ghost.verdicts.found] == ["R28", "R28"]


def test_what_is_cached_of_a_dead_kvm_s_table_goes_before_it_is_closed() -> None:
    ghost = Ghost(Verdicts())
    ghost.closed(dead_kvm_s(ghost))
    assert invariants(ghost.verdicts) == ["R28"]


def test_the_next_kvm_s_root_may_lie_where_the_dead_one_s_did() -> None:
    """Its frames and tables are its own: what is cached of the dead one's does not count."""
    ghost = Ghost(Verdicts())
    ghost.frames_taken(5, 1, "mm1")
    dead_kvm_s(ghost)
    ghost.frames_taken(5, 1, "mm1")
    ghost.table_taken(0x1000, "kvmd")
    ghost.root_made(0x1000, 1, None, "kvm")
    ghost.frames_given_up(5, 1)
    ghost.root_gone(0x1000)
    ghost.table_given_up(0x1000)
    assert ghost.verdicts.found == []


@pytest.mark.parametrize(("right", "wrong"), [(READ | WRITE, []), (READ, ["R14"])])
def test_a_device_reaches_nothing_that_it_was_not_granted(right: int, wrong: list[str]) -> None:
    """A device TLB has what is read and what is stored to apart."""
    ghost = Ghost(Verdicts())
    ghost.root_made(0x1000, 1, None, "hwpt")
    ghost.entry_stored(0x1000, 5 << 12 | right)
    for way, which in ((READ, "r"), (WRITE, "w")):
        if right & way:
            ghost.cached(("devtlb", "a", which), 0x1000, 0, 1, Translation(5, way))
    ghost.device_used(("devtlb", "a", "r"), 0, 5, write=False)
    assert ghost.verdicts.found == []
    ghost.device_used(("devtlb", "a", "w"), 0, 5, write=True)
    assert invariants(ghost.verdicts) == wrong


def test_nothing_is_left_of_what_a_dead_driver_lent() -> None:
    ghost = Ghost(Verdicts())
    ghost.table_taken(0x1000, "iommufdd")
    ghost.root_made(0x1000, 1, None, "hwpt")
    ghost.entry_stored(0x1000, 5 << 12 | 7)
    ghost.cached(DEVTLB, 0x1000, 0, 1, Translation(5, 1))
    ghost.process_gone("iommufdd")
    ghost.device_used(DEVTLB, 0, 5, write=True)
    assert ghost.verdicts.found == []
    ghost.unplugged()
    assert invariants(ghost.verdicts) == ["R28"]


IMPORTER = ("imported", "a")


def test_an_importer_is_one_of_what_is_lent_and_hears_until_it_unregisters() -> None:
    verdicts = Verdicts()
    lent = Lent(verdicts)
    lent.lends("vm", 4)
    lent.describes("vm")
    lent.registers((IMPORTER, "vm"), now=3)
    lent.tells((IMPORTER, "vm"), now=5)
    lent.unregisters((IMPORTER, "vm"))
    assert invariants(verdicts) == []
    lent.tells((IMPORTER, "vm"), now=6)
    assert invariants(verdicts) == ["I15"]


def test_a_driver_that_leaves_one_vm_is_an_importer_of_the_other() -> None:
    verdicts = Verdicts()
    lent = Lent(verdicts)
    for vm in ("vm", "other"):
        lent.lends(vm, 4)
        lent.registers((IMPORTER, vm), now=3)
    lent.unregisters((IMPORTER, "other"))
    lent.tells((IMPORTER, "vm"), now=5)
    assert invariants(verdicts) == []


def test_nobody_imports_what_was_taken_back() -> None:
    verdicts = Verdicts()
    lent = Lent(verdicts)
    lent.lends("vm", 4)
    lent.takes_back("vm")
    lent.describes("vm")
    lent.registers((IMPORTER, "vm"), now=3)
    assert invariants(verdicts) == ["I10", "I15"]


def test_what_an_importer_still_has_behind_a_flush_says_who_was_wrong() -> None:
    lent = Lent(Verdicts())
    lent.lends("vm", 4)
    lent.registers((IMPORTER, "vm"), now=3)
    lent.tells((IMPORTER, "vm"), now=5)
    assert lent.rule(IMPORTER, "vm", issued=5) == "R17", "it was told, and not waited for"
    assert lent.rule(IMPORTER, "vm", issued=6) == "I15", "it was not told"
    lent.takes_back("vm")
    assert lent.rule(IMPORTER, "vm", issued=5) == "I13", "nobody tells it any more"


def test_a_root_of_the_next_kvmd_is_not_obsolete_by_where_it_lies() -> None:
    ghost, root = Ghost(Verdicts()), 0x1000
    for _ in range(2):
        ghost.table_taken(root, "kvmd")
        ghost.root_made(root, 2, "vm", "kvm")
        assert not ghost.history.is_obsolete(root)
        ghost.root_obsolete(root)
        ghost.process_gone("kvmd")
