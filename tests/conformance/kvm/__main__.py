"""`python -m tests.conformance.kvm FILE...`: replay recorded answers of KVM and say where ours differ.

Exit status: 0 all that ran passed; 1 a case differs or says a word that is not known here, kvmd failed or
nothing ran; 2 bad file or argument.  A word that is not known is told by name and is no wrong answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from protocol.daemon import configure_log
from qemu_shim.vmm.supervisor import DaemonFailed
from tests.conformance.kvm.cases import BadFile, load
from tests.conformance.kvm.replay import Outcome
from tests.conformance.kvm.runner import replay_all


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        cases = [case for path in args.files for case in load(path) if args.k in case.id]
    except BadFile as error:
        print(error, file=sys.stderr)
        return 2
    report = _silent if args.json else _loud if args.verbose else _brief
    try:
        outcomes = trio.run(replay_all, cases, args.kvmd_option, report)
    except DaemonFailed as error:
        print(error, file=sys.stderr)
        return 1
    counts = {
        "passed": sum(outcome.passed for outcome in outcomes),
        "failed": sum(bool(outcome.differences) for outcome in outcomes),
        "skipped": sum(bool(outcome.skipped) for outcome in outcomes),
    }
    if unknown := sum(bool(outcome.unknown) for outcome in outcomes):
        counts["not understood"] = unknown
    if args.json:
        print(json.dumps({**counts, "cases": [_as_json(outcome) for outcome in outcomes]}, indent=1))
    else:
        print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 0 if counts["passed"] and not counts["failed"] and not unknown else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.kvm", description="replay recorded answers of KVM"
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("-k", default="", metavar="SUBSTRING", help="only cases whose file:name has it")
    parser.add_argument("-v", "--verbose", action="store_true", help="name every case, show every difference")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.add_argument(
        "--kvmd-option", action="append", default=[], metavar="OPTION", help="one more argument for kvmd"
    )
    return parser


def _silent(outcome: Outcome) -> None:
    pass


def _brief(outcome: Outcome) -> None:
    """The first difference of a case: the rest may follow from it."""
    if outcome.unknown:
        print(f"NOT UNDERSTOOD {outcome.case.id}: {outcome.unknown}", flush=True)
    if outcome.differences:
        print(f"FAILED {outcome.case.id}: {outcome.differences[0]}", flush=True)
        if len(outcome.differences) > 1:
            print(f"       and {len(outcome.differences) - 1} more differences: -v shows them", flush=True)


def _loud(outcome: Outcome) -> None:
    if outcome.skipped:
        print(f"skipped {outcome.case.id}: {outcome.skipped}", flush=True)
    elif outcome.passed:
        print(f"passed {outcome.case.id}", flush=True)
    else:
        if outcome.unknown:
            print(f"NOT UNDERSTOOD {outcome.case.id}: {outcome.unknown}", flush=True)
        if outcome.differences:
            print(f"FAILED {outcome.case.id}", flush=True)
        for difference in outcome.differences:
            print(f"    {difference}", flush=True)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    result = "skipped" if outcome.skipped else "failed" if outcome.differences else "not understood"
    if outcome.passed:
        result = "passed"
    return {
        "file": outcome.case.file,
        "name": outcome.case.name,
        "result": result,
        "skipped": outcome.skipped or None,
        "unknown": outcome.unknown or None,
        "differences": [
            {
                "step": difference.step,
                "doing": difference.doing,
                "what": difference.what,
                "expected": difference.expected,
                "came": difference.came,
            }
            for difference in outcome.differences
        ],
    }


if __name__ == "__main__":
    configure_log("warning")
    sys.exit(main())
