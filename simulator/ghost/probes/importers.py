"""Importers of a TDP FD: what kvmd tells them, and what the hardware of one beside iommufdd has cached."""

from __future__ import annotations

from typing import Any

from kvmd.core.export.importer import Importer, Registration, TdpFd
from kvmd.core.export.tdp_fd import ExportedTdp
from kvmd.core.lease import Lease
from kvmd.importers import RemoteImporter
from protocol.pt.meta import ExportedTdpMeta
from protocol.units import Gfn
from simulator.ghost import heard
from simulator.ghost.caches import Holder
from simulator.ghost.holders import IMPORTED_CACHES
from simulator.ghost.probes.watch import Seams, Watch
from simulator.ghost.spans import Translation
from simulator.world.other_driver import Kept, OtherDriver

seams = Seams()
_NO_DOMAIN = -1


def _of(name: str) -> Holder:
    return (*IMPORTED_CACHES, name)


# -- kvmd's side -------------------------------------------------------------------------------------------


@seams.around(Importer, "metadata")
def _metadata(watch: Watch, original: Any, importer: Importer) -> bytes:
    meta: bytes = original(importer)
    root = importer._tdp.exported.root.hpa
    watch.ghost.lent.describes(watch.ghost.view_of(root))
    return meta


@seams.around(Importer, "fault")
async def _fault(
    watch: Watch, original: Any, importer: Importer, mm_cookie: int, gfn: Gfn, kind: Any
) -> None:
    exported = importer._tdp.exported
    await original(importer, mm_cookie, gfn, kind)
    if mm_cookie != exported.mm.cookie:
        watch.ghost.heard.look(heard.FAULTS_IN)
        root = exported.root.hpa
        watch.ghost.faults.came(root, watch.ghost.view_of(root), gfn, watch.space_of(mm_cookie))


@seams.around(Registration, "__init__")
def _registration(
    watch: Watch, original: Any, it: Registration, tdp: TdpFd, name: str, ops: Any, lease: Lease
) -> None:
    original(it, tdp, name, ops, lease)
    watch.leases.setdefault(id(tdp.exported), []).append(lease)


@seams.around(ExportedTdp, "register_importer")
def _register(watch: Watch, original: Any, tdp: ExportedTdp, name: str, ops: Any) -> None:
    original(tdp, name, ops)
    watch.kept.append(ops)
    importing = watch.importers[id(ops)] = _of(name), watch.ghost.view_of(tdp.root.hpa)
    watch.ghost.lent.registers(importing, watch.ghost.heard.now)


@seams.around(ExportedTdp, "unregister_importer")
def _unregister(watch: Watch, original: Any, tdp: ExportedTdp, name: str, ops: Any) -> None:
    original(tdp, name, ops)
    watch.ghost.lent.unregisters(watch.importers[id(ops)])


@seams.around(RemoteImporter, "invalidate")
def _invalidate(watch: Watch, original: Any, ops: RemoteImporter, *what: int) -> Any:
    if id(ops) in watch.importers:  # a mirror of a process's memory is none
        watch.ghost.lent.tells(watch.importers[id(ops)], watch.ghost.heard.now)
    return original(ops, *what)


# -- the other driver's ------------------------------------------------------------------------------------


@seams.around(OtherDriver, "register")
async def _registered(watch: Watch, original: Any, driver: OtherDriver, meta: ExportedTdpMeta) -> None:
    await original(driver, meta)
    watch.kept.append(driver)
    watch.ghost.caches.unanswered.discard(_of(driver.name))
    watch.filling[id(driver), _NO_DOMAIN] = driver.root


@seams.around(OtherDriver, "keep")
def _keep(watch: Watch, original: Any, driver: OtherDriver, kept: Kept) -> None:
    original(driver, kept)
    root, where = watch.filling[id(driver), _NO_DOMAIN], (_of(driver.name), kept.start, kept.end)
    if kept.table:
        watch.ghost.pointer_cached(where[0], root, *where[1:], kept.table)
    else:
        watch.ghost.cached(where[0], root, *where[1:], Translation(kept.frame, kept.rights))


@seams.around(OtherDriver, "forget")
def _forget(watch: Watch, original: Any, driver: OtherDriver, *span: Any, **what: Any) -> None:
    original(driver, *span, **what)
    holder, kept = _of(driver.name), driver.kept
    watch.ghost.keeps(holder, [(each.start, each.end) for each in kept if not each.table])
    watch.ghost.keeps_pointers(holder, [(each.start, each.end) for each in kept if each.table])


@seams.around(OtherDriver, "hang_up")
def _hang_up(watch: Watch, original: Any, driver: OtherDriver) -> None:
    original(driver)
    watch.ghost.caches.unanswered.add(_of(driver.name))
