"""No test has a patience of its own: what waits for something takes it from tests/patience.py."""

from __future__ import annotations

import ast

import pytest

from tests.tidy.source import Module, hold, modules, snippet

HOME = "tests/patience.py"
WAITS = {"fail_after", "fail_at", "settimeout"}  # how long to wait is their first argument
NAMES = {"timeout", "patience", "patience_s"}


def check_patience(module: Module) -> list[str]:
    """Numbers in the place of a patience.  Less than a second gives up on purpose."""
    if str(module.path) == HOME:
        return []
    found = []
    for node in ast.walk(module.tree):
        for value in patiences(node):
            if isinstance(value, ast.Constant) and isinstance(value.value, int | float) and value.value >= 1:
                found.append(module.at(node, f"waits {value.value} s of its own: {HOME} says how long"))
    return found


def patiences(node: ast.AST) -> list[ast.expr | None]:
    match node:
        case ast.Call():
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            timed = name in WAITS or ast.unparse(node.func) == "process.wait"
            first = node.args[:1] if timed else []
            return [*first, *(keyword.value for keyword in node.keywords if keyword.arg in NAMES)]
        case ast.Assign():
            named = any(isinstance(to, ast.Name) and "PATIENCE" in to.id for to in node.targets)
            return [node.value] if named else []
        case _:
            return []


def test_no_test_has_a_patience_of_its_own() -> None:
    hold(check_patience, tuple(module for module in modules() if module.path.parts[0] == "tests"))


@pytest.mark.parametrize(
    "text",
    [
        "with trio.fail_after(10): pass",
        "sock.settimeout(5.0)",
        "process.communicate(timeout=60)",
        "process.wait(30)",
        "PATIENCE_S = 10.0",
        "await connect(path, patience_s=10)",
    ],
)
def test_a_patience_is_seen(text: str) -> None:
    assert len(check_patience(snippet("tests/x.py", text))) == 1
    assert check_patience(snippet(HOME, text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "with trio.fail_after(PATIENCE_S): pass",
        "await connect(path, patience_s=0.02)",
        "queue.wait(3)",
    ],
)
def test_what_is_none_is_let_pass(text: str) -> None:
    assert check_patience(snippet("tests/x.py", text)) == []
