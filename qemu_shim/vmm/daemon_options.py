"""Options of the daemons that a run starts: `--kvmd '--no-pml' --iommufdd '--premap-pages 8'`.

What a run counts depends on them as on its parameters, so they are part of its name wherever it is kept.
They are carried as the text of a command line, the same for the same words, and come after what a scenario or
a workload itself starts its daemons with, so that they win.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from functools import partial

from protocol.started_with import options_in
from qemu_shim.vmm.daemons import DAEMONS, DaemonSpec

# How to see more of what went wrong.
TRACED = "--kvmd '--trace FILE' writes what led to it (--iommufdd and --device-sim take it too)"

Texts = Mapping[str, str]  # by the daemon's name


def add_daemon_options(parser: argparse.ArgumentParser, **default: object) -> None:
    for spec in DAEMONS:
        parser.add_argument(
            f"--{spec.command}",
            dest=_dest(spec),
            type=partial(_argument, spec),
            metavar="'--OPTION ...'",
            help=f"options for the {spec.command} that is started; part of what the result is named by",
            **default,  # type: ignore[arg-type]
        )


def joined(argv: Sequence[str]) -> list[str]:
    """`--kvmd '--no-pml'` as `--kvmd=--no-pml`, because argparse takes a word with dashes for an option."""
    names = {f"--{spec.command}" for spec in DAEMONS}
    words, left = [], list(argv)
    while left:
        word = left.pop(0)
        words.append(f"{word}={left.pop(0)}" if word in names and left else word)
    return words


def given(options: argparse.Namespace) -> dict[str, str]:
    """Those that were given, none of them empty."""
    return {spec.name: text for spec in DAEMONS if (text := getattr(options, _dest(spec), None))}


def canonical(name: str, text: str) -> str:
    """The same words in the same text.  ValueError: no words of a shell; LookupError: no such daemon, or an
    option that is the supervisor's to give.
    """
    spec = next((spec for spec in DAEMONS if spec.name == name), None)
    if spec is None:
        raise LookupError(f"there is no daemon {name!r}, only {', '.join(spec.name for spec in DAEMONS)}")
    words = shlex.split(text)
    ours = [option for option, _ in spec.sockets]
    for word in words:
        option = word.partition("=")[0]
        if any(option.startswith("--") and name.startswith(option) for name in ours):
            raise LookupError(f"{word}: whoever starts {spec.command} says where its sockets are")
    return shlex.join(words)


def merged(fixed: Mapping[str, Sequence[str]], texts: Texts) -> dict[str, list[str]]:
    """What each daemon is started with."""
    return {
        spec.name: [*fixed.get(spec.name, ()), *shlex.split(texts.get(spec.name, ""))] for spec in DAEMONS
    }


def lacking(needed: Mapping[str, Sequence[str]], started: Mapping[str, Sequence[str]]) -> str:
    """What `needed` has and daemons that were `started` with those options have not; empty: nothing."""
    missing = {
        spec.command: [
            option
            for option in options_in(needed.get(spec.name, ()))
            if not any(_serves(has, option) for has in started[spec.name])
        ]
        for spec in DAEMONS
    }
    return "; ".join(f"start {name} with {' '.join(lost)}" for name, lost in missing.items() if lost)


def _serves(has: str, option: str) -> bool:
    """The same; of a count of something, more."""
    (name, _, count), (wanted, _, least) = has.partition(" "), option.partition(" ")
    more = count.isdecimal() and least.isdecimal() and int(count) >= int(least)
    return has == option or (name == wanted and more)


def as_said(texts: Texts) -> str:
    """As a command says them, each with a blank before it; nothing of nothing."""
    return "".join(
        f" --{spec.command} {shlex.quote(texts[spec.name])}" for spec in DAEMONS if texts.get(spec.name)
    )


def _dest(spec: DaemonSpec) -> str:
    return f"{spec.name}_options"


def _argument(spec: DaemonSpec, text: str) -> str:
    try:
        return canonical(spec.name, text)
    except (ValueError, LookupError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
