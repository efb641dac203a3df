"""Which faults a schedule has, and at which of their opportunities: asked of the strategy when it begins.

The opportunities of a kind are counted.  First the strategy says among which it is (the first, the second,
the 3rd or 4th, the 5th to 8th...), then which half of those, and so on: early ones are as likely as late
ones together, however long the run is.  Of a kind that is asked for at EACH it says so there and then.

What a search that ends is told: a fault that is drawn first of all decides what every process does, and from
then on each opportunity of its kind counts, so that no two may change places.  One that is asked for goes by
whether there was one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from math import ceil

from simulator.faults.kinds import EACH, FAULTS
from simulator.faults.store_buffer import StoreBuffer
from simulator.kernel.files import StreamEnd
from simulator.kernel.process import SimProcess
from simulator.search.option import Touch
from simulator.world.fate import Fate
from simulator.world.scheduler import World
from simulator.world.thread import SimThread

VICTIMS = ("kvmd", "iommufdd", "device_sim")
BUFFERED = ("iommufdd", "device_sim", "kvmd")  # first those that look for each other's words
VMM = "qemu_shim"
LINK = "link"
FAULT = "fault"  # how the journal tells of one
DROPS = {"of one request": 1, "of four in a row": 4}  # a queue that overflows is one that many fill
STOPS_S = {"a moment": 0.001, "longer than a time-out": 5.0}
LINGERS_S = {"until others have done what they can": 0.001, "until they must go": 0.0}  # stores, seen late


class Faults:
    """Of these kinds, at most one each from `begin` to `end`, which a schedule has once for each excerpt that
    its story opens.  Nothing fails before or behind."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = [*dict.fromkeys(kind.removesuffix(EACH) for kind in kinds)]
        self._at_each = [kind.removesuffix(EACH) for kind in kinds if kind.endswith(EACH)]
        self.met: Counter[str] = Counter()  # how many there were of each kind
        self._met_before = Counter[str]()  # of them, in schedules before this one
        self.killed: set[str] = set()
        self.never = False  # a device that is late is so for good
        self.is_silent = False  # a device is: by a fault, it completes none until device_sim is started again
        self.is_off_bus = False  # one is: because of a fault or as its story wants it, until then too (R18)
        self.asks_no_more = False  # one does not, for pages: a request was answered with Response Failure
        self.late_s = 0.0  # a message, in virtual time
        self.buffer: StoreBuffer | None = None  # whose stores wait, once the first of them has come
        self._world: World | None = None
        self._buffers = False
        self._drops = 1  # requests that find no room, from the first on
        self._dropping = 0  # of them, how many are still to come
        self._left: dict[str, int] = {}  # of those drawn, how many opportunities pass before it fails
        self._asked: dict[str, bool] = {}  # of those that are not, has it failed?
        self._sealed: list[tuple[str, SimThread]] = []

    def put_into(self, world: World) -> None:
        self._world = world

    @property
    def excuses(self) -> bool:
        """Was there one because of which a VMM may have been denied something?"""
        lasting = any(FAULTS[kind].lasts for kind in self.met)
        return lasting or any(FAULTS[kind].excuses for kind in self._met_now) or self._is_impaired

    @property
    def _is_impaired(self) -> bool:
        """Is a device, until its machine ends?"""
        return self.is_silent or self.asks_no_more

    @property
    def struck(self) -> bool:
        """Was there one in this schedule?"""
        return bool(self._met_now)

    @property
    def _met_now(self) -> Counter[str]:
        return self.met - self._met_before

    def next_schedule(self) -> None:
        """In the same machine: what it comes to is its own."""
        self._met_before = self.met.copy()
        if self.buffer is not None:
            self.buffer.make_all()  # a processor that stands still makes its stores too
        self.buffer = None

    def begin(self) -> None:
        """Ask for a schedule's; called by a thread of the world."""
        for kind in self.kinds:
            if kind in self._at_each:
                self._asked[kind] = False
                if kind == "store-buffer":
                    self._ask_how(kind)
                continue
            at = self._when(kind)
            if at is None:
                continue
            if kind in ("sigstop", "sigkill"):
                self._seal_fate(kind, at)
                continue
            self._left[kind] = at
            self._ask_how(kind)

    def end(self) -> None:
        """What has not failed by now does not."""
        self._left.clear()
        self._asked.clear()
        self._buffers = False
        self._dropping = 0
        for kind, thread in self._sealed:
            if thread.fate is None:
                self.met[kind] += 1
                if kind == "sigkill":
                    self.killed.add(thread.name)
            thread.fate = None
        self._sealed.clear()

    def buffers(self) -> bool:
        """Does the store that is about to be made wait?  From the one on that was said, until `end`."""
        if self.due("store-buffer"):
            self._buffers = True
        return self._buffers

    def is_full(self) -> bool:
        """Does the page request that is to be queued find no room?"""
        if self._dropping:
            self._dropping -= 1
            assert self._world is not None
            self._world.touch({Touch((FAULT, "full"), True)})
            return True
        if not self.due("full"):
            return False
        self._dropping = self._drops - 1
        return True

    def due(self, kind: str, where: str = "") -> bool:
        """One of its opportunities has come: does it fail?"""
        if kind in self._left:
            fails, counts = self._left[kind] == 0, True
            self._left[kind] -= 1
        elif kind in self._asked:
            fails = counts = not self._asked[kind] and self._strikes(kind)
            self._asked[kind] |= fails
        else:
            return False
        assert self._world is not None
        self._world.touch({Touch((FAULT, kind), counts)})
        if fails:
            self.met[kind] += 1
            self._world.tells(f"{FAULT} {kind} {where}".rstrip())
        return fails

    # -- asking ----------------------------------------------------------------------------------------

    def _strikes(self, kind: str) -> bool:
        """At this opportunity."""
        if not self._pick(kind, ("not yet", "now")):
            return False
        if kind != "store-buffer":  # whose it is was asked first of all
            self._ask_how(kind)
        return True

    def _ask_how(self, kind: str) -> None:
        """For how long, of whom: what is to be known of one more than when it comes."""
        if kind == "ite":
            self.never = bool(self._pick(kind, ("late", "never")))
        elif kind == "full":
            self._drops = DROPS[list(DROPS)[self._pick(kind, tuple(DROPS))]]
        elif kind == "delay":
            self.late_s = self._for_how_long(kind)
        elif kind == "store-buffer":
            owner = BUFFERED[self._pick(kind, BUFFERED)]
            late_s = LINGERS_S[list(LINGERS_S)[self._pick(kind, tuple(LINGERS_S))]]
            self.buffer = StoreBuffer(owner, partial(self._stands_still, owner, late_s))

    def _stands_still(self, name: str, seconds: float) -> None:
        """From its next point on."""
        assert self._world is not None
        for thread in self._world.threads:
            if thread.name == name and not thread.over:
                thread.stopped_ns = self._world.now_ns() + ceil(seconds * 1e9)

    def _for_how_long(self, kind: str) -> float:
        return STOPS_S[list(STOPS_S)[self._pick(kind, tuple(STOPS_S))]]

    def _when(self, kind: str) -> int | None:
        spans = [0, *(1 << n for n in range(FAULTS[kind].late))]
        labels = ["never", *(_ordinals(first, max(first, 1)) for first in spans)]
        answer = self._pick(kind, labels)
        if not answer:
            return None
        first = spans[answer - 1]
        size = max(first, 1)
        while size > 1:
            size //= 2
            first += size * self._pick(kind, (_ordinals(first, size), _ordinals(first + size, size)))
        return first

    def delay(self, end: StreamEnd, first: int) -> None:
        """What `end` has not read from that piece on.  A link is a process that sleeps while it has it."""
        world = self._world
        assert world is not None
        link, late_s = SimProcess(world.host, LINK), self.late_s  # the next schedule has another

        def arrives() -> None:
            world.wait((), late_s)
            end.arrives()
            link.happened("delivers to", end)

        end.delay(first)
        world.spawn(link, arrives)

    @property
    def running(self) -> str:
        """The process that does something."""
        assert self._world is not None
        return self._world.running

    def _seal_fate(self, kind: str, steps: int) -> None:
        names = VICTIMS if kind == "sigstop" else (*VICTIMS, VMM)
        name = names[self._pick(kind, names)]
        stops_s = None
        if kind == "sigstop":
            stops_s = self._for_how_long(kind)
        assert self._world is not None
        for thread in self._world.threads:
            if thread.name == name and not thread.over and thread.fate is None:
                thread.fate = Fate(thread.taken + 1 + steps, stops_s)
                self._sealed.append((kind, thread))

    def _pick(self, kind: str, labels: Sequence[str]) -> int:
        assert self._world is not None
        touches = {Touch((FAULT, kind), False)}
        if kind not in self._asked:  # whoever does something does it behind this
            touches = {Touch((FAULT, kind), True)}.union(*(thread.state for thread in self._world.threads))
        return self._world.pick(f"fault {kind}", labels, touches)


def _ordinals(first: int, size: int) -> str:
    """Opportunities first, first + 1, ... from 0 on, for people."""
    return f"at its {first + 1}." if size == 1 else f"at its {first + 1}. to {first + size}."
