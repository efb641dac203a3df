"""Where the structures of a unit lie in memory: nothing is judged by it, people want to read of them."""

from __future__ import annotations

from typing import Any

from iommufdd.core.intel_iommu import QUEUE_BYTES, UnitMemory
from iommufdd.core.inval_queue import STATUS_BYTES
from iommufdd.core.translation_tables import TranslationTables
from protocol.hw.context_entry import ContextEntry, PasidDirEntry, RootEntry, context_index
from protocol.hw.pasid_entry import PASID_ENTRY_SIZE
from protocol.hw.prq import PAGE_REQUEST_SIZE
from protocol.hw.qi import DESCRIPTOR_SIZE
from protocol.units import PAGE_SIZE, Hpa
from simulator.ghost.probes.watch import Seams, Structure, Watch

seams = Seams()
_DESCRIPTOR = "invalidation descriptor"


@seams.around(UnitMemory, "__init__")
def _unit_memory(watch: Watch, original: Any, memory: UnitMemory, *args: Any, **named: Any) -> None:
    original(memory, *args, **named)
    unit = f"unit {sum(it.what.endswith(_DESCRIPTOR) for it in watch.structures)}"
    status_at = memory.queues_at + QUEUE_BYTES - PAGE_SIZE
    _page(watch, memory.ring_at, DESCRIPTOR_SIZE, f"{unit} {_DESCRIPTOR}")
    _page(watch, memory.tables._root, RootEntry.SIZE, f"{unit} root entry, bus")
    _page(watch, status_at, STATUS_BYTES, f"{unit} status of wait")
    watch.structures.append(Structure(memory.queues_at, status_at, PAGE_REQUEST_SIZE, f"{unit} page request"))


@seams.around(TranslationTables, "add_function")
def _add_function(watch: Watch, original: Any, tables: TranslationTables, rid: int, **may: bool) -> None:
    made: list[int] = []
    allocate = tables._allocate

    def allocated() -> Hpa:
        made.append(page := allocate())
        return page

    tables._allocate = allocated
    try:
        original(tables, rid, **may)
    finally:
        tables._allocate = allocate
    directory = next(
        page for page in made if page not in (*tables._contexts.values(), tables._pasid_tables[rid])
    )
    _page(watch, directory, PasidDirEntry.SIZE, f"function {rid:#x} PASID directory entry")
    bus, upper = rid >> 8, context_index(rid)[0]
    _page(watch, tables._contexts[bus, upper], ContextEntry.SIZE, f"bus {bus:#x} context entry")
    _page(watch, tables._pasid_tables[rid], PASID_ENTRY_SIZE, f"function {rid:#x} PASID entry")


def _page(watch: Watch, at: int, entry_bytes: int, what: str) -> None:
    watch.structures.append(Structure(at, at + PAGE_SIZE, entry_bytes, what))
