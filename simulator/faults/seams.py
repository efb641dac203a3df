"""Where faults are met: methods of the product, and of the kernel in memory, wrapped while some are on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

from device_sim.core.context_tables import ContextTables
from device_sim.core.function import DmaRange, Function
from device_sim.core.iotlb import Iotlb
from device_sim.core.pri import PageRequestInterface
from device_sim.core.prq import PrqWriter
from device_sim.core.traits import InvalidateCompletion
from iommufdd.core.intel_iommu import IntelIommu
from kvmd.core.mm.frames import Frames
from kvmd.core.mm.locked import LockedVm
from protocol.errors import UapiError
from protocol.hw.prq import PageRequest
from protocol.hw.qi import ALL_PAGES
from protocol.kernel.port import Kernel, Mapping, Poller, SharedEvent, StreamSocket
from protocol.pt.table_pool import TablePool
from protocol.rpc import fence
from protocol.units import IovaPfn
from simulator.faults.plan import VMM, Faults
from simulator.faults.store_buffer import Word
from simulator.kernel.fds import FdTable
from simulator.kernel.files import OpenFile, StreamEnd, oserror
from simulator.kernel.mapping import SimMapping
from simulator.kernel.process import SimEvent, SimPoller, SimProcess, SimSocket
from simulator.world.memory import TAGS, FramesView, StructuresView, Words
from simulator.world.process import Io

Around = Callable[..., Any]  # (faults, what is wrapped, its arguments)
FAILING: dict[tuple[type, str, str], Around] = {}  # by whose, which method, and the kind
NOTED = ""  # in place of a kind: nothing fails there, and what some come to is noted whatever is on


def _seam(owner: type, name: str, kind: str) -> Callable[[Around], Around]:
    def put(around: Around) -> Around:
        FAILING[owner, name, kind] = around
        return around

    return put


@contextmanager
def injected(faults: Faults) -> Iterator[None]:
    """Inside, faults of its kinds are met.  Enter it last: what watches the product must see them."""
    on = {seam: around for seam, around in FAILING.items() if seam[-1] in (NOTED, *faults.kinds)}
    before = {(owner, name): vars(owner)[name] for owner, name, _ in on}
    lock: Any = fence._LOCK
    for (owner, name, _), around in on.items():
        setattr(owner, name, _wrapped(faults, vars(owner)[name], around))
    if "store-buffer" in faults.kinds:
        vars(fence)["_LOCK"] = _Locked(faults)
    try:
        yield
    finally:
        vars(fence)["_LOCK"] = lock
        for (owner, name), original in before.items():
            setattr(owner, name, original)


def _wrapped(faults: Faults, original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @wraps(original)
    def method(*args: Any, **named: Any) -> Any:
        return around(faults, original, *args, **named)

    return method


# -- caches forget ---------------------------------------------------------------------------------------


@_seam(Iotlb, "lookup", "evict")
def _lookup(faults: Faults, original: Any, iotlb: Iotlb, did: int, page: IovaPfn, need: int) -> Any:
    if faults.due("evict"):
        iotlb.invalidate_pages(did, page, 1, leaves_only=True)
    return original(iotlb, did, page, need)


@_seam(Iotlb, "lookup_table", "evict")
def _lookup_table(faults: Faults, original: Any, iotlb: Iotlb, did: int, page: IovaPfn, need: int) -> Any:
    if faults.due("evict"):
        iotlb.invalidate_pages(did, page, 1, leaves_only=False)
    return original(iotlb, did, page, need)


@_seam(ContextTables, "second_stage", "evict")
def _second_stage(faults: Faults, original: Any, tables: ContextTables, rid: int) -> Any:
    if faults.due("evict"):
        tables._contexts.clear()
        tables._pasids.clear()
    return original(tables, rid)


@_seam(Function, "accessible", "evict")
def _accessible(faults: Faults, original: Any, function: Function, dma: DmaRange) -> Any:
    """Before an access begins: it is not in the middle of anything."""
    if faults.due("evict"):
        function.devtlb.invalidate(IovaPfn(0), ALL_PAGES)
    return original(function, dma)


# -- nothing is left -------------------------------------------------------------------------------------


@_seam(FdTable, "install", "enomem")
def _install(faults: Faults, original: Any, table: FdTable, file: OpenFile) -> Any:
    if table.name != VMM and faults.due("enomem"):
        raise oserror(errno.EMFILE)
    return original(table, file)


@_seam(SimPoller, "register", "enomem")
def _register(faults: Faults, original: Any, poller: SimPoller, fd: int, events: int) -> Any:
    """Each watched fd costs memory, and a user may have so many [epoll(7) max_user_watches]."""
    if poller.process.name != VMM and faults.due("enomem"):
        raise oserror(errno.ENOSPC)
    return original(poller, fd, events)


@_seam(SimProcess, "memfd", "enomem")
def _memfd(faults: Faults, original: Any, process: SimProcess, *args: Any, **named: Any) -> Any:
    if process.name != VMM and faults.due("enomem"):
        raise oserror(errno.ENOMEM)
    return original(process, *args, **named)


@_seam(SimProcess, "map_peer", "enomem")
def _map_peer(faults: Faults, original: Any, process: SimProcess, *args: Any, **named: Any) -> Any:
    if process.name != VMM and faults.due("enomem"):
        raise oserror(errno.ENOMEM)
    return original(process, *args, **named)


@_seam(Frames, "allocate", "enomem")
@_seam(TablePool, "allocate", "enomem")
@_seam(LockedVm, "charge", "enomem")
def _allocate(faults: Faults, original: Any, *args: Any) -> Any:
    if faults.due("enomem"):
        raise UapiError(errno.ENOMEM, "there is nothing left")
    return original(*args)


@_seam(PrqWriter, "_store", "full")
def _store(faults: Faults, original: Any, queue: PrqWriter, request: PageRequest) -> Any:
    return False if faults.is_full() else original(queue, request)


# -- a device is late ------------------------------------------------------------------------------------


@_seam(Function, "invalidate_translations", "ite")
def _invalidate(faults: Faults, original: Any, function: Function, start: IovaPfn, npages: int) -> Any:
    if not faults.due("ite"):
        return original(function, start, npages)
    traits = function.traits
    if faults.never:
        faults.is_silent = True
        function.traits = replace(traits, invalidate_completion=InvalidateCompletion.NEVER)
        return original(function, start, npages)
    function.traits = replace(traits, invalidate_completion=InvalidateCompletion.LATE)
    try:
        return original(function, start, npages)
    finally:
        function.traits = traits


@_seam(IntelIommu, "_take_off", NOTED)
def _take_off(faults: Faults, original: Any, unit: IntelIommu, rid: int) -> Any:
    faults.is_off_bus = True
    return original(unit, rid)


@_seam(PageRequestInterface, "respond", NOTED)
def _respond(faults: Faults, original: Any, pri: PageRequestInterface, *args: Any) -> None:
    could_ask = pri.enabled
    original(pri, *args)
    faults.asks_no_more |= could_ask and not pri.enabled and faults.excuses


# -- a channel breaks ------------------------------------------------------------------------------------


@_seam(SimSocket, "recvmsg_into", "hangup")
def _recvmsg_into(faults: Faults, original: Any, sock: SimSocket, *args: Any, **named: Any) -> Any:
    """A receive fails, so this process hangs up, and the other one hears of that like of any hang-up."""
    if faults.due("hangup", sock._end.name):
        raise oserror(errno.ECONNRESET)
    return original(sock, *args, **named)


# -- a message is late -----------------------------------------------------------------------------------


@_seam(StreamEnd, "send", "delay")
def _send(faults: Faults, original: Any, end: StreamEnd, *args: Any) -> Any:
    peer = end.peer
    before = 0 if peer is None else peer.pieces
    sent = original(end, *args)
    if peer is not None and not peer.is_late and faults.due("delay", peer.name):
        faults.delay(peer, before)
    return sent


# -- stores are seen late --------------------------------------------------------------------------------


def _word(words: Words, where: Any) -> Word:
    """Or several, where a slice is meant; `words` looks into a memory by `World.access` of it."""
    access: Any = words._access
    first, behind = (where, where + 1) if isinstance(where, int) else where.indices(len(words))[:2]
    return Word(access.args[0], words._at + first * words._size, (behind - first) * words._size)


@_seam(Words, "__setitem__", "store-buffer")
def _store_word(faults: Faults, original: Any, words: Words, where: Any, value: Any) -> None:
    buffer = faults.buffer
    if buffer is None or faults.running != buffer.owner:
        original(words, where, value)
        return
    word = _word(words, where)
    if isinstance(where, int) and word.memory.made_as != TAGS and faults.buffers():
        buffer.store(
            word,
            value,
            lambda: words._access(word.at, word.size, True),
            lambda: words._words.__setitem__(where, value),
        )
        return
    buffer.drain()
    original(words, where, value)


@_seam(Words, "__getitem__", "store-buffer")
def _load_word(faults: Faults, original: Any, words: Words, where: Any) -> Any:
    buffer = faults.buffer
    if buffer is None:
        return original(words, where)
    word = _word(words, where)
    if faults.running == buffer.owner:
        if isinstance(where, int) and (forwarded := buffer.forwarded(word)) is not None:
            return forwarded
        buffer.settle(word)
        return original(words, where)
    loaded = original(words, where)
    buffer.seen_by(faults.running, word)
    return loaded


def _drains(faults: Faults, original: Any, *args: Any, **named: Any) -> Any:
    if faults.buffer is not None and faults.running == faults.buffer.owner:
        faults.buffer.drain()
    return original(*args, **named)


_NO_CALLS = {"monotonic_ns", "wall_ns", "event_of", "fileno", "detach", "fd", "view"}
"""Of the port: what its methods do without the kernel, or in the vDSO."""

_PORTS: dict[type, type] = {
    SimProcess: Kernel,
    SimSocket: StreamSocket,
    SimPoller: Poller,
    SimEvent: SharedEvent,
    SimMapping: Mapping,
}
_CALLS = [
    (owner, name)
    for owner, port in _PORTS.items()
    for name in vars(port)
    if not name.startswith("_") and name not in _NO_CALLS
]

for _owner, _name in (
    *_CALLS,
    (StructuresView, "__setitem__"),
    (StructuresView, "__bytes__"),
    (FramesView, "__setitem__"),
    (Words, "release"),
    (Io, "get_events"),
):
    _seam(_owner, _name, "store-buffer")(_drains)


@_seam(FramesView, "__getitem__", "store-buffer")
def _slice_of_frames(faults: Faults, original: Any, view: FramesView, where: slice) -> Any:
    """Which may be stored to, and nobody hears of it."""
    if view.readonly:
        return original(view, where)
    return _drains(faults, original, view, where)


@_seam(SimProcess, "die", "store-buffer")
def _die(faults: Faults, original: Any, process: SimProcess) -> None:
    if faults.buffer is not None and process.name == faults.buffer.owner:
        faults.buffer.make_all()
    original(process)


class _Locked:
    """Instead of the lock that a full fence takes."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def __enter__(self) -> None:
        _drains(self._faults, lambda: None)

    def __exit__(self, *_: object) -> None: ...
