"""For all tests: the ids they carry, the bug that is planted, how hypothesis searches, and what is garbage.

No deadline, because machines are shared and no test asserts an absolute time; the same examples each
time in CI, so that a red run means a change, and new ones everywhere else.
"""

from __future__ import annotations

import gc
import os

from hypothesis import HealthCheck, settings

from tests.patience import WHOLE_TEST_S
from tests.planted.plugin import plant, pytest_addoption, pytest_configure
from tests.rfc.plugin import pytest_collection_modifyitems
from tests.told import pytest_terminal_summary

__all__ = [
    "plant",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_terminal_summary",
]

os.environ.setdefault("PYTEST_TIMEOUT", str(int(WHOLE_TEST_S)))  # pytest-timeout reads it there

settings.register_profile(
    "project",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")


def pytest_collection_finish() -> None:
    """Tests and modules stay to the end: no collection looks at them again, and each simulated machine has
    two of its own."""
    gc.collect()
    gc.freeze()
