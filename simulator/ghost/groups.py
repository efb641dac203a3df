"""Page request groups: each that was sent is answered once (I8), and each request in one (R9)."""

from __future__ import annotations

from simulator.ghost.violation import Verdicts


class Groups:
    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._out: dict[tuple[int, int], int] = {}  # function, index -> requests of it so far
        self._forgotten: set[tuple[int, int]] = set()

    @property
    def outstanding(self) -> list[tuple[int, int]]:
        return list(self._out)

    def sent(self, rid: int, index: int, pages: int) -> None:
        """A group of so many requests goes out."""
        if (rid, index) in self._out:
            self._verdicts.say("I8", f"function {rid:#x} uses index {index} before its group was answered")
        self._out[rid, index] = pages
        self._forgotten.discard((rid, index))

    def answered(self, rid: int, index: int) -> None:
        """A response arrives at the function."""
        if self._out.pop((rid, index), None) is not None:
            return
        if (rid, index) in self._forgotten:
            self._forgotten.remove((rid, index))
        else:
            self._verdicts.say("I8", f"function {rid:#x} is answered a group {index} that waits for nothing")

    def forget_all(self) -> None:
        """The functions are gone."""
        self._out.clear()
        self._forgotten.clear()

    def forgotten(self, rid: int) -> None:
        """Its page requests were switched off: nobody waits for an answer, though one may still come."""
        for key in [key for key in self._out if key[0] == rid]:
            del self._out[key]
            self._forgotten.add(key)
