"""A constant has one home: a name with values in two modules is one fact told twice, or two facts."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from tests.tidy.source import Module, product, snippet

# Each of these files tells a story of its own, with numbers of its own.
STORIES = ("qemu_shim/scenarios/series/", "qemu_shim/study/workloads/")

# One fact that a core and a message state each, because a core knows no messages: the values are equal.
TWO_ENDS = {
    "MAX_PAGES": "pages in one reply to HMM_RANGE_FAULT",
    "MSR_KVM_WALL_CLOCK_NEW": "the index in KVM_SET_MSRS",
}
# A name for a part that modules of one kind have each: what it is.
EACH_ITS_OWN = {
    "LAYOUT": "the fields of the record that the module is about",
    "RESERVED": "the bits that no field of it covers",
    "FRONT_DOOR": "the daemon's answers to its clients",
    "HMM_MIRROR": "what this end of the channel answers",
    "IMPORTER": "what this end of the channel answers",
    "NOTES": "what this end of the channel answers",
    "LINK": "the link's answers, and its socket",
}

Homes = dict[str, list[tuple[Module, ast.expr]]]


def constants(module: Module) -> Iterator[tuple[str, ast.expr]]:
    """Public ones of the module's own; a type variable is none."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        else:
            continue
        for target in targets:
            for name, value in _pairs(target, node.value):
                if name.isupper() and not name.startswith("_") and not _is_type_variable(value):
                    yield name, value


def _pairs(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    assert value is not None
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple):
        values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
        for each, its_value in zip(target.elts, values, strict=True):
            yield from _pairs(each, its_value)


def _is_type_variable(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "TypeVar"


def with_two_homes(modules: tuple[Module, ...]) -> Homes:
    found: Homes = defaultdict(list)
    for module in modules:
        if not str(module.path).startswith(STORIES):
            for name, value in constants(module):
                found[name].append((module, value))
    return {name: homes for name, homes in found.items() if len({module.path for module, _ in homes}) > 1}


def complaints(modules: tuple[Module, ...]) -> list[str]:
    found = []
    for name, homes in with_two_homes(modules).items():
        if name in EACH_ITS_OWN:
            continue
        values = {ast.unparse(value) for _, value in homes}
        if name not in TWO_ENDS:
            found += [module.at(value, f"{name} has another home too") for module, value in homes]
        elif len(values) > 1:
            found.append(f"{name} ({TWO_ENDS[name]}) is {' and '.join(sorted(values))}")
    return found


def test_a_constant_has_one_home() -> None:
    found = complaints(product())
    assert not found, "\n".join(["", *found])
    gone = (TWO_ENDS.keys() | EACH_ITS_OWN.keys()) - with_two_homes(product()).keys()
    assert not gone, f"have one home now, take them off the lists: {sorted(gone)}"


def test_a_constant_with_two_homes_is_found() -> None:
    a = snippet(
        "kvmd/a.py", "MAX_UNITS: Final = 4\nONE, OTHER = 1, 2\nT = TypeVar('T')\n_OWN = 1\nused = 1\n"
    )
    b = snippet("iommufdd/b.py", "MAX_UNITS = 64\nOTHER = 2\nT = TypeVar('T')\n_OWN = 2\nused = 1\n")
    story = snippet("qemu_shim/study/workloads/c.py", "ONE = 3\n")
    assert [complaint.split(": ")[1] for complaint in complaints((a, b, story))] == [
        *["MAX_UNITS has another home too"] * 2,
        *["OTHER has another home too"] * 2,
    ]


def test_two_ends_that_disagree_are_found() -> None:
    core = snippet("kvmd/core/a.py", "MAX_PAGES = 1024\n")
    message = snippet("protocol/uapi/b.py", "MAX_PAGES = 512\n")
    assert complaints((core, message)) == [
        "MAX_PAGES (pages in one reply to HMM_RANGE_FAULT) is 1024 and 512"
    ]
    assert complaints((core, snippet("protocol/uapi/b.py", "MAX_PAGES: Final = 1024\n"))) == []
