"""Options of the daemons as text: one spelling for the same words, after what the workload gives."""

from __future__ import annotations

import argparse

import pytest

from qemu_shim.vmm.daemon_options import (
    add_daemon_options,
    as_said,
    canonical,
    given,
    joined,
    lacking,
    merged,
)


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--kvmd", "--no-pml"], {"kvmd": "--no-pml"}),
        (["--kvmd=--no-pml"], {"kvmd": "--no-pml"}),
        (["--device-sim", "--devices 2  --no-pri"], {"device_sim": "--devices 2 --no-pri"}),
        (["--iommufdd", "--may-fault '6a:01.0'"], {"iommufdd": "--may-fault 6a:01.0"}),
        (["--kvmd", "", "--iommufdd", "  "], {}),
        ([], {}),
    ],
)
def test_a_word_with_dashes_is_taken_as_the_options_it_stands_for(
    argv: list[str], options: dict[str, str]
) -> None:
    parser = argparse.ArgumentParser()
    add_daemon_options(parser)
    assert given(parser.parse_args(joined(argv))) == options


def test_what_is_said_is_read_back_as_the_same() -> None:
    texts = {"iommufdd": "--may-fault 'a b'", "kvmd": "--no-pml"}
    assert as_said(texts) == """ --kvmd --no-pml --iommufdd '--may-fault '"'"'a b'"'"''"""
    assert as_said({}) == ""
    assert canonical("iommufdd", texts["iommufdd"]) == texts["iommufdd"]


def test_they_come_after_the_workloads_own_so_that_they_win() -> None:
    assert merged({"kvmd": ("--ram", "1G")}, {"kvmd": "--ram 2G"}) == {
        "kvmd": ["--ram", "1G", "--ram", "2G"],
        "device_sim": [],
        "iommufdd": [],
    }


@pytest.mark.parametrize("text", ["--socket x", "--socket=x", "--sock x", "--kvmd x", "--device x"])
def test_where_sockets_are_is_not_theirs_to_say(text: str) -> None:
    with pytest.raises(LookupError, match="whoever starts iommufdd says where its sockets are"):
        canonical("iommufdd", text)


def test_what_running_daemons_lack_is_named_with_the_command_that_wants_it() -> None:
    started: dict[str, list[str]] = {
        "kvmd": [],
        "iommufdd": ["--fault-policy trust"],
        "device_sim": ["--devices 2"],
    }
    needed = {"device_sim": ("--devices", "2", "--no-pri"), "iommufdd": ("--fault-policy", "trust")}
    assert lacking(needed, started) == "start device-sim with --no-pri"
    assert lacking({}, started) == ""
    for devices, lost in ((1, ""), (2, ""), (3, "start device-sim with --devices 3")):
        assert lacking({"device_sim": ("--devices", str(devices))}, started) == lost
