"""What a probe has to go by: the ghost, and what of the product is known to it by which name."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from types import coroutine
from typing import Any, NamedTuple

from device_sim.core.context_tables import SecondStage
from device_sim.core.function import Function
from iommufdd.core.hwpt import Hwpt
from iommufdd.core.ioas_on_demand import IoasOnDemand
from iommufdd.core.platform import Platform
from iommufdd.kvm_client import KvmTdp
from kvmd.core.lease import Lease
from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.mm import Mm
from kvmd.core.mm.space import AddressSpace
from kvmd.core.slots.dirty_log import DirtyLog
from kvmd.core.slots.memslot import Memslot, Memslots
from kvmd.core.slots.private_memory import PrivateMemory
from protocol.hw.prq import PageRequest
from protocol.units import (
    Gfn,
    Hva,
    Level,
    pages_of_level,
)
from simulator.ghost.backing import Name, Shown
from simulator.ghost.ghost import Ghost
from simulator.ghost.lent import Importing
from simulator.ghost.spans import Spans

Around = Callable[..., Any]  # (watch, what is wrapped, its arguments)

TO_FORGET = 64  # invalidations of a domain that may be under way at once


class Seams(dict[tuple[type, str], Around]):
    """By class and method: what is done around that method."""

    def around(self, owner: type, name: str) -> Callable[[Around], Around]:
        def put(around: Around) -> Around:
            self[owner, name] = around
            return around

        return put


class Structure(NamedTuple):
    """Entries side by side in memory, bytes start..end by host physical address."""

    start: int
    end: int
    entry_bytes: int
    what: str


@dataclass(slots=True)
class Trying:
    """A fault on `page`; has it met an entry that somebody froze, who waits for a flush?"""

    page: int
    met_frozen: bool = False
    changes: int = 0  # of the host's that it makes itself, as who stores to a shared page does
    mapped: int = 0  # in this step, into which root of CPUs
    is_short: bool = False  # in this step there was no page for a table

    @contextmanager
    def changing(self) -> Iterator[None]:
        """It takes something away, and waits as every change does, for flushes of others too (B-18)."""
        self.changes += 1
        try:
            yield
        finally:
            self.changes -= 1


@dataclass(slots=True)
class HugePage:
    """`fresh`: the huge block that was taken last, which nobody maps yet; what goes meanwhile it is to
    have."""

    fresh: int | None = None
    gone: dict[tuple[int, Hva], bytes] = field(default_factory=dict)  # by page table and address

    def begin(self, fresh: int | None) -> None:
        self.fresh = fresh
        self.gone.clear()


@dataclass(slots=True)
class Asked:
    """What a request wants shown, with all of `rights` that may be, from page `start` of an IOAS on; None:
    where there is room.  `pages`: which, the first of them as 0, and all that may be done to them anywhere;
    `copied`: of which pages of an IOAS, from the first to behind the last; `host`: of which of kvmd's lives
    the spaces are.
    """

    rights: int
    start: int | None
    host: int
    pages: Spans[Shown] = field(default_factory=Spans)
    copied: tuple[int, int] = 0, 0


class During:
    """Inside, `watch.NAME` says whose step it is."""

    def __init__(self, watch: Watch, name: str, whose: object) -> None:
        self._watch = watch
        self._name = name
        self._whose = whose
        self._outer: object = None

    def __enter__(self) -> None:
        self._outer = getattr(self._watch, self._name)
        setattr(self._watch, self._name, self._whose)

    def __exit__(self, *_: object) -> None:
        setattr(self._watch, self._name, self._outer)


@coroutine
def step_by_step(
    attempt: Coroutine[Any, Any, Any], within: AbstractContextManager[None]
) -> Generator[Any, Any, Any]:
    """`attempt`, each of whose steps is taken inside `within`."""
    step, given = attempt.send, None
    while True:
        with within:
            try:
                waits_for = step(given)
            except StopIteration as ended:
                return ended.value
        try:
            step, given = attempt.send, (yield waits_for)
        except BaseException as error:
            step, given = attempt.throw, error


class Watch:
    """`ghost` hears, and what of the product is known by which name.

    `now`: nanoseconds of a world's virtual time, of which none passes without one.
    """

    def __init__(self, ghost: Ghost) -> None:
        self.ghost = ghost
        self.now: Callable[[], int] = lambda: 0
        self.begun = 0  # things that must end
        self.trying: Trying | None = None  # whose step this is
        self.asked: Asked | None = None  # by the request whose step this is
        self.host = 0  # which of kvmd's lives this is
        self.pages_of: dict[Name, Spans[Shown]] = {}  # by IOAS: what it shows, and all that may be done to it
        self.flushing = Counter[int]()  # by VM, flushes that not all have acked
        self.private_of: dict[int, PrivateMemory] = {}  # by its slots
        self.asked_private: dict[int, Spans[Shown]] = {}  # by private memory: gfns that are to be
        self.slots_of: dict[int, Memslots] = {}  # by its attributes
        self.vm_of: dict[int, int] = {}  # id of its slots, its pinned gfns -> VM
        self.kept: list[object] = []  # whose ids are in use here
        self.names: dict[int, str] = {}
        self.processes: list[AddressSpace] = []
        self.on_demand: list[IoasOnDemand] = []
        self.mm_of: dict[int, Mm] = {}  # who pays for pins of a VM, by its pinned gfns
        self.files: set[tuple[str, int]] = set()  # that iommufdd has open at a host, by number
        self.mirror_of: dict[int, Mirror] = {}  # by its pins
        self.told: dict[tuple[int, int, int], list[list[Name]]] = {}  # of changes, by mirror and addresses
        self.pool_of: dict[int, str] = {}
        self.roots: dict[str, dict[int, int]] = {}  # by what fills them: root -> pages it can translate
        self.filling: dict[tuple[int, int], int] = {}  # IOTLB, domain id -> root of the walk
        self.importers: dict[int, Importing] = {}  # by who tells them for kvmd
        self.leases: dict[int, list[Lease]] = {}  # on an export
        self._forgotten: dict[tuple[str, int], deque[tuple[int, tuple[int, int]]]] = {}
        self.dids: dict[int, set[int]] = {}
        self.leads_to: dict[int, tuple[int, int]] = {}  # by function, its PASID entry: domain id, table
        self.functions: dict[int, Function] = {}  # by device TLB
        self.logs: dict[int, DirtyLog] = {}  # by its record of stores
        self.huge = HugePage()
        self.reported: dict[int, list[tuple[int, int]]] = {}  # by its record of stores: slot, page, lately
        self.pins: dict[int, list[tuple[Name, int, int]]] = {}  # of a page: no gfn's any more, not let go of
        self.second_stages: dict[tuple[int, int], SecondStage] = {}  # by unit's tables, function: found last
        self.walked: dict[int, tuple[int, int]] = {}  # by unit: where its walk ended, and by what word
        self.structures: list[Structure] = []
        self.leading: dict[int, tuple[tuple[str, int], int]] = {}  # words of entries that lead to tables
        self.looked_for: dict[tuple[int, int], tuple[int, list[int]]] = {}  # of a group: root, pages
        self.looked_up: dict[PageRequest, int] = {}  # each by the errno that it ends with so far; 0: none
        self.orphans: dict[int, int] = {}  # by domain id: the root's name, whose maintainer or driver died
        self.hwpts: dict[int, Hwpt] = {}  # by domain id, as iommufdd has them
        self.put: list[KvmTdp] = []  # TDP FDs that were let go of
        self.gone_objects: set[int] = set()  # of an iommufd that was closed
        self.ending: set[int] = set()  # domain ids whose HWPT is being destroyed
        self.giving_back: set[int] = set()  # likewise, whose memory the units are letting go of
        self.platform: Platform | None = None  # of the iommufdd that runs
        self.plugged = False  # has the silicon a driver?
        self.over = False  # the world is being cleared away

    def name(self, thing: object, kind: str) -> str:
        """Numbered as they come."""
        if id(thing) not in self.names:
            self.kept.append(thing)
            number = sum(name.startswith(kind) for name in self.names.values())
            self.names[id(thing)] = f"{kind}{number}"
        return self.names[id(thing)]

    def to_forget(self, unit: object, did: int) -> deque[tuple[int, tuple[int, int]]]:
        """What that unit was lately told to forget of the domain: when, and pages first..behind the last."""
        return self._forgotten.setdefault((self.name(unit, "driver of unit "), did), deque(maxlen=TO_FORGET))

    def begins(self, kind: str, name: Hashable) -> None:
        self.ghost.liveness.begins(self.now(), kind, name)

    def ends(self, kind: str, name: Hashable) -> None:
        self.ghost.liveness.ends(self.now(), kind, name)

    @contextmanager
    def must_end(self, kind: str, *, or_its_daemon: bool = False) -> Iterator[None]:
        """`or_its_daemon`: who is cut off in here, in an orderly way, has ended with it; else he has not."""
        self.begun += 1
        name = self.begun
        self.begins(kind, name)
        try:
            yield
        except GeneratorExit:
            if or_its_daemon and not self.over:
                self.ends(kind, name)
            raise
        except Exception:
            self.ends(kind, name)
            raise
        self.ends(kind, name)

    def root(self, did: int, root: int) -> int:
        """What the ghost knows that domain's root by."""
        return self.orphans.get(did, root)

    def space_of(self, cookie: int) -> str | None:
        """The memory of a process, the last that was called so."""
        found = [mm for mm in self.processes if getattr(mm, "cookie", None) == cookie]
        return f"mm{found[-1].id}" if found else None

    def view(self, slots: object, as_id: int) -> Name:
        return "vm", self.vm_of[id(slots)], as_id

    def goes_by(self, slots: Iterable[Memslot], slot: Memslot, what: str) -> None:
        """Who slept looks for its slot again: an equal one that came for it logs for itself (R21)."""
        if not any(slot is there for there in slots):
            self.ghost.verdicts.say("R21", f"{what} goes by a slot that is not there any more")

    def forget_kvmd(self) -> None:
        """It died: names of its VMs and processes will be others'."""
        for view in [
            view for view in self.ghost.backing.views if isinstance(view, tuple) and view[0] == "vm"
        ]:
            del self.ghost.backing.views[view]
        self.roots.clear()
        self.flushing.clear()
        self.logs.clear()
        self.pins.clear()
        self.told.clear()
        self.processes.clear()
        self.host += 1
        for shown in self.pages_of.values():
            for start, end, was in shown:
                shown.put(start, end, replace(was, space=None))

    def settled(self) -> None:
        """Nothing is under way, and nobody has anything."""
        for log in self.logs.values():
            self.mark_told(log)
        for did, hwpt in () if self.platform is None else self.platform.hwpts.items():
            what = "" if hwpt.id else ", whose making failed"
            self.ghost.verdicts.say("R13", f"domain id {did} is taken by an HWPT that nobody has{what}")
        self.ghost.settled()

    def mark_told(self, log: DirtyLog) -> None:
        """What a report will have that is still to come, the log itself says: bits, and entries of rings."""
        stores = self.ghost.stores
        for slot in log._slots:
            view = self.view(log._slots, slot.as_id)
            for gfn in stores.untold(view):
                if gfn in slot.span:
                    stores.marked(view, gfn, on=log.tells(slot, Gfn(gfn)))


def block_of(page: int, level: Level) -> tuple[int, int]:
    """The pages of the block of `level` that has `page`."""
    size = pages_of_level(level)
    start = page - page % size
    return start, start + size
