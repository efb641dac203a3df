"""One word, one thing: class names that stand twice, import cycles, addresses that are bare ints."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.tidy.source import Module, imports, modules, product, snippet

SHARED_MAX = 15  # names that two classes may have

# The two ends of one message or one piece of shared memory: what it is to who asks and to who answers.
TWO_ENDS = {
    "DeviceSim": "device_sim's front door",
    "DirtyRing": "the ring of KVM_CAP_DIRTY_LOG_RING, which user space maps",
    "FaultNotes": "the channel of KVM_FAULTED_IN",
    "FunctionInfo": "CAPS",
    "GuestMemfd": "KVM_CREATE_GUEST_MEMFD",
    "Iommufdd": "iommufdd's front door",
    "Kvmd": "kvmd's front door",
    "NxHugePages": "NX_HUGE_PAGES",
    "RunResult": "KVM_RUN",
    "Vcpu": "KVM_CREATE_VCPU",
}

# Parameters that hold an address or the number of a page, wherever they stand in a core.
ADDRESS = re.compile(
    r"^(start_|first_)?(iova|gpa|hva|hpa|gfn|pfn|addr|address|page|frame)$"
    r"|_(iova|gpa|hva|hpa|gfn|pfn|addr|address)$"
    r"|^(iova|gpa|hva|hpa|gfn|pfn)_(start|end|base|first|last)$"
)
# A page of something that is not an address space: an offset in a file or a bitmap.
NO_ADDRESS = {
    "kvmd/core/slots/dirty_bitmap.py": "page of a bitmap: counted from the slot's first",
    "kvmd/core/slots/dirty_log.py": "page of a bitmap: counted from the slot's first",
}


def class_names(modules: tuple[Module, ...]) -> dict[str, list[str]]:
    """Of every top-level class name, the files that define it."""
    found: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(module.path))
    return found


def twice(modules: tuple[Module, ...]) -> dict[str, list[str]]:
    return {name: paths for name, paths in class_names(modules).items() if len(paths) > 1}


def test_a_name_stands_for_one_class_or_for_the_two_ends_of_one_message() -> None:
    found = twice(product())
    new = {name: paths for name, paths in found.items() if name not in TWO_ENDS}
    assert not new, f"defined twice, and not two ends of one message: {new}"
    gone = TWO_ENDS.keys() - found.keys()
    assert not gone, f"no longer defined twice, take them off the list: {sorted(gone)}"
    assert len(TWO_ENDS) <= SHARED_MAX
    for name, message in TWO_ENDS.items():
        assert len(found[name]) == 2, f"{name} ({message}) has two ends, not {found[name]}"


def test_a_name_that_stands_twice_is_found() -> None:
    a = snippet("kvmd/a.py", "class Pool: ...\nclass Other:\n    class Inner: ...\n")
    b = snippet("iommufdd/b.py", "class Pool: ...\nclass Inner: ...\n")
    assert twice((a, b)) == {"Pool": ["kvmd/a.py", "iommufdd/b.py"]}


# -- import cycles, those that only types make included ------------------------------------------------


def import_graph(modules: tuple[Module, ...]) -> dict[str, set[str]]:
    """Who names whom, TYPE_CHECKING or not."""
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        wanted = {
            target
            for found in imports(module)
            for target in (f"{found.target}.{found.item}", found.target)
            if target in names
        }
        graph[module.name] = wanted - {module.name}
    return graph


def knots(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of two and more modules each of which reaches all others."""
    reach = {name: _reach(graph, name) for name in graph}
    found = []
    seen: set[str] = set()
    for name in graph:
        if name not in seen and name in reach[name]:
            knot = {other for other in reach[name] if name in reach[other]}
            seen |= knot
            found.append(knot)
    return found


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    pending = [start]
    while pending:
        for name in graph[pending.pop()] - reached:
            reached.add(name)
            pending.append(name)
    return reached


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = knots(import_graph(product()))
    assert not found, f"import each other, if only for types: {[sorted(knot) for knot in found]}"


def test_a_circle_of_imports_is_found_even_where_only_types_make_it() -> None:
    a = snippet("kvmd/a.py", "from kvmd import b\n")
    b = snippet("kvmd/b.py", "def f():\n    from kvmd.c import C\n")
    c = snippet("kvmd/c.py", "if TYPE_CHECKING:\n    from kvmd.a import A\n")
    d = snippet("kvmd/d.py", "from kvmd.a import A\n")
    assert knots(import_graph((a, b, c, d))) == [{"kvmd.a", "kvmd.b", "kvmd.c"}]


# -- addresses -----------------------------------------------------------------------------------------


def bare_addresses(module: Module) -> Iterator[str]:
    """Parameters of a core that hold an address and say only `int`."""
    if str(module.path) in NO_ADDRESS:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                bare = isinstance(arg.annotation, ast.Name) and arg.annotation.id == "int"
                if bare and ADDRESS.search(arg.arg):
                    yield module.at(arg, f"{node.name}: {arg.arg} is an address: give it a type")


def cores() -> tuple[Module, ...]:
    return tuple(
        module for module in product() if len(module.path.parts) > 2 and module.path.parts[1] == "core"
    )


def test_an_address_in_a_core_has_a_type() -> None:
    assert cores()
    found = [complaint for module in cores() for complaint in bare_addresses(module)]
    assert not found, "\n".join(["", *found])


def test_an_address_without_a_type_is_found() -> None:
    text = "def f(gpa: int, size: int, npages: int): ...\nasync def g(*, start_iova: int, hpa: Hpa): ...\n"
    found = list(bare_addresses(snippet("kvmd/core/a.py", text)))
    assert [complaint.split(": ")[1:3] for complaint in found] == [
        ["f", "gpa is an address"],
        ["g", "start_iova is an address"],
    ]


# -- the tests' own classes -------------------------------------------------------------------------------


KIT_ONLY = re.compile(r"^(Guest|Rig)$")  # what everything can be called: what is it about?


def check_test_classes(found: tuple[Module, ...]) -> list[str]:
    """Two of a name are one thing written twice, which is tests/kit's to have, or two things."""
    complaints = [
        f"{name} stands in {', '.join(paths)}: share it in tests/kit, or say what each is"
        for name, paths in twice(found).items()
    ]
    return complaints + [
        f"{path}: {name} says nothing: name it by what it is about, and see what tests/kit has of it"
        for name, paths in class_names(found).items()
        for path in paths
        if KIT_ONLY.match(name) and not path.startswith("tests/kit/")
    ]


def test_a_class_of_the_tests_has_a_name_of_its_own() -> None:
    assert not check_test_classes(tuple(each for each in modules() if each.path.parts[0] == "tests"))


@pytest.mark.parametrize(
    ("files", "breaches"),
    [
        ({"tests/unit/a.py": "class World: ...", "tests/kit/b.py": "class World: ..."}, 1),
        ({"tests/unit/a.py": "class Rig: ..."}, 1),
        ({"tests/unit/a.py": "class Guest: ...", "tests/unit/b.py": "class Guest: ..."}, 3),
        ({"tests/kit/b.py": "class Guest: ..."}, 0),
        ({"tests/unit/a.py": "def f():\n    class World: ...", "tests/kit/b.py": "class World: ..."}, 0),
        ({"tests/unit/a.py": "class PortalGuest: ..."}, 0),
    ],
)
def test_a_class_of_the_tests_that_stands_twice_is_found(files: dict[str, str], breaches: int) -> None:
    found = tuple(snippet(path, f"{text}\n") for path, text in files.items())
    assert len(check_test_classes(found)) == breaches
