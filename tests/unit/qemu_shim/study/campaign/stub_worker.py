"""A worker that runs nothing: what befalls it is said by a file that the test wrote.

    {"3": ["die", "run"]}     to the first and the second worker that get seed 3: also "exit", "tear", "mute"

It imports nothing of the project, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path


def main() -> None:
    plan, scratch = Path(sys.argv[1]), sys.argv[2]
    for line in sys.stdin:
        point = json.loads(line)
        log = plan.with_name(f"seen-{point['seed']}")
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        fates = json.loads(plan.read_text()).get(str(point["seed"]), [])
        tries = len(log.read_text().splitlines())
        fate = fates[tries - 1] if tries <= len(fates) else "run"
        if fate == "tear":
            os.write(1, b'{"workload": "half')
        if fate in ("die", "tear"):
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "exit":
            sys.exit(7)
        if fate == "mute":
            sys.stdin.read()
            break
        os.write(1, json.dumps({**point, "samples": [], "refusals": [], "problems": []}).encode() + b"\n")
    shutil.rmtree(scratch)


main()
