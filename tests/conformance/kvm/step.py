"""One step being replayed: what was recorded, and where the answers differ."""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from protocol.errors import UapiError, errno_name
from tests.conformance.kvm.cases import Body

T = TypeVar("T")
TEXT_MAX = 400  # of one value in a message


class CaseFailed(Exception):
    """The case cannot go on: kvmd gave what cannot be, or it does not end."""


class UnknownWord(CaseFailed):
    """The recording says something that the replayer does not know: no answer of kvmd's is wrong."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`step` counts from 0; 7.1 is the second concurrent step of step 7.  Without values it says in `what`
    why the case could not go on.
    """

    step: str
    doing: str
    what: str
    expected: Any = None
    came: Any = None

    def __str__(self) -> str:
        where = f"step {self.step} ({self.doing}): {self.what}"
        if self.expected is None is self.came:
            return where
        return f"{where}: expected {_short(self.expected)}, came {_short(self.came)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= TEXT_MAX else f"{text[: TEXT_MAX - 40]} ... {text[-36:]}"


def _same(expected: Any, came: Any) -> bool:
    """Hex in either case; `0` and `"0"` both say that there was no errno."""
    if isinstance(expected, dict) and isinstance(came, dict):
        return expected.keys() == came.keys() and all(_same(expected[key], came[key]) for key in expected)
    if isinstance(came, str) and isinstance(expected, str | int):
        return str(expected).lower() == came.lower()
    return bool(expected == came)


@dataclass(slots=True)
class Step:
    index: str
    body: Body
    seen: list[Difference] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return next((key for key in ("host", "ioctl", "uffd", "ring", "guest") if key in self.body), "")

    @property
    def doing(self) -> str:
        """What it is, in a word or two."""
        what = self.body.get(self.kind)
        return f"{self.kind} {what}" if isinstance(what, str) else self.kind or f"{sorted(self.body)}"

    @property
    def args(self) -> dict[str, Any]:
        return self.body.get("args") or {}

    def concurrent(self) -> list[Step]:
        steps = enumerate(self.body.get("concurrent") or ())
        return [Step(f"{self.index}.{number}", body, self.seen) for number, body in steps]

    def expect(self, what: str, expected: Any, came: Any) -> None:
        """Note a difference; a step that records nothing about `what` does not ask."""
        if not _same(expected, came):
            self.seen.append(Difference(self.index, self.doing, what, expected, came))

    def expect_recorded(self, key: str, came: Any) -> None:
        """Compare with what the step says of `key`, if it does."""
        if key in self.body:
            self.expect(key, self.body[key], came)

    async def answer(self, asked: Awaitable[T]) -> T | None:
        """What was asked gives the errno recorded; None if it failed."""
        expected = _canonical(self.body.get("errno", 0))
        try:
            given = await asked
        except UapiError as error:
            came = errno_name(error.errno)
            self.expect("errno", expected, came if came == expected else str(error))
            return None
        self.expect("errno", expected, "0")
        return given


def _canonical(recorded: int | str) -> str:
    """Linux has two names for some numbers."""
    number = getattr(errno, str(recorded), None)
    return str(recorded) if number is None else errno_name(number)
