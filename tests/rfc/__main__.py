"""`make rfc`: run the marked tests and print what they show, id by id; `--write` renews docs/rfc.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict

import pytest

from tests.rfc.plugin import Recorder
from tests.rfc.table import DOCUMENT, PASSED, carriers, document, rows, text_table, verdict


def main() -> int:
    options = argparse.ArgumentParser("python -m tests.rfc", description=__doc__)
    options.add_argument("--json", action="store_true", help="print the table as JSON")
    options.add_argument("--write", action="store_true", help="run nothing, write docs/rfc.md")
    given = options.parse_args()
    tests = carriers()
    if given.write:
        DOCUMENT.write_text(document(tests), encoding="utf-8")
        return 0
    recorder = Recorder()
    quiet = ["-q", "--no-header", "--tb=short", "-m", "rfc or defect"]
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the table's
        status = pytest.main(quiet, plugins=[recorder])
    verdicts = {name: verdict(name, tests, recorder.results) for name in rows()}
    if given.json:
        table = [
            asdict(row) | {"tests": tests.get(name, []), "result": verdicts[name]}
            for name, row in rows().items()
        ]
        print(json.dumps(table, indent=1))
    else:
        print(text_table(tests, recorder.results))
    return int(status != pytest.ExitCode.OK or set(verdicts.values()) != {PASSED})


if __name__ == "__main__":
    sys.exit(main())
