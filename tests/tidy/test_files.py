"""Files around the source: locks, packaging, and nothing that names the machine it was written on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.tidy.source import DAEMONS, PRODUCT, ROOT, files

LOCKS = tuple(f"requirements{name}.lock" for name in ("", "-dask", "-compiled", "-dev", "-bench"))
REQUIREMENT = re.compile(r"^([A-Za-z0-9][\w.-]*)==(\S+)")
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:work|root)/")


def lock_complaints(text: str) -> list[str]:
    """Versions and hashes, no addresses: a lock means the same whichever index serves it."""
    found = ["an address"] if "://" in text else []
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not REQUIREMENT.match(line):
            found.append(f"not an exact requirement: {line.strip()}")
        elif not re.search(r"--hash=sha256:[0-9a-f]{64}\b", line):
            found.append(f"no hash: {line.strip()}")
    return found


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {match[1]: match[2] for match in map(REQUIREMENT.match, lines) if match}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_versions_and_hashes_only(name: str) -> None:
    assert lock_complaints((ROOT / name).read_text(encoding="utf-8")) == []
    assert pins(name)


def test_a_bad_lock_is_seen() -> None:
    good = (
        "trio==1.0 ; os_name != 'nt' \\\n    --hash=sha256:" + "0" * 64 + "\n    # via -r requirements.in\n"
    )
    assert lock_complaints(good) == []
    assert lock_complaints("trio==1.0\n") == ["no hash: trio==1.0"]
    assert lock_complaints("trio>=1.0\n") == ["not an exact requirement: trio>=1.0"]
    assert lock_complaints("# from https" + "://example.org\n" + good) == ["an address"]


def test_one_environment_serves_all_locks() -> None:
    runtime, dask, compiled, dev, bench = map(pins, LOCKS)
    assert runtime.items() | dask.items() | compiled.items() <= dev.items()
    assert {name: dev[name] for name in bench.keys() & dev.keys()}.items() <= bench.items()


def test_the_project_depends_on_what_the_runtime_lock_is_made_from() -> None:
    project = pyproject()["project"]
    lines = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    asked = {line for line in lines if line and not line.startswith("#")}
    assert set(project["dependencies"]) == asked - {"setuptools"}
    assert asked <= pins("requirements.lock").keys()


def test_every_command_has_a_main() -> None:
    assert pyproject()["project"]["scripts"] == {
        name.replace("_", "-"): f"{name}.__main__:main" for name in DAEMONS
    }
    for name in DAEMONS:
        source = (ROOT / name / "__main__.py").read_text(encoding="utf-8")
        assert re.search(r"^def main\(|^from \S+ import main$", source, re.MULTILINE), name


def test_every_package_of_the_product_is_installed() -> None:
    patterns = set(pyproject()["tool"]["setuptools"]["packages"]["find"]["include"])
    for directory in {path.parent for path in files() if path.suffix == ".py"} - {ROOT}:
        top = directory.relative_to(ROOT).parts[0]
        if top in PRODUCT:
            assert (directory / "__init__.py").exists(), f"{directory.name} would be left out of the wheel"
            assert {top, f"{top}.*"} <= patterns


def test_every_file_that_code_reads_is_installed() -> None:
    data = pyproject()["tool"]["setuptools"]["package-data"]
    named = {f"{package.replace('.', '/')}/{name}" for package, names in data.items() for name in names}
    beside = {str(path.relative_to(ROOT)) for path in files() if path.suffix != ".py"}
    assert {path for path in beside if path.split("/")[0] in PRODUCT} == named


def test_no_file_names_a_machine() -> None:
    checked = list(files())
    assert ROOT / "pyproject.toml" in checked
    assert [str(path) for path in checked if MACHINE_PATH.search(text_of(path))] == []


@pytest.mark.parametrize("path", ["work", "root"])
def test_a_machine_path_is_seen(path: str) -> None:
    assert MACHINE_PATH.search(f"see /{path}/notes.md")
    assert MACHINE_PATH.search(f'open("/{path}/notes.md")')
    assert not MACHINE_PATH.search(f"frame{path}/notes.md, docs/{path}/notes.md")
