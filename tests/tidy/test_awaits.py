"""Each await of the cores says what it may lose; the rule is shown what it must find and what it must not."""

from __future__ import annotations

import ast

import pytest

from tests.awaits.graph import awaits_in
from tests.awaits.page import DOCUMENT, complaints, document
from tests.awaits.sites import Clause, Site, cores, idle_comments, sites
from tests.awaits.values import Values
from tests.tidy.source import Module, hold, snippet

TYPES = """
Gfn = NewType("Gfn", int)
Pfn = NewType("Pfn", int)

class Slot:
    def __init__(self):
        self.base = 0
        self.flags = 0
        self.mm = 0

    def set(self, flags):
        self.flags = flags

    async def copy(self, at: Gfn) -> int: ...

@dataclass(frozen=True)
class Request:
    gfn: Gfn

@dataclass(frozen=True)
class Leaf:
    pfn: Pfn
"""

# What an `async def` is given, its body, and what each of its sleeps carries.
CASES: dict[str, tuple[str, str, list[set[str]]]] = {
    "read before and after": ("self", "page = find()\nawait w\nuse(page)", [{"page"}]),
    "read again": ("self", "page = find()\nuse(page)\nawait w\npage = find()\nuse(page)", []),
    "read before only": ("self", "page = find()\nawait map(page)", []),
    "an object given": ("slot: Slot", "await w\nuse(slot)", [{"slot"}]),
    "numbers given": ("gfn: Gfn, size: int | None", "await w\nuse(gfn, size)", []),
    "a record of numbers": ("request: Request", "gfn = request.gfn\nawait w\nuse(gfn)", []),
    "a frame given": ("pfn: Pfn", "await w\nstore(pfn)", [{"pfn"}]),
    "a record with a frame": ("leaf: Leaf", "await w\nstore(leaf)", [{"leaf"}]),
    "computed of numbers": ("gfn: Gfn", "end = gfn + 1\nawait w\nuse(end)", []),
    "an attribute nobody else stores": ("self", "mm = self.mm\nawait w\nuse(mm)", []),
    "an attribute that is stored to": ("self", "flags = self.flags\nawait w\nuse(flags)", [{"flags"}]),
    "in the awaited call's own statement": ("slot: Slot", "return slot.base + await w", [{"slot"}]),
    "around a loop": ("self", "page = find()\nwhile busy():\n    use(page)\n    await w", [{"page"}]),
    "bound anew in a loop": ("self", "while busy():\n    page = find()\n    use(page)\n    await w", []),
    "what a loop goes over": ("self", "for slot in self.slots():\n    await w", [{"each slot"}]),
    "a loop over numbers": ("count: int", "for at in range(count):\n    await w", []),
    "a lock": ("slot: Slot", "async with self.lock:\n    use(slot)", [{"slot"}]),
    "only in a handler": ("slot: Slot", "try:\n    await w\nexcept E:\n    use(slot)", [{"slot"}]),
    "in a finally": ("slot: Slot", "try:\n    await w\nfinally:\n    use(slot)", [{"slot"}]),
    "on one branch": ("slot: Slot", "await w\nif x:\n    return\nuse(slot)", [{"slot"}]),
    "not on the branch that sleeps": ("slot: Slot", "if x:\n    await w\n    return\nuse(slot)", []),
    "a question": ("self", "if self.flags:\n    raise E\nawait w\nact()", [{"asked"}]),
    "a question before a lock": ("self", "if self.flags:\n    raise E\nasync with l:\n    f()", [{"asked"}]),
    "a question for the callee": ("self", "if self.flags:\n    raise E\nawait act()", []),
    "a question about numbers": ("gfn: Gfn", "if gfn % 2:\n    raise E\nawait w\nact()", []),
    "how far it came": ("slot: Slot, at: Gfn", "at += await slot.copy(at)\nuse(slot, at)", [{"slot"}]),
}  # fmt: skip


def function(given: str, body: str, above: str = "") -> Module:
    text = f"{TYPES}\nclass Kvm:\n    async def flow({given}):\n" + "\n".join(
        "        " + line for line in [*above.splitlines(), *body.splitlines()]
    )
    return snippet("kvmd/core/x.py", text)


def found(module: Module) -> list[Site]:
    return list(sites([module], Values([module])))


@pytest.mark.parametrize("name", CASES)
def test_what_is_carried_is_found(name: str) -> None:
    given, body, wanted = CASES[name]
    assert [set(site.carried) for site in found(function(given, body))] == wanted


HERE = "(tests/tidy/test_awaits.py::test_what_is_carried_is_found)"
SAID = [
    ("# await: slot: cannot change: the lock is held", []),
    (f"# await: slot: it may go; asked again: `find` {HERE}", []),
    (f"# await: slot: it may\n# go; asked again:\n# `find` {HERE}", []),
    ("", ["nothing is said of: slot"]),
    ("# await: page: cannot change: ours", ["nothing is said of: slot", "page is not carried"]),
    ("# await: slot, page: cannot change: ours", ["page is not carried"]),
    ("# await: slot: it may go", ["not of the form", "nothing is said of: slot"]),
    ("# await: slot: it may go; asked again: `find`", ["not of the form", "nothing is said of: slot"]),
    ("# await: slot: it may go; asked again: `find` (tests/none.py::test_x)", ["there is no such test"]),
    ("# await: slot: cannot change: ours\npass", ["nothing is said of: slot", "no await under this comment"]),
]  # fmt: skip


@pytest.mark.parametrize(("above", "wanted"), SAID)
def test_what_is_said_is_held_to_what_is_carried(above: str, wanted: list[str]) -> None:
    module = function("slot: Slot", "await w\nuse(slot)", above)
    said = [complaint for site in found(module) for complaint in site.complaints]
    said += idle_comments(module, found(module))
    assert len(said) == len(wanted), said
    for word in wanted:
        assert any(word in complaint for complaint in said), (word, said)


def test_what_holds_for_a_whole_function_is_said_above_it() -> None:
    text = "    # awaits: slot: cannot change: ours\n    async def flow(slot: Slot):\n"
    text += "        await w\n        use(slot)\n        await w\n        use(slot)"
    module = snippet("kvmd/core/x.py", f"{TYPES}\nclass Kvm:\n{text}")
    assert [site.complaints for site in found(module)] == [[], []]
    assert found(module)[0].clauses == (Clause(("slot",), "ours"),)
    assert idle_comments(module, found(module)) == []


def sums_across_a_sleep(module: Module) -> list[str]:
    """`x.done += await copy()` reads before it sleeps and loses what others added meanwhile."""
    return [
        module.at(node, f"{ast.unparse(node.target)} is read before the sleep and stored after it")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.AugAssign)
        and not isinstance(node.target, ast.Name)
        and any(awaits_in(node.value))
    ]


def test_nothing_is_added_to_across_a_sleep() -> None:
    hold(sums_across_a_sleep, cores())
    for text, breaches in (
        ("self.n += await w", 1),
        ("n[0] |= 1 + await w", 1),
        ("n += await w", 0),
        ("self.n += w", 0),
    ):
        assert len(sums_across_a_sleep(function("self", text))) == breaches


def test_two_clauses_may_stand_in_one_comment() -> None:
    above = "# await: slot: cannot change: ours | page: cannot change: pinned"
    module = function("slot: Slot, page: Page", "await w\nuse(slot, page)", above)
    assert [site.complaints for site in found(module)] == [[]]


def test_every_await_is_said() -> None:
    assert complaints() == []


def test_the_page_is_what_the_comments_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run python -m tests.awaits --write"
