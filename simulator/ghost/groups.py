"""Page request groups: each that was sent is answered once (I8), and each request in one (R9)."""

from __future__ import annotations

import errno
from collections import Counter

from protocol.errors import EHWPOISON
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ResponseCode
from simulator.ghost import heard
from simulator.ghost.violation import Verdicts

ENGINES_AT_IT = 4  # of one function, at work on one page
OF_ONE_PAGE = errno.EFAULT, errno.EINVAL, EHWPOISON


class Groups:
    def __init__(self, verdicts: Verdicts, hearing: heard.Heard) -> None:
        self._verdicts = verdicts
        self._hearing = hearing
        self._out: dict[tuple[int, int], None] = {}  # function, index; in the order they were sent
        self._forgotten: set[tuple[int, int]] = set()
        self._dropped: Counter[tuple[int, int]] = Counter()  # by function and page, in this overflow
        self._taken: set[tuple[int, int]] = set()  # out of the queue, by the driver
        self._refused: set[tuple[int, int]] = set()  # groups that are served nothing, whatever the page

    @property
    def outstanding(self) -> list[tuple[int, int]]:
        return list(self._out)

    def sent(self, rid: int, index: int) -> None:
        """A group goes out."""
        self._hearing.also(heard.CHANGES_GROUP)
        if (rid, index) in self._out:
            self._verdicts.say("I8", f"function {rid:#x} uses index {index} before its group was answered")
        self._out[rid, index] = None
        self._forgotten.discard((rid, index))
        self._taken.discard((rid, index))

    def taken(self, rid: int, index: int) -> None:
        """The driver has read the last of its requests."""
        self._hearing.also(heard.CHANGES_GROUP)
        self._taken.add((rid, index))

    def answered(self, rid: int, index: int) -> None:
        """A response arrives at the function."""
        self._hearing.also(heard.CHANGES_GROUP)
        if (rid, index) in self._out:
            del self._out[rid, index]
            return
        if (rid, index) in self._forgotten:
            self._forgotten.remove((rid, index))
        else:
            self._verdicts.say("I8", f"function {rid:#x} is answered a group {index} that waits for nothing")

    def dropped(self, rid: int, page: int) -> None:
        """A request, for want of room.  An engine or two may have asked before they knew (R9)."""
        self._dropped[rid, page] += 1
        if self._dropped[rid, page] > ENGINES_AT_IT:
            self._verdicts.say(
                "R9", f"function {rid:#x} asks a full queue for page {page:#x} again and again"
            )

    def accepted(self) -> None:
        """There is room again."""
        self._dropped.clear()

    def late(self, rid: int) -> list[int]:
        """Groups that were out when its page requests were switched off, and are not answered yet."""
        self._hearing.also(heard.LOOKS_AT_GROUPS)
        return [index for other, index in self._forgotten if other == rid]

    def unread(self, rid: int) -> list[int]:
        """Those of them that the driver has not read."""
        return [index for index in self.late(rid) if (rid, index) not in self._taken]

    def answers(self, rid: int, index: int, code: ResponseCode, nowhere: list[int]) -> None:
        """The driver has looked for the pages of a group; where nothing was all the time is `nowhere`.

        Failure is right for one of which KVM is gone, or has no memory: no page of it comes.
        """
        refused = (rid, index) in self._refused
        self._refused.discard((rid, index))
        for page in nowhere:
            what = f"group {index} of function {rid:#x} is answered {code.name}, page {page:#x} is nowhere"
            if code is ResponseCode.SUCCESS:
                self._verdicts.say("I8", what)
            elif code is ResponseCode.FAILURE and not refused:
                self._verdicts.say("I8", f"{what}: that ends all its page requests")

    def finds(self, request: PageRequest, code: ResponseCode, refused: int | None) -> None:
        """What the driver makes of one page.  `refused`: by whoever has the memory, the errno, 0 if he is
        not; None: he was not asked."""
        what = f"page {request.addr >> 12:#x} of function {request.rid:#x} is answered {code.name}"
        if refused is None and code is not ResponseCode.SUCCESS:
            self._verdicts.say("I8", f"{what}, and nobody was asked for it")
        elif refused in OF_ONE_PAGE and code is not ResponseCode.INVALID:
            self._verdicts.say("I8", f"{what}, for what concerns that page alone")
        elif refused and code is ResponseCode.SUCCESS:
            self._verdicts.say("I8", f"{what}, and was refused")
        elif refused and refused not in OF_ONE_PAGE:
            key = request.rid, request.prgi
            self._refused.add(key)  # a table of iommufdd's own may have no memory either

    def forget_all(self) -> None:
        """The functions are gone."""
        self._hearing.also(heard.CHANGES_GROUP)
        self._out.clear()
        self._forgotten.clear()
        self._taken.clear()
        self._refused.clear()

    def forgotten(self, rid: int) -> None:
        """Its page requests were switched off: nobody waits for an answer, though one may still come."""
        self._hearing.also(heard.CHANGES_GROUP)
        for key in [key for key in self._out if key[0] == rid]:
            del self._out[key]
            self._forgotten.add(key)
