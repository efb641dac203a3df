"""Debian's kernel booted for real: only where it is asked for by this file's name, and not by `make test`.

    python -m pytest tests/integration/booted_guest.py

It fetches 120 MB once, needs a compiler, and takes two minutes; `python -m guest` boots by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from guest.archive import DEBIAN_KEYRING
from guest.build import built
from guest.store import GuestStore, default_cache
from tests.integration.test_vfio_user import PlainServer
from tests.kit.copying_server import CopyingServer

ROOT = Path(__file__).parents[2]


def booted(*arguments: str) -> tuple[int, dict[str, tuple[str, str]], list[str]]:
    """Exit status, results by name as (status, detail), and all that the guest said."""
    command = [sys.executable, "-m", "guest", "boot", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    said = json.loads(done.stdout)
    return (
        done.returncode,
        {row["name"]: (row["status"], row["detail"]) for row in said["results"]},
        said["said"],
    )


def test_modules_built_twice_are_the_same_bytes() -> None:
    with GuestStore(default_cache(), mirror="", keyring=DEBIAN_KEYRING).alone() as store:
        kernel = store.kernel()
        assert built(kernel) == built(kernel)


def test_it_boots_to_its_results_and_ends() -> None:
    status, results, said = booted("--run", "pci,idxd,block_on_fault,dsa,dma,soft_dma")
    assert {name: row[0] for name, row in results.items() if "." not in name} == {
        **dict.fromkeys(("pci", "movdir64b", "idxd", "block_on_fault"), "ok"),
        "dsa": "absent",
        "dma_check": "ok",
    }
    assert results["dma_check"][1].endswith("passed=10 of=10")
    assert said[-1] == "end"
    assert status == 0


@pytest.mark.parametrize(
    ("spoil", "wrong"), [(1, "copied"), (2, "beside"), (3, "source"), (4, "error"), (5, "timeout")]
)
def test_a_device_that_does_wrong_is_seen(spoil: int, wrong: str) -> None:
    words = (f"soft_dma.spoil={spoil}", "dma_check.tests=2", "dma_check.wait_ms=500")
    status, results, _ = booted("--run", "soft_dma", *(part for word in words for part in ("--append", word)))
    assert [results[f"dma_check.{n}"][1].split()[0] for n in range(2)] == [f"wrong={wrong}"] * 2
    assert results["dma_check"][0] == "failed"
    assert status == 1


def test_a_run_that_is_not_known_fails() -> None:
    status, results, _ = booted("--append", "guest.run=nonsense")
    assert results == {"nonsense": ("failed", "unknown")}
    assert status == 1


def test_debians_driver_copies_by_a_function_behind_vfio_user(tmp_path: Path) -> None:
    """Bound, used, unbound and unloaded; and again, with block on fault in each descriptor."""
    server = CopyingServer(tmp_path)
    runs = "idxd,dsa,dma,unbind,idxd,block_on_fault,dsa,dma,unbind"
    words = ("--append", "dma_check.bytes=100000", "--append", "dma_check.tests=6")
    status, results, said = booted("--run", runs, "--device", str(server.path), *words)
    assert said.count("result unbind ok") == 2
    assert results["dsa"] == ("ok", "device=dsa0 queue=wq0.0 state=enabled")
    assert results["dma_check"] == ("ok", "channel=dma0chan0 passed=6 of=6")
    seen = server.seen()
    assert (seen["moves"], seen["blocking"], seen["bytes"]) == (12, 6, 2 * 3 * 150_000)
    assert status == 0


def test_a_function_behind_vfio_user_is_on_its_bus(tmp_path: Path) -> None:
    server = PlainServer(tmp_path)
    status, results, said = booted("--run", "pci", "--device", str(server.path))
    (function,) = [line for line in said if line.startswith("pci ") and "id=0x8086:0x0b25" in line]
    assert "class=0x088000" in function
    assert function.endswith("extended=0x000f,0x001b,0x0013"), "ATS, PASID and PRI"
    where = function.split()[1]
    bars = [line.split() for line in said if line.startswith(f"pci {where} bar=")]
    sizes = {bar[2]: 1 + int(bar[3].split("-")[1], 16) - int(bar[3].split("-")[0], 16) for bar in bars}
    assert sizes == {"bar=0": 64 << 10, "bar=2": 128 << 10}
    assert (status, results["pci"][0]) == (0, "ok")
    server.nothing_is_left()
    assert server.stop() == 0
