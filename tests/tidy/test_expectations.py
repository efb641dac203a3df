"""A test says which assertion it expects and which errnos it lets pass: swallowed whole, it shows nothing."""

from __future__ import annotations

import ast

import pytest

from tests.tidy.source import Module, hold, modules, snippet


def check_expectations(module: Module) -> list[str]:
    found = []
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        given = [ast.unparse(arg) for arg in node.args]
        matched = any(keyword.arg == "match" for keyword in node.keywords)
        if name == "raises" and "AssertionError" in given and not matched:
            found.append(module.at(node, "raises(AssertionError) without a match: any assertion would do"))
        if name == "suppress" and "UapiError" in given:
            found.append(module.at(node, "suppress(UapiError): say which errnos (tests/kit/refusals.py)"))
    return found


def test_no_test_swallows_what_it_should_show() -> None:
    hold(check_expectations, tuple(module for module in modules() if module.path.parts[0] == "tests"))


@pytest.mark.parametrize(
    ("text", "breaches"),
    [
        ("with pytest.raises(AssertionError): pass", 1),
        ("with suppress(PeerError, UapiError): pass", 1),
        ("with contextlib.suppress(UapiError): pass", 1),
        ("with pytest.raises(AssertionError, match='I6'): pass", 0),
        ("with suppress(PeerError): pass", 0),
        ("with may_refuse(errno.EINVAL): pass", 0),
    ],
)
def test_what_is_swallowed_is_seen(text: str, breaches: int) -> None:
    assert len(check_expectations(snippet("tests/x.py", text))) == breaches
