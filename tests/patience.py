"""How long the suite waits before it says that something never happened: one number, generous, one setting.

Machines are shared: beside seventeen busy loops on two cores a patience of 10 s ran out in a dozen tests.  A
wait ends as soon as what it waits for is there, so the number costs only the run that fails.  `TEST_PATIENCE`
scales it (3: three times as long).
"""

from __future__ import annotations

import os

PATIENCE_S = 60.0 * float(os.environ.get("TEST_PATIENCE", "1"))
WHOLE_RUN_S = 5 * PATIENCE_S  # for a command with daemons of its own to come to its end
WHOLE_TEST_S = 10 * PATIENCE_S  # tests/conftest.py hands it to pytest-timeout
