"""The small stories hold on every design, and each of these mistakes breaks one of them."""

from __future__ import annotations

from collections import Counter

import pytest

from qemu_shim.vmm.process import Process
from simulator.command import find
from simulator.planted.belongs import invariants_of
from simulator.planted.registry import PLANTED
from simulator.search.explore import Tally, explore
from simulator.search.strategies import DEFAULT, STRATEGIES
from simulator.stories.at_once import AT_ONCE
from simulator.stories.library import STORIES
from simulator.stories.written import WRITTEN_FOR
from simulator.world.schedule import Judged

FEW, OFTEN, ENOUGH, ROUNDS = 2, 20, 40, 20


def played(story: str, design: str, schedules: int, plant: str = "", strategy: str = "random") -> Tally:
    """Until the first that fails."""
    player = Judged(find, story, design, plant=plant)(ROUNDS)
    return explore(player, STRATEGIES[strategy].make(1), 1, schedules, lambda tally: bool(tally.found))


PAIRS = [(story.name, design) for story in STORIES.values() for design in story.playable]


@pytest.mark.parametrize(("story", "design"), PAIRS)
def test_a_story_holds_in_whatever_order(story: str, design: str) -> None:
    tally = played(story, design, FEW)
    assert tally.found == []
    assert (tally.schedules, bool(tally.traces)) == (FEW, True)


# The page is absent until a device's fault is answered, which has farther to go: in one of fifty schedules.
SELDOM = {("across", "migrate"), ("full", "migrate")}
PINNED = "pinned"  # whose pages stay where they are
ALL_PINNED = {("pin-all", "migrate")}  # it would be done if what comes were not


def test_what_a_story_has_the_host_do_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """An action that finds no page is beside nothing, and holds whatever is wrong."""
    pages = Counter[tuple[str, str]]()
    asked = Process.host_action

    async def host_action(self: Process, action: str, addr: int, size: int) -> int:
        done = await asked(self, action, addr, size)
        pages[name, action] += done
        return done

    monkeypatch.setattr(Process, "host_action", host_action)
    for story in STORIES.values():
        name, may_move = story.name, [design for design in story.playable if design != PINNED]
        for design in may_move[:1]:
            assert played(name, design, OFTEN, strategy=DEFAULT).found == []
    assert {what for what, done in pages.items() if not done} <= SELDOM | ALL_PINNED
    assert ("merge", "merge") in pages


# Of each story one mistake that it breaks on, on a design where it does.
BREAKS = {
    "discard": ("shared", "R7-no-device-tlb"),
    "migrate": ("shared", "I9-not-waited-for"),
    "swap": ("shared", "R17-nobody-is-told"),
    "hint": ("shared", "R4-acks-not-awaited"),
    "age": ("shared", "R17-nobody-is-told"),
    "discards": ("shared", "R4-notifiers-not-awaited"),
    "both": ("shared", "R17-nobody-is-told"),
    "fault": ("shared", "R7-no-device-tlb"),
    "two-changes": ("shared", "B-18-drain-is-skipped"),
    "poison": ("shared", "R4-acks-not-awaited"),
    "fork": ("shared", "R22-fork-leaves-writable"),
    "merge": ("shared", "merged-and-writable"),
    "protect": ("shared", "R4-acks-not-awaited"),
    "huge": ("mirror", "R23-table-free-at-once"),
    "asleep": ("mirror", "R1-not-asked-again"),
    "slot": ("shared", "R17-nobody-is-told"),
    "slot-again": ("shared", "equal-slot"),
    "slot-moves": ("shared", "R17-nobody-is-told"),
    "slot-shifts": ("shared", "ghosts-of-a-moved-slot"),
    "slot-asleep": ("shared", "R21-slot-not-found-again"),
    "slot-emulated": ("shared", "emulated-access-keeps-its-slot"),
    "slot-first": ("shared", "B-25-slots-lock-over-faults"),
    "slot-else": ("shared", "R17-nobody-is-told"),
    "batches": ("shared", "B-33-turn-before-flush"),
    "slot-short": ("managed", "root-put-and-kept"),
    "slot-comes": ("shared", "B-22-mmio-entry-with-rights"),
    "log": ("shared", "R19-cleared-and-not-flushed"),
    "ring": ("shared", "R19-rings-reset-unflushed"),
    "ring-shrinks": ("shared", "R19-one-stale-entry-drops-all"),
    "ring-full": ("shared", "R19-full-ring-drops"),
    "log-short": ("shared", "R19-fast-fault-on-a-huge-leaf"),
    "log-huge": ("shared", "R14-split-links-first"),
    "track": ("shared", "emulated-store-not-marked"),
    "pin": ("mirror", "unpinned-and-mapped"),
    "pin-drop": ("mirror", "unpinned-and-mapped"),
    "pin-fork": ("mirror", "R4-mirror-not-awaited"),
    "pin-swap": ("shared", "R17-nobody-is-told"),
    "pin-asleep": ("shared", "R4-notifiers-not-awaited"),
    "pin-slot": ("shared", "R4-acks-not-awaited"),
    "pin-all": ("shared", "I22-everything-but-what-comes"),
    "hwpt-by-half": ("pinned", "I26-filled-by-half-and-kept"),
    "two-devices": ("shared", "R8-one-function-is-told"),
    "two-units": ("shared", "R8-one-unit-is-told"),
    "late": ("shared", "R18-late-and-done"),
    "detach": ("shared", "R17-nobody-is-told"),
    "replace": ("mirror", "R8-one-mirror-is-told"),
    "units": ("managed", "R15-not-coherent"),
    "units-narrow": ("shared", "B-17-index-for-a-width"),
    "refetch": ("shared", "R7-no-device-tlb"),
    "across": ("shared", "B-37-always-failure"),
    "full": ("shared", "R9-overflow-stays"),
    "full-move": ("shared", "R9-overflow-stays"),
    "detach-asleep": ("mirror", "R10-groups-not-waited-for"),
    "detach-few": ("mirror", "R12-late-request-is-served"),
    "detach-asks": ("shared", "B-12-iopf-of-another-is-taken"),
    "never": ("shared", "R18-time-out-is-an-ack"),
    "convert": ("shared", "R24-converted-without-a-zap"),
    "convert-asleep": ("shared", "R24-converted-without-a-zap"),
    "hole": ("shared", "R24-hole-without-a-zap"),
    "unasked": ("mirror", "R24-claim-not-asked"),
    "lend": ("shared", "B-18-zapped-at-release"),
    "lend-dies": ("shared", "R26-leaves-before-its-lease"),
    "lend-hung": ("shared", "B-18-zapped-at-release"),
    "lend-short": ("shared", "B-18-zapped-at-release"),
    "hang-up": ("shared", "R4-acks-not-awaited"),
    "hang-up-on-one": ("mirror", "R28-hung-up-on-and-walking"),
    "two-move": ("shared", "I9-not-waited-for"),
    "moves": ("shared", "I9-not-waited-for"),
    "move-hung": ("shared", "R28-kvm-waits-for-the-lease"),
    "driver-dies": ("shared", "R28-death-is-an-ack"),
    "high": ("mirror", "B-31-canonical-for-a-cpu"),
    "pin-twice": ("mirror", "pinned-over-a-pin"),
    "pin-moves": ("shared", "pin-stands-on-what-was"),
    "shown-twice": ("pinned", "pages-unpinned-under-another-area"),
    "beyond": ("pinned", "R11-answered-for-each-request"),
    "beyond-full": ("notifier", "R9-overflow-stays"),
    "few": ("shared", "R11-index-used-again"),
    "detach-full": ("shared", "R9-overflow-stays"),
    "never-comes": ("mirror", "R18-off-but-a-master"),
    "never-comes-late": ("mirror", "R18-off-but-a-master"),
    "or-back": ("mirror", "R10-nothing-to-go-back-to"),
    "kvm-dies": ("mirror", "R28-kvm-is-gone"),
    "kvm-dies-idle": ("shared", "domain-id-free-while-memory-is-taken-back"),
    "vast": ("mirror", "B-30-pages-of-32-bits"),
    "hwpts": ("shared", "domain-id-free-too-early"),
    "iommufd-closes": ("shared", "R13-closed-meanwhile"),
    "export": ("shared", "B-28-vcpu-of-another-width"),
    "importers": ("shared", "B-09-one-importer-is-told"),
    "importers-fork": ("shared", "B-38-another-process"),
    "importers-slow": ("shared", "B-26-faults-wait-for-acks"),
    "importers-huge": ("shared", "R5-youngest-ack-counts"),
    "importers-end": ("managed", "R28-one-look-at-leases"),
    "vm-comes": ("shared", "R26-registers-in-a-change"),
    "hole-bound": ("shared", "R24-hole-without-its-lock"),
    "pin-dies": ("mirror", "pin-outlives-its-mirror"),
    "by-offset": ("shared", "R24-file-pins-not-asked"),
    "pin-read": ("mirror", "R22-pin-of-what-is-shared"),
    "heir": ("shared", "I6-taken-over-in-part"),
    "remap": ("shared", "I11-told-of-where-a-page-goes"),
    "write-protect": ("mirror", "I21-write-protected-untold"),
    "free": ("shared", "I11-freed-untold"),
    "truncate": ("mirror", "I11-truncated-but-for-one"),
    "owners": ("pinned", "memory-of-whichever-process"),
    "read-only": ("mirror", "writable-whatever-was-asked"),
    "copied": ("pinned", "copied-from-the-start-of-the-area"),
    "by-file": ("mirror", "I11-swapped-out-is-a-hole"),
    "zeroes": ("mirror", "I21-zeroes-are-writable"),
    "gmem-mapped": ("shared", "I11-hole-stays-mapped"),
    "payers": ("managed", "I6-process-without-a-limit"),
    "medley": ("shared", "R4-acks-not-awaited"),
}


def test_each_story_is_known_to_break() -> None:
    variants = {story.name for story in AT_ONCE}  # of one, which stands for them
    assert set(BREAKS) | variants == set(STORIES)


def test_of_each_story_it_is_said_what_it_was_written_for() -> None:
    assert set(WRITTEN_FOR) == set(STORIES), "simulator/stories/written.py has a line for each story"
    cases = {case for plant in PLANTED.values() for case in (plant.id, plant.invariant, *plant.races)}
    assert {case for of_story in WRITTEN_FOR.values() for case in of_story} <= cases


@pytest.mark.parametrize("story", BREAKS)
def test_a_mistake_breaks_a_story(story: str) -> None:
    design, plant = BREAKS[story]
    (found,) = played(story, design, ENOUGH, plant).found
    assert found.result.invariant in invariants_of(PLANTED[plant]), found.result


# What the judge of one step sees, and nobody before it.
SEEN = {
    "B-10-unregistered-while-walked": ("lend", "shared", "I13"),
    "B-37-always-failure": ("poison", "shared", "I8"),
    "B-31-canonical-for-a-cpu": ("high", "mirror", "I8"),
    "R20-rights-of-what-was": ("log", "shared", "R20"),
    "R14-device-tlb-writes-what-it-may-read": ("protect", "shared", "R14"),
    "absent-is-cached": ("discard", "shared", "R20"),
    "B-30-pages-of-32-bits": ("vast", "mirror", "R17"),
    "R10-nothing-to-go-back-to": ("or-back", "mirror", "R10"),
    "R10-attached-though-unbound": ("iommufd-closes", "mirror", "R10"),
    "domain-id-free-too-early": ("hwpts", "shared", "R10"),
    "R13-closed-meanwhile": ("iommufd-closes", "shared", "R13"),
    "R13-tdp-is-put-twice": ("iommufd-closes", "shared", "R13"),
    "R13-did-is-left": ("hwpts", "shared", "R13"),  # when nobody has anything any more
    "R11-credits-are-lost": ("few", "shared", "I8"),
    "R28-not-walkable-any-more": ("kvm-dies", "shared", "R28"),
    "R28-kvm-went-meanwhile": ("kvm-dies", "shared", "R28"),
    "R28-driver-gone-and-walking": ("driver-dies", "shared", "R28"),
    "pinned-over-a-pin": ("pin-twice", "mirror", "I28"),
    "R7-device-tlb-keeps-everything": ("migrate", "shared", "I9"),
    "R21-slot-not-found-again": ("slot-asleep", "shared", "R21"),
    "R19-split-loses-dirty": ("log-huge", "shared", "R19"),
    "other-root-not-filled": ("both", "managed", "I23"),
    "R21-all-slots-lose-their-leaves": ("slot-else", "managed", "I23"),
    "R6-paging-structure-cache-stays": ("huge", "mirror", "R6"),
    "R4-units-are-not-asked": ("discard", "shared", "I9"),
    "importers-are-not-told": ("discard", "shared", "R17"),
    "cpus-are-not-flushed": ("discard", "shared", "R17"),
    "R17-zap-unflushed": ("discard", "shared", "I6"),
    "R4-flush-of-another-not-awaited": ("two-changes", "mirror", "I6"),
    "I14-file-is-never-closed": ("by-offset", "shared", "I14"),
    "I14-process-is-kept": ("heir", "managed", "I14"),  # when all has ended
    "fds-of-a-unit-stay": ("discard", "shared", "I14"),
    "I6-two-pay": ("heir", "managed", "I6"),
    "I6-pins-never-put": ("pin-slot", "managed", "I6"),
    "I6-unpinned-and-counted": ("pin", "mirror", "I6"),
    "I6-unpinned-and-charged": ("by-offset", "shared", "I6"),
    "I11-unmapped-and-told-then": ("remap", "mirror", "I11"),
    "unpinned-before-its-entry-goes": ("pin-drop", "shared", "I6"),
    "unpinned-before-the-flush": ("pin-drop", "mirror", "I6"),
    "R1-range-not-looked-at": ("three-discard", "shared", "I5"),
    "R16-bit-11": ("discard", "shared", "I2"),
    "R19-devices-mark-nothing": ("log", "shared", "I25"),
    "pins-put-before-the-flush": ("pin-slot", "managed", "I11"),
    "R5-epoch-too-early": ("importers-huge", "shared", "I7"),
    "R5-mapping-over-unflushed": ("importers-huge", "shared", "R6"),
    "R4-only-the-first-ack": ("importers", "shared", "R17"),
    "R28-death-is-an-ack": ("importers-end", "managed", "I13"),
    "R26-unregistered-first": ("importers-end", "shared", "I15"),
    "R26-registers-while-taken-back": ("importers-end", "shared", "I15"),
    "B-36-answers-after-release": ("importers-end", "shared", "I10"),
    "R24-offsets-are-addresses": ("by-offset", "managed", "I27"),
    "R26-ageing-asks-who-went": ("vm-comes", "shared", "R26"),
    "R28-released-under-a-lease": ("importers-end", "shared", "I13"),
    "R3-obsolete-root-is-found": ("slot-else", "managed", "R3"),
    "collapse-thaws-unflushed": ("log-huge", "managed", "I7"),
    "memory-of-whichever-process": ("owners", "pinned", "I5"),
    "one-process-is-not-asked": ("owners", "mirror", "I5"),
    "copied-from-the-start-of-the-area": ("copied", "pinned", "I5"),
    "copied-with-more-rights": ("copied", "pinned", "I21"),
    "writable-whatever-was-asked": ("read-only", "mirror", "I21"),
    "flag-of-rights-is-ignored": ("read-only", "pinned", "I21"),
    "read-only-slot-is-writable": ("read-only", "managed", "I21"),
    "R21-a-file-s-area-goes-unflushed": ("by-offset", "pinned", "R21"),
    "R21-shown-elsewhere-and-unflushed": ("shown-twice", "pinned", "R21"),
}
# The same, by turns of strategies: no even coin comes to these soon.
SEEN_BY_TURNS = {
    "R5-no-quarantine": ("log-huge", "shared", "I7"),
    "R7-device-tlb-first": ("refetch", "notifier", "I9"),
    "R24-mapped-while-converted": ("unasked", "pinned", "I27"),
    "R1-mirror-unsettled-behind-a-fault": ("asleep", "mirror", "I5"),
}


@pytest.mark.parametrize(
    ("plant", "strategy"),
    [*((plant, "random") for plant in SEEN), *((plant, DEFAULT) for plant in SEEN_BY_TURNS)],
)
def test_a_mistake_is_seen_where_it_is_made(plant: str, strategy: str) -> None:
    story, design, invariant = (SEEN | SEEN_BY_TURNS)[plant]
    (found,) = played(story, design, ENOUGH, plant, strategy).found
    assert found.result.invariant == invariant, found.result


@pytest.mark.parametrize("story", ["lend", "export"])
def test_a_story_of_vms_that_end_comes_to_its_end(story: str) -> None:
    """Counts go with a VM, and who waited for them waited for ever."""
    for design in STORIES[story].playable:
        end = Judged(find, story, design)(1)(STRATEGIES["random"].make(5))
        assert end.over
        assert not end.invariant, end
