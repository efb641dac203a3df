"""RLIMIT_MEMLOCK: two counts with one limit, exact at its edge, and that a mirror's pins are charged once."""

from __future__ import annotations

import errno

import pytest

from kvmd.core.mm.hmm import Mirror
from kvmd.core.mm.locked import LockedVm
from protocol.errors import UapiError
from tests.kit.importer import HandLease
from tests.unit.kvmd.mm.mirrors import MirroredPages


def test_the_limit_is_reached_and_not_passed_and_what_is_refused_is_not_charged() -> None:
    locked = LockedVm("the user", 4)
    locked.charge(3)
    with pytest.raises(UapiError, match="the user has 3 pages pinned, of 4") as caught:
        locked.charge(2)
    assert (caught.value.errno, locked.pages) == (errno.ENOMEM, 3)
    locked.charge(1)
    locked.uncharge(4)
    locked.charge(4)
    LockedVm("the user", None).charge(1 << 40)


def test_more_is_never_given_back_than_was_charged() -> None:
    locked = LockedVm("the user", None)
    locked.charge(1)
    with pytest.raises(AssertionError, match="2 pages uncharged of 1"):
        locked.uncharge(2)


def test_a_mirror_charges_whom_it_registered_and_nobody_else() -> None:
    rig = MirroredPages()
    other = Mirror(rig.mm)
    rig.run(other.register(rig.importer, HandLease(), "mm"))
    rig.pin(0, 3)
    rig.run(other.pin(rig.at(0), 4096, write=True))
    assert (rig.memory.locked.pages, rig.mm.locked.pages, rig.mm.pinned_pages) == (3, 1, 4)
    rig.unpin(0, 1)
    rig.do(other.close())
    assert (rig.memory.locked.pages, rig.mm.locked.pages, rig.mm.pinned_pages) == (2, 0, 2)
