"""A key and a made-up archive of Debian's, for tests that fetch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.debian import MISSING, MadeUpArchive, SigningKey


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SigningKey]:
    if MISSING:
        pytest.skip(f"no {', '.join(MISSING)} on this machine")
    signing = SigningKey(tmp_path_factory.mktemp("key") / "home")
    yield signing
    signing.close()


@pytest.fixture(scope="session")
def strangers_key(key: SigningKey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SigningKey]:
    signing = SigningKey(tmp_path_factory.mktemp("stranger") / "home")
    yield signing
    signing.close()


@pytest.fixture
def made_up(key: SigningKey, tmp_path: Path) -> MadeUpArchive:
    return MadeUpArchive(tmp_path / "debian", key)
