"""The front door is as it was, or somebody says so: names and signatures, and the page of its docstrings."""

from __future__ import annotations

import inspect

import pytest

from qemu_shim import api
from tests.api.page import DOCUMENT, SIGNATURES, document, members, signatures


def test_names_and_signatures_are_those_of_the_committed_file() -> None:
    """A change breaks scenarios of people we do not know: `python -m tests.api --write` says it is meant."""
    assert SIGNATURES.read_text(encoding="utf-8") == signatures()


def test_the_page_is_of_these_docstrings() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "python -m tests.api --write"


@pytest.mark.parametrize("name", api.__all__)
def test_everything_public_says_what_it_is(name: str) -> None:
    it = getattr(api, name)
    if inspect.isclass(it) or inspect.isfunction(it):
        assert it.__doc__
        assert not it.__doc__.startswith(f"{name}("), f"{name} has but the docstring dataclasses make"
    for member, of in members(it):
        about = of.__func__ if isinstance(of, classmethod) else of
        assert isinstance(of, str) or about.__doc__, f"{name}.{member} has no docstring"


def test_a_changed_signature_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def boot(self: object, devices: int) -> None:
        """Another one."""

    monkeypatch.setattr(api.Context, "boot", boot)
    assert "Context.boot(devices: int) -> None\n" in signatures()
    assert SIGNATURES.read_text(encoding="utf-8") != signatures()
