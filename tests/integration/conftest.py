"""One set of daemons for all tests that leave them as they found them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from qemu_shim.vmm.machine import Host, connect_host
from tests.kit.daemons import TRUSTING, System, system
from tests.kit.vmm import accepted, nothing_left


@pytest.fixture(scope="session")
def shared_system() -> Iterator[System]:
    """Every one of these daemons must end with status 0 after all tests."""
    with system({**TRUSTING, "device_sim": ["--devices", "4"]}) as running:
        yield running


@pytest.fixture
async def host(shared_system: System) -> AsyncIterator[Host]:
    """The shared daemons; the test must leave nothing in them."""
    async with connect_host(shared_system.directory) as connected:
        await accepted(connected)
        yield connected
        await nothing_left(connected)
