"""A daemon that never gets ready: `--fail` ends it at once, otherwise it sleeps, a signal not handled yet."""

from __future__ import annotations

import sys
import time

if "--fail" in sys.argv:
    print("out of memory", file=sys.stderr)
    sys.exit(2)
time.sleep(600)
