"""Every planted bug by its id, and the one that is on in this interpreter.

A plant is a mistake that was made, or could be: a race of docs/invariants.md, a defect of the series, a fault
that our own code had.  Nothing of the product knows of them; the simulator, the tests and
`python -m simulator.planted` put one in.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from simulator.planted.device_sim import SILICON
from simulator.planted.edges import EDGES
from simulator.planted.iommufdd_areas import IOMMUFDD_AREAS
from simulator.planted.iommufdd_driver import IOMMUFDD_DRIVER
from simulator.planted.iommufdd_objects import IOMMUFDD_OBJECTS
from simulator.planted.iommufdd_pages import IOMMUFDD_PAGES
from simulator.planted.kvmd_exports import KVMD_EXPORTS
from simulator.planted.kvmd_memory import KVMD_MEMORY
from simulator.planted.kvmd_process import KVMD_PROCESS
from simulator.planted.kvmd_tdp import KVMD_TDP
from simulator.planted.plant import Plant


class UnknownPlant(KeyError):
    """With the nearest ids there are."""

    def __str__(self) -> str:
        return str(self.args[0])


_ALL = (
    *(*KVMD_TDP, *KVMD_MEMORY, *KVMD_PROCESS, *KVMD_EXPORTS),
    *(*IOMMUFDD_DRIVER, *IOMMUFDD_OBJECTS, *IOMMUFDD_AREAS, *IOMMUFDD_PAGES),
    *(*SILICON, *EDGES),
)
PLANTED: Mapping[str, Plant] = {plant.id: plant for plant in _ALL}

_on: list[Plant] = []


def plant_of(name: str) -> Plant:
    """Raises UnknownPlant."""
    try:
        return PLANTED[name]
    except KeyError:
        near = difflib.get_close_matches(name, PLANTED, n=5, cutoff=0.3)
        said = f"there are {', '.join(near)}" if near else "--list says which there are"
        raise UnknownPlant(f"no planted bug is called {name!r}; {said}") from None


def current() -> str | None:
    """The id of the one that is on."""
    return _on[0].id if _on else None


@contextmanager
def planted(name: str) -> Iterator[Plant]:
    """The mistake is in inside, and out again behind it.  UnknownPlant; RuntimeError: one is in already."""
    plant = plant_of(name)
    if _on:
        raise RuntimeError(f"{_on[0].id} is planted already: one mistake at a time")
    with plant.apply():
        _on.append(plant)
        try:
            yield plant
        finally:
            _on.remove(plant)
