"""Scenarios of a user's file: `FILE.py`, or `FILE.py:NAME` where it has several.

The file is imported as it would be by a script beside it.  Its scenarios are the Scenarios it has at its top
level; Designs there join the others (`qemu_shim/vmm/designs.py`).
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar

from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.vmm.designs import DESIGNS, Design

T = TypeVar("T", bound="OfFile")
P = TypeVar("P", bound="OnDesigns")


class OfFile(Protocol):
    @property
    def name(self) -> str: ...


class OnDesigns(OfFile, Protocol):
    @property
    def designs(self) -> tuple[str, ...]: ...


class BadFile(LookupError):
    """The file cannot be played; the message says which, why, and what to do."""


def is_file(name: str) -> bool:
    """Whether it names a file and not a scenario of the library."""
    return path_of(name).suffix == ".py"


def path_of(name: str) -> Path:
    return Path(name.partition(":")[0])


def scenario_of(name: str) -> Scenario:
    """The one that `FILE.py` or `FILE.py:NAME` names.  BadFile."""
    return of_file(name, (Scenario,))


def of_file(name: str, kinds: tuple[type[P], ...]) -> P:
    """Likewise, of whatever counts as a scenario to who asks.  BadFile."""
    path, _, wanted = name.partition(":")
    found = _of_kind(_played(Path(path).resolve(), path), kinds, path)
    if not found:
        raise BadFile(
            f"{path} has no scenario: put @scenario() of qemu_shim.api before the function that plays it"
        )
    if wanted and wanted not in found:
        raise BadFile(f"{path} has no scenario {wanted!r}, only {', '.join(found)}")
    if not wanted and len(found) > 1:
        raise BadFile(f"{path} has {len(found)} scenarios: say {' or '.join(f'{path}:{it}' for it in found)}")
    chosen = found[wanted] if wanted else next(iter(found.values()))
    if unknown := [design for design in chosen.designs if design not in DESIGNS]:
        raise BadFile(
            f"{path}: {chosen.name} names designs that are not there: {', '.join(unknown)}; "
            f"there are {', '.join(DESIGNS)}"
        )
    return chosen


@cache
def _played(path: Path, said: str) -> ModuleType:
    """Its designs join the others."""
    module = _imported(path, said)
    for name, design in _of_kind(module, (Design,), said).items():
        if DESIGNS.setdefault(name, design) is not design:
            raise BadFile(f"{said}: there is a design {name} already")
    return module


def _imported(path: Path, said: str) -> ModuleType:
    name = f"scenarios_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise BadFile(f"{said}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadFile(
            f"{said} cannot be imported: {_where(error, path)}{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def told(error: BaseException, name: str) -> str:
    """What went wrong in the file's own code, and where."""
    return f"{path_of(name)}: {_where(error, path_of(name).resolve())}{type(error).__name__}: {error}"


def _where(error: BaseException, path: Path) -> str:
    """The last line of the file that was being run."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    return f"line {lines[-1]}: " if lines else ""


def _of_kind(module: ModuleType, kinds: tuple[type[T], ...], said: str) -> dict[str, T]:
    """What the module itself made, by name: not what it imported from the library."""
    found: dict[str, T] = {}
    theirs = {id(it): it for it in vars(module).values() if isinstance(it, kinds)}
    for it in _not_of_the_library(theirs.values()):
        if it.name in found:
            raise BadFile(f"{said} has two of the name {it.name}")
        found[it.name] = it
    return found


def _not_of_the_library(found: Iterable[T]) -> list[T]:
    library = {id(design) for design in DESIGNS.values()}
    return [it for it in found if id(it) not in library]
