"""Two steps that the ghost's effects call independent: he judges them alike, whichever comes first."""

from __future__ import annotations

import random
from collections.abc import Set
from copy import deepcopy

import pytest

from protocol.hw.qi import ResponseCode
from simulator.ghost import heard
from simulator.ghost.heard import Effect
from tests.unit.simulator.test_ghost import DEVTLB, PAGE, ROOT, Story

RID = 0x6A10
ENTRY = "PASID", RID

BY_DEVICE = (
    *("cache", "cache_reader", "cache_iotlb", "drop", "drop_iotlb", "point", "forget_pointer", "walk", "use"),
    *("device_stored", "masters", "masters_no_more", "asks", "asks_no_more"),
    *("read_entry", "forget_entry", "sends", "hears_answer"),
)
BY_IOMMUFDD = (
    *("issue", "complete", "acked", "reuse_of_iommufdd", "comes", "came", "drained", "served", "leaves"),
    *("store_entry", "store_other_word", "takes_request", "looks_for_page"),
)
BY_HOST = (
    *("take", "give_b", "give_back", "protect", "free", "take_from_another", "load", "store"),
    *("map", "map_b", "map_read_only", "zap", "flushed", "let_go", "told", "delete_slot", "pin", "unpin"),
    *("cache_cpu", "drop_cpu", "collapse", "reuse", "link", "obsolete", "drop_root", "issue", "complete"),
    *("log", "report", "reported"),
)
WHO = (BY_DEVICE, BY_IOMMUFDD, BY_HOST)
RUNS = 400
BEFORE, BEHIND = 6, 5  # steps

Verdict = set[tuple[str, str]]


class Steps(Story):
    """A flush in two steps, and reports of stores."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[int] = []
        self.other_word = 0

    def issue(self) -> None:
        self.issued.append(self.ghost.issues())

    def complete(self) -> None:
        if self.issued:
            self.ghost.acked(ROOT, 0, 512, self.issued.pop())

    def log(self) -> None:
        self.ghost.logs("vm", 0x10, 0x11, True)

    def device_stored(self) -> None:
        self.ghost.stored("vm", 0x10)

    def report(self) -> None:
        self.ghost.stores.end(self.ghost.report_begins("vm", []))

    def reported(self) -> None:
        self.ghost.stores.end(self.ghost.report_begins("vm", [0x10]))

    # -- a function, its page requests, and the entry that leads to its table ----------------------------

    def masters(self) -> None:
        self.ghost.functions.masters(RID, on=True)

    def masters_no_more(self) -> None:
        self.ghost.functions.masters(RID, on=False)

    def asks(self) -> None:
        self.ghost.functions.asks(RID, on=True)

    def asks_no_more(self) -> None:
        self.ghost.groups.forgotten(RID)
        self.ghost.functions.asks(RID, on=False)

    def sends(self) -> None:
        self.ghost.groups.sent(RID, 0)

    def hears_answer(self) -> None:
        self.ghost.groups.answered(RID, 0)

    def read_entry(self) -> None:
        self.ghost.functions.leading.cached("unit", [ENTRY])

    def forget_entry(self) -> None:
        self.ghost.functions.leading.cached("unit", [])

    def comes(self) -> None:
        self.ghost.functions.comes(RID)

    def came(self) -> None:
        self.ghost.functions.came(RID, on_demand=True)

    def drained(self) -> None:
        self.ghost.functions.drained(RID, unread=self.ghost.groups.unread(RID))

    def served(self) -> None:
        self.ghost.functions.served(RID)

    def leaves(self) -> None:
        late, cached = self.ghost.groups.late(RID), len(self.ghost.caches.held(DEVTLB))
        self.ghost.functions.left(RID, unanswered=late, cached=cached)

    def takes_request(self) -> None:
        self.ghost.groups.taken(RID, 0)

    def looks_for_page(self) -> None:
        self.ghost.heard.look(heard.LOOKS_FOR_PAGES)
        shown = self.ghost.backing.view("vm").get(PAGE)
        self.ghost.groups.answers(RID, 0, ResponseCode.SUCCESS, [PAGE] if shown is None else [])

    def store_entry(self) -> None:
        self.ghost.functions.leading.stored(ENTRY, 0, 5)

    def store_other_word(self) -> None:
        self.other_word ^= 1
        self.ghost.functions.leading.stored(ENTRY, 1, self.other_word)

    def verdict(self) -> Verdict:
        return {(each.invariant, each.sentence) for each in self.verdicts.found}


def heard_in(story: Steps, name: str) -> frozenset[Effect]:
    story.ghost.heard.taken()
    getattr(story, name)()
    return story.ghost.heard.taken()


def independent(one: Set[Effect], other: Set[Effect]) -> bool:
    return not any(a == b and (x or y) for a, x in one for b, y in other)


def legal_before(chance: random.Random) -> Steps:
    story = Steps()
    for _ in range(chance.randrange(BEFORE)):
        ahead = deepcopy(story)
        try:
            getattr(ahead, chance.choice(chance.choice(WHO)))()
        except KeyError:  # of a root that is gone
            continue
        if not ahead.verdicts.found:
            story = ahead
    return story


def differences(seed: int) -> list[tuple[str, str]]:
    """Pairs of steps that are called independent and judged otherwise the other way round."""
    found = []
    chance = random.Random(seed)
    for _ in range(RUNS):
        story = legal_before(chance)
        first, second = (chance.choice(who) for who in chance.sample(WHO, 2))
        behind = [chance.choice(chance.choice(WHO)) for _ in range(BEHIND)]
        ends = list[Verdict]()
        try:
            ahead = deepcopy(story)
            if not independent(heard_in(ahead, first), heard_in(ahead, second)):
                continue
            for order in ((first, second), (second, first)):
                ahead = deepcopy(story)
                for name in (*order, *behind):
                    getattr(ahead, name)()
                ends.append(ahead.verdict())
        except KeyError:
            continue
        if ends[0] != ends[1]:
            found.append((first, second))
    return found


def test_independent_steps_are_judged_alike_in_both_orders() -> None:
    assert not differences(1)


@pytest.mark.parametrize(
    ("aspect", "before", "pair", "behind"),
    [
        (heard.OF_HOST, "zap", ("use", "take"), ""),
        (heard.OF_FRAMES, "zap take", ("use", "free"), ""),
        (heard.OF_TABLE_PAGES, "collapse", ("walk", "reuse"), ""),
        (heard.OF_ENTRIES, "cache", ("issue", "zap"), "complete"),
        (heard.OF_CACHES, "cache zap issue", ("drop", "complete"), ""),
        (heard.OF_LET_GO, "zap", ("let_go", "map"), ""),
        (heard.OF_STORES, "log", ("device_stored", "report"), ""),
        (heard.OF_WINDOWS, "zap take", ("delete_slot", "looks_for_page"), ""),
        (heard.OF_FUNCTIONS, "masters comes", ("masters_no_more", "leaves"), ""),
        (heard.OF_FUNCTIONS, "comes", ("asks", "came"), ""),
        (heard.OF_CACHES, "comes cache", ("drop", "leaves"), ""),
        (heard.OF_GROUPS, "comes sends asks_no_more", ("hears_answer", "drained"), ""),
        (heard.OF_GROUPS, "comes sends asks_no_more", ("hears_answer", "leaves"), ""),
        (heard.OF_LEADING, "read_entry", ("forget_entry", "store_other_word"), ""),
    ],
)
def test_two_steps_that_only_he_tells_apart(
    aspect: str, before: str, pair: tuple[str, str], behind: str
) -> None:
    """In one aspect; without it they would be taken for independent."""
    story = Steps()
    story.play(before)
    ahead = deepcopy(story)
    effects = [heard_in(ahead, name) for name in pair]
    assert not independent(*effects)
    assert independent(*({each for each in effect if each[0] != aspect} for effect in effects))
    ends = list[Verdict]()
    for order in (pair, pair[::-1]):
        ahead = deepcopy(story)
        ahead.play(" ".join((*order, behind)))
        ends.append(ahead.verdict())
    assert ends[0] != ends[1]


def test_accesses_and_fills_do_not_tell_of_each_other() -> None:
    story = Steps()
    assert independent(heard_in(story, "use"), heard_in(story, "cache_cpu"))
    assert independent(heard_in(story, "use"), heard_in(story, "zap"))
