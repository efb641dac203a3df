"""A daemon that notes when a fault passes by: its own main, with a few functions wrapped first.

Only for the breakdown of the fault figure; the figure itself is measured on daemons that are left alone.
All processes of a host read the same clock, so a stage may begin in one daemon and end in another.  The
stamps, nanoseconds by name and in order, are written to a file when the daemon stops.

    python -m bench.ours.staged DAEMON-OPTIONS... --stamps DAEMON FILE
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce, wraps
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from qemu_shim.vmm.daemons import DAEMONS, DaemonSpec

OPTION = "--stamps"

# Where a stamp is taken: "module:Class.method", the stamp on entry, the stamp on return ("" for none).
POINTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "device_sim": (
        ("device_sim.core.function:Function._translate_missing", "look", "looked"),
        ("device_sim.core.pri:PageRequestInterface.request", "miss", ""),
        ("device_sim.unit_port:TurnEvent.flush", "interrupt", ""),
        ("device_sim.core.function:Function.page_response", "response", ""),
    ),
    "iommufdd": (
        ("iommufdd.core.iopf:Iopf.prq_event", "requests", ""),
        ("iommufdd.kvm_client:KvmTdp.fault", "ask", "answered"),
        ("iommufdd.unit_port:UnitPort.flush", "responded", ""),
    ),
    "kvmd": (
        ("kvmd.core.export.importer:Importer.fault", "fault", "fixed"),
        ("kvmd.core.slots.memslot:Memslots.find", "slot", "slot found"),
        ("kvmd.core.mm.mm:Mm.get_user_page", "host page", "host page there"),
        ("kvmd.core.tables.tdp_mmu:map_page", "map", "mapped"),
    ),
}

Stamps = dict[str, list[int]]


def staged(spec: DaemonSpec) -> DaemonSpec:
    """The same daemon, started through this module."""
    return replace(spec, module=__name__ if __name__ != "__main__" else "bench.ours.staged")


def options(spec: DaemonSpec, directory: Path) -> list[str]:
    """What its command line needs besides its own options, at the end."""
    return [OPTION, spec.name, str(directory / spec.name)]


def read(directory: Path) -> dict[str, Stamps]:
    """Daemon -> its stamps, once all of them have stopped."""
    return {spec.name: json.loads((directory / spec.name).read_text(encoding="ascii")) for spec in DAEMONS}


def main(argv: Sequence[str]) -> int:
    *own, option, daemon, file = argv
    assert option == OPTION, f"{option!r}"
    stamps: Stamps = defaultdict(list)
    for where, entry, exit_ in POINTS[daemon]:
        _wrap(where, stamps[entry].append if entry else _ignore, stamps[exit_].append if exit_ else _ignore)
    status: int = importlib.import_module(f"{daemon}.__main__").main(own)
    Path(file).write_text(json.dumps(stamps), encoding="ascii")
    return status


def _wrap(where: str, on_entry: Callable[[int], None], on_exit: Callable[[int], None]) -> None:
    module, _, qualified = where.partition(":")
    *owners, method = qualified.split(".")  # a method of a class, or a function
    owner = reduce(getattr, owners, importlib.import_module(module))
    inner: Callable[..., Any] = getattr(owner, method)

    @wraps(inner)
    def timed(*args: Any, **kwargs: Any) -> Any:
        on_entry(perf_counter_ns())
        result = inner(*args, **kwargs)
        on_exit(perf_counter_ns())
        return result

    @wraps(inner)
    async def timed_flow(*args: Any, **kwargs: Any) -> Any:
        on_entry(perf_counter_ns())
        result = await inner(*args, **kwargs)
        on_exit(perf_counter_ns())
        return result

    setattr(owner, method, timed_flow if _is_flow(inner) else timed)


def _is_flow(function: Callable[..., Any]) -> bool:
    return bool(function.__code__.co_flags & 0x80)  # CO_COROUTINE


def _ignore(_: int) -> None: ...


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
