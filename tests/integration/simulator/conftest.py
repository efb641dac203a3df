"""What a machine leaves behind in one test is not looked at for garbage in all later ones.

Something that nobody has found yet holds a machine that was cut off (its World and three processes), so each
of the two collections with which a machine ends took longer than those of the machine before.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _left_behind() -> Iterator[None]:
    yield
    gc.collect()
    gc.freeze()
