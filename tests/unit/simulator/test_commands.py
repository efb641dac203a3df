"""What the simulator's commands say of themselves."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable

import pytest

from simulator import clean, command, exhausted, hunting


@pytest.mark.parametrize("parser", [module._parser for module in (clean, command, exhausted, hunting)])
def test_each_option_says_what_it_is(parser: Callable[[], ArgumentParser]) -> None:
    assert [action.dest for action in parser()._actions if not action.help] == []
