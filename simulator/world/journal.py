"""What happened in a run, one line a step: hashed always, kept for people on request."""

from __future__ import annotations

from hashlib import blake2b

LINES_AT_ONCE = 1_000  # lines that are hashed together: one after the other takes ten times as long


class Journal:
    """Two runs are the same if their digests are."""

    def __init__(self, *, keep: bool = False) -> None:
        self.lines: list[str] | None = [] if keep else None
        self.steps = 0
        self._unhashed: list[str] = []
        self._said = blake2b(digest_size=16)
        self._data = blake2b(digest_size=16)

    def add(self, line: str, data: bytes | bytearray | memoryview = b"") -> None:
        """`data` is told by length to people."""
        self.steps += 1
        self._unhashed.append(line)
        if data:
            self._data.update(data)
        if len(self._unhashed) >= LINES_AT_ONCE:
            self._hash()
        if self.lines is not None:
            self.lines.append(f"{line} ({len(data)} bytes)" if data else line)

    def _hash(self) -> None:
        self._said.update("".join(f"{line}\n" for line in self._unhashed).encode())
        self._unhashed.clear()

    @property
    def digest(self) -> str:
        self._hash()
        both = self._said.copy()
        both.update(self._data.digest())
        return both.hexdigest()
