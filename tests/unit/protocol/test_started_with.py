"""What a daemon says it was started with: one string an option, and no path."""

from __future__ import annotations

from pathlib import Path

from protocol.started_with import Parser, options_in


def test_an_option_and_its_value_are_one_string_however_they_were_said() -> None:
    assert options_in(["--devices", "4", "--unit=1:no-psi", "--no-pri"]) == [
        "--devices 4",
        "--unit 1:no-psi",
        "--no-pri",
    ]
    assert options_in([]) == []


def test_where_files_lie_is_not_told() -> None:
    parser = Parser()
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--devices", type=int)
    assert parser.started_with(["--socket", "/run/x", "--devices", "2", "--socket=/run/y"]) == (
        "--devices 2",
    )
