"""Wires for every test of the transport that asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.protocol.wires import Wires, wires


@pytest.fixture
def wire() -> Iterator[Wires]:
    with wires() as made:
        yield made
