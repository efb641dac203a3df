"""pytest's side of the planted bugs: `--plant ID` puts one into this interpreter and every Python it starts.

A test that plants one by itself takes the fixture `plant`, and is skipped under the option: there is one
mistake at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from simulator.planted.registry import UnknownPlant, current, planted

CHILD = Path(__file__).with_name("child")
PLANT_ENV = "TDP_SHARE_PLANT"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plant", metavar="ID", help="run with this bug in the product (simulator.planted)")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--plant")
    if not name:
        return
    on = ExitStack()
    try:
        on.enter_context(planted(name))
    except UnknownPlant as error:
        raise pytest.UsageError(str(error)) from None
    config.add_cleanup(on.close)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(CHILD) + (os.pathsep + path if path else "")
    os.environ[PLANT_ENV] = name


Plants = Callable[[str], None]


@pytest.fixture
def plant() -> Iterator[Plants]:
    """Puts a bug in, until the test is over."""
    if (name := current()) is not None:
        pytest.skip(f"it plants a bug itself, and {name} is in")
    with ExitStack() as on:
        yield lambda name: _enter(on, name)


def _enter(on: ExitStack, name: str) -> None:
    on.enter_context(planted(name))
