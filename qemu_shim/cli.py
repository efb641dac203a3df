"""`qemu-shim`: bring a system up, run a scenario on it, say what it cost; look into a running one; or hand
over to the comparison of designs and to campaigns.

Exit status: 0 the scenario held and every process ended cleanly; 1 it did not; 2 the command was wrong;
130 interrupted; 141 nobody reads what it says.  Whatever happens, nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio

from protocol.daemon import configure_log, refuse_optimised
from protocol.errors import PeerError, UapiError, leaves
from protocol.options import LOG_LEVELS
from protocol.rpc.socket import START_PATIENCE_S
from qemu_shim.commands import parsers
from qemu_shim.guest.memory import OutOfGuestMemory
from qemu_shim.scenarios.files import BadFile, is_file, scenario_of, told
from qemu_shim.scenarios.measure import Report, render
from qemu_shim.scenarios.run import SEED_MAX
from qemu_shim.scenarios.runner import run_scenario
from qemu_shim.scenarios.scenario import Scenario
from qemu_shim.scenarios.series.library import SCENARIOS
from qemu_shim.study.command.campaign_options import add_options as add_campaign_options
from qemu_shim.study.command.compare_options import add_compare, add_params, param_dest
from qemu_shim.vmm.daemon_options import TRACED, add_daemon_options, given, joined, lacking, merged
from qemu_shim.vmm.daemons import DAEMONS, socket_of
from qemu_shim.vmm.designs import DESIGNS, SHARED
from qemu_shim.vmm.inspect import as_text, demo, inspect
from qemu_shim.vmm.interrupt import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NO_READER, interruptible
from qemu_shim.vmm.machine import Host, connect_host
from qemu_shim.vmm.supervisor import DaemonFailed, supervised


def main(argv: list[str] | None = None) -> int:
    refuse_optimised()
    words = sys.argv[1:] if argv is None else argv
    try:
        status = _sim(words[1:]) if words[:1] == ["sim"] else _do(_parse(argv))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        _say_no_more()
        return EXIT_NO_READER
    except OSError as error:  # a full disk behind standard output, or a file of the user's
        _say_no_more()
        print(f"qemu-shim: {error}", file=sys.stderr)
        return EXIT_FAILED
    return status


def _sim(words: list[str]) -> int:
    from simulator.command import main as sim  # it stands above us, and no other command needs it

    return sim(words)


def _say_no_more() -> None:
    """What is left to be said, Python would say at our end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _do(options: argparse.Namespace) -> int:
    if options.command == "list":
        return options.listed(as_json=options.json)  # type: ignore[no-any-return]
    if options.command == "campaign":
        from qemu_shim.study.command.campaign import campaign  # the other commands need none of it

        return campaign(options)
    configure_log("warning")
    if options.command == "inspect":
        return _inspect(options)
    if options.command == "compare":
        from qemu_shim.study.command.compare import (
            main as compare,  # what shows figures no other command waits for
        )

        return compare(options)
    scenario = _scenario(options.scenario)
    given_params = {name: getattr(options, param_dest(name)) for name in scenario.params}
    params = scenario.with_defaults({name: n for name, n in given_params.items() if n is not None})
    report = Report(scenario.name)
    finished = trio.run(_run, scenario, params, report, options)
    if not finished:
        return _interrupted(options)
    _show(report, as_json=options.json, attached=options.attach is not None)
    return EXIT_FAILED if report.problems else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    words = joined(sys.argv[1:] if argv is None else argv)
    parser, commands = parsers()
    try:
        files = {word: scenario_of(word) for word in words[1:] if is_file(word) and not word.startswith("-")}
        return _parsed(parser, commands, words, files)
    except BadFile as error:
        parser.error(str(error))


def _parsed(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    words: list[str],
    files: Mapping[str, Scenario],
) -> argparse.Namespace:
    """`files`: the scenarios of files that the command names.  BadFile."""
    _add_list(commands["list"])
    run = commands["run"]
    _add_run_options(run)
    _add_design(run, default=SHARED.name)
    add_daemon_options(run)
    scenarios = run.add_subparsers(dest="scenario", required=True, metavar="SCENARIO | FILE.py")
    for name, scenario in {**SCENARIOS, **files}.items():
        sub = scenarios.add_parser(
            name,
            help=scenario.summary,
            description=scenario.help or scenario.summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_run_options(sub, default=argparse.SUPPRESS)  # what was said before its name stays
        _add_design(sub, default=argparse.SUPPRESS)
        add_daemon_options(sub, default=argparse.SUPPRESS)
        if name in files:
            sub.add_argument("--seed", type=_bounded(0, SEED_MAX), default=1, metavar="N", help="of chance")
        add_params(sub, {name: scenario}, _bounded)
    looking = commands["inspect"]
    _add_run_options(looking)
    looking.add_argument("--vm", type=_bounded(1, 1 << 32), metavar="N", help="its number (the newest)")
    looking.add_argument(
        "--admin",
        type=Path,
        metavar="PATH",
        help="with --attach: the socket kvmd was given as --admin-socket",
    )
    looking.add_argument("--gpa", type=_bounded(0, 1 << 64), help="how this address is translated")
    add_compare(commands["compare"], _bounded, files)
    add_campaign_options(commands["campaign"], files)
    options = parser.parse_args(words)
    if options.command == "inspect" and (options.attach is None) != (options.admin is None):
        looking.error("--attach DIR and --admin PATH go together: only the administrator looks into any VM")
    if options.command == "run":
        _check_design(run, _scenario(options.scenario), options.design)
        if options.attach is not None and given(options):
            run.error("the daemons of --attach run already: give them options where they are started")
    if options.command in ("run", "inspect"):
        _check_directories(commands[options.command], options)
    return options


def _add_list(listing: argparse.ArgumentParser) -> None:
    instead = listing.add_mutually_exclusive_group()
    for what, listed, which in (
        ("workloads", _list_workloads, "the workloads instead"),
        ("designs", _list_designs, "the designs instead"),
        ("planted", _list_planted, "the bugs that `sim --plant` puts in instead"),
    ):
        instead.add_argument(
            f"--{what}",
            dest="listed",
            action="store_const",
            const=listed,
            default=_list,
            help=which,
        )
    listing.add_argument("--json", action="store_true")


def _add_design(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--design",
        choices=tuple(DESIGNS),
        default=default,
        help=f"how the device is given the guest's memory ({SHARED.name})",
    )


def _scenario(name: str) -> Scenario:
    return scenario_of(name) if is_file(name) else SCENARIOS[name]


def _check_design(parser: argparse.ArgumentParser, scenario: Scenario, design: str) -> None:
    if design not in scenario.playable:
        played = ", ".join(scenario.playable)
        parser.error(f"{scenario.name} cannot be played on design {design}; it can on: {played}")


def _check_directories(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Before anything is played, not after; comes last, because what `--dump` names is made."""
    if options.attach is not None and not options.attach.is_dir():
        parser.error(
            f"--attach {options.attach}: there is no such directory, so no daemon has a socket there"
        )
    if options.dump is None:
        return
    try:
        options.dump.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--dump {options.dump}: {error.strerror}")
    if not os.access(options.dump, os.W_OK | os.X_OK):
        parser.error(f"--dump {options.dump}: nothing can be written there")


def _add_run_options(parser: argparse.ArgumentParser, **default: Any) -> None:
    parser.add_argument(
        "--attach",
        type=Path,
        metavar="DIR",
        help="drive the daemons whose sockets are in DIR, start none",
        **default,
    )
    parser.add_argument(
        "--dump",
        type=Path,
        metavar="DIR",
        help="write the page table and what it must translate to DIR/TABLES.bin and DIR/TABLES.json",
        **default,
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text", **default)
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        help="of the daemons that are started",
        **({"default": "info"} | default),
    )


def _bounded(low: int, high: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low}..{high}")
        return value

    return parse


def _list(*, as_json: bool) -> int:
    if as_json:
        listed = [
            {
                "name": s.name,
                "summary": s.summary,
                "tags": s.tags,
                "params": _defaults(s),
                "designs": s.playable,
            }
            for s in SCENARIOS.values()
        ]
        print(json.dumps(listed))
        return 0
    for scenario in SCENARIOS.values():
        print(f"{scenario.name:<10} {scenario.summary}")
        print(f"{'':<10} plays {', '.join(scenario.tags)}; options: {', '.join(scenario.params)}")
        if len(scenario.playable) > 1:
            print(f"{'':<10} designs: {', '.join(scenario.playable)}")
    return 0


def _list_workloads(*, as_json: bool) -> int:
    from qemu_shim.study.workloads.library import WORKLOADS  # no other command needs them before it runs

    if as_json:
        listed = [{"name": w.name, "summary": w.summary, "params": _defaults(w)} for w in WORKLOADS.values()]
        print(json.dumps(listed))
        return 0
    for workload in WORKLOADS.values():
        print(f"{workload.name:<17} {workload.summary}")
        for name, param in workload.params.items():
            print(f"  {name:<15} {param.help} ({param.default}, {param.low}..{param.high})")
    return 0


def _list_designs(*, as_json: bool) -> int:
    if as_json:
        print(json.dumps([{"name": it.name, "summary": it.summary} for it in DESIGNS.values()]))
        return 0
    for design in DESIGNS.values():
        print(f"{design.name:<10} {design.summary}")
    return 0


def _list_planted(*, as_json: bool) -> int:
    from simulator.command import list_planted  # as in `_sim`

    return list_planted(as_json=as_json)


def _defaults(played: Scenario) -> dict[str, int]:
    return {name: param.default for name, param in played.params.items()}


async def _run(
    scenario: Scenario, params: dict[str, int], report: Report, options: argparse.Namespace
) -> bool:
    """False if a signal ended it.  Problems of any kind end up in the report."""

    async def play(host: Host) -> None:
        host.dumps_to = options.dump
        if options.attach is not None and (lacks := lacking(scenario.options, await host.started_with())):
            why = f"{scenario.name} cannot be shown on the daemons in {options.attach}"
            report.problems.append(f"{why}: {lacks}")
            return
        seed = getattr(options, "seed", 1)
        try:
            design, alone = DESIGNS[options.design], options.attach is None
            await run_scenario(host, scenario, design, seed, params, report, alone=alone)
        except* Exception as group:
            if not is_file(options.scenario):
                raise
            report.problems += [told(error, options.scenario) for error in leaves(group)]
        report.problems += report.ended

    return await _with_host(options, play, report.problems, merged(scenario.options, given(options)))


def _inspect(options: argparse.Namespace) -> int:
    seen: dict[str, Any] = {}
    problems: list[str] = []

    async def look(host: Host) -> None:
        async with AsyncExitStack() as stack:
            if options.attach is None:
                await stack.enter_async_context(demo(host))
            seen.update(await inspect(host, options.vm, options.gpa, options.dump))

    if not trio.run(partial(_with_host, options, look, problems, as_admin=True)):
        return _interrupted(options)
    for problem in problems:
        print(f"qemu-shim: {problem}", file=sys.stderr)
    if seen:
        print(json.dumps(seen) if options.json else "\n".join(as_text(seen)))
    return EXIT_FAILED if problems else 0


def _interrupted(options: argparse.Namespace) -> int:
    if options.attach is None:
        what = "every daemon was stopped, nothing is left"
    else:
        what = f"no daemon in {options.attach} was stopped, what we had of them is given back"
    print(f"interrupted: {what}", file=sys.stderr)
    return EXIT_INTERRUPTED


async def _with_host(
    options: argparse.Namespace,
    work: Callable[[Host], Awaitable[None]],
    problems: list[str],
    daemon_options: Mapping[str, Sequence[str]] | None = None,
    *,
    as_admin: bool = False,
) -> bool:
    """Do `work` on the daemons that run, or on some of our own, started with `daemon_options`; `as_admin`
    with kvmd's administrator's socket.  False if a signal ended it.
    """

    async def with_host() -> None:
        try:
            async with AsyncExitStack() as stack:
                directory, admin = options.attach, options.admin if as_admin else None
                supervisor = None
                if directory is not None:
                    _say_who_is_waited_for(directory)
                else:
                    supervisor = await stack.enter_async_context(
                        supervised(daemon_options or {}, log_level=options.log_level)
                    )
                    directory, admin = supervisor.directory, supervisor.admin if as_admin else None
                host = await stack.enter_async_context(connect_host(directory, admin))
                host.killer = supervisor.kill if supervisor is not None else None
                await work(host)
        except* (DaemonFailed, UapiError, PeerError, OSError, OutOfGuestMemory, LookupError) as group:
            problems.extend(str(error) for error in leaves(group))

    return await interruptible(with_host)


def _say_who_is_waited_for(directory: Path) -> None:
    """Daemons that are still starting, or that nobody starts: a minute is long without a word."""
    if missing := [spec.name for spec in DAEMONS if not socket_of(spec, directory).exists()]:
        who = f"waiting up to {START_PATIENCE_S:.0f} s for {', '.join(missing)}"
        print(f"qemu-shim: {who}: no socket of theirs is in {directory} yet", file=sys.stderr)


def _show(report: Report, *, as_json: bool, attached: bool) -> None:
    if as_json:
        print(json.dumps(report.as_json()))
        return
    for line in report.lines:
        print(line)
    if report.rows:
        print(render(report))
    for problem in report.problems:
        print(f"FAILED: {problem}")
    if report.problems:
        of_ours = "" if attached else f", {TRACED}, --log-level debug says what the daemons did"
        print(f"to see more: --dump DIR writes the tables{of_ours}")
    print(f"{report.scenario}: {'failed' if report.problems else 'ok'}")
