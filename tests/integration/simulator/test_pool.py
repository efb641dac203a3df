"""A signal in the middle of tasks on several processes: the first is heard between two of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_shim.vmm.interrupt import SIGNALS
from simulator.pool import Stop, pooled
from tests.patience import WHOLE_RUN_S

DEAF = r"""
import os
import time

from simulator.pool import interrupts, pooled


def task(number, stop):
    os.write(1, b"begun\n")  # whole, whoever else does
    time.sleep(3600)


if __name__ == "__main__":
    with interrupts() as interrupted:
        try:
            for one in pooled(range(2), task, 2, interrupted):
                if interrupted():
                    print("heard", flush=True)
        except KeyboardInterrupt:
            print("at once", flush=True)
"""


# Both signals come while the pool's locks are held, and who is in the middle comes to its end.
STRUCK = r"""
import os
import signal
import sys

from simulator import pool

NUMBER = int(sys.argv[1])


def struck(*args):
    for _ in range(2):
        os.kill(os.getpid(), NUMBER)
    print("waited", flush=True)
    return set(), set()


def task(number, stop):
    return number


if __name__ == "__main__":
    pool.wait = struck
    with pool.interrupts() as interrupted:
        try:
            for _ in pool.pooled(range(1), task, 1, interrupted):
                print("went on", flush=True)
        except KeyboardInterrupt:
            print("at once", flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_nothing_locked(tmp_path: Path, number: int) -> None:
    (tmp_path / "struck.py").write_text(STRUCK)
    command = [sys.executable, str(tmp_path / "struck.py"), str(int(number))]
    told = subprocess.run(command, capture_output=True, text=True, timeout=WHOLE_RUN_S, check=False)
    assert (told.returncode, told.stdout.splitlines()) == (0, ["waited", "at once"])


@pytest.mark.parametrize("number", SIGNALS)
def test_at_a_second_signal_nobody_waits_for_a_task_that_does_not_look(tmp_path: Path, number: int) -> None:
    (tmp_path / "deaf.py").write_text(DEAF)
    command = [sys.executable, str(tmp_path / "deaf.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        process.send_signal(number)
        assert process.stdout.readline() == "heard\n"
        process.send_signal(number)
        told, _ = process.communicate(timeout=WHOLE_RUN_S)
    assert (process.returncode, told.splitlines()[-1]) == (0, "at once")


def mask(_number: int, _stop: Stop) -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def test_a_worker_is_deaf_to_ctrl_c_from_its_start_and_we_are_not() -> None:
    ended = [one for one in pooled(range(1), mask, 1) if one is not None]
    assert signal.SIGINT in ended[0][1].result()
    assert signal.SIGINT not in mask(0, lambda: False)
