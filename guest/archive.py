"""Packages out of Debian's archive, by apt: in a root of its own, with the machine's way to a mirror.

apt verifies a suite's InRelease with the keyring named here, the indexes with that, and each package with
them; it knows proxies and goes on with what was fetched in part.  Its lists, its idea of what is installed
(nothing) and its packages live in the root, so the machine's own are neither read nor changed, and the hooks
of the machine's configuration are left out.  What apt does not do: hash again what lies in its cache.  Here
every package is, each time it is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from guest.failure import GuestError
from guest.wanted import Want

MIRROR_VARIABLE: Final = "GUEST_MIRROR"
DEBIAN_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ARCHITECTURE: Final = "amd64"
_DEBIANS_PATH: Final = re.compile(r"/debian(/|$)")  # not debian-security, not a third party's
_PLANNED: Final = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})")
_FILE: Final = re.compile(r"(?P<package>[a-z0-9][a-z0-9.+-]*)_(?P<version>[\w.+~%:-]+)_(amd64|all)\.deb")


@dataclass(frozen=True)
class DebFile:
    """One package as the signed index has it; `file` is its name without a directory, `size` in bytes."""

    package: str
    version: str
    file: str
    size: int
    sha256: str


def _ask(command: Sequence[str], *, config: Path | None = None, cwd: Path | None = None) -> str:
    """What one of apt's tools says, with settings of `config`; one that fails is quoted."""
    given = {**os.environ, "LC_ALL": "C.UTF-8", **({"APT_CONFIG": str(config)} if config else {})}
    try:
        done = subprocess.run(command, env=given, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise GuestError(f"no {command[0]} on this machine: Debian's packages are fetched with it") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
        shown = "\n  ".join(said or done.stderr.splitlines()[-5:])
        raise GuestError(f"{shlex.join(command)} ended with {done.returncode}:\n  {shown}")
    return done.stdout


def machine_mirror() -> str:
    """The archive of Debian that apt on this machine is set up for."""
    if named := os.environ.get(MIRROR_VARIABLE):
        return named
    command = [
        "apt-get",
        "indextargets",
        "--no-release-info",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
    ]
    for uri in _ask(command).split():
        if _DEBIANS_PATH.search(uri):
            return uri
    raise GuestError(
        f"apt on this machine knows no archive of Debian: name one, --mirror or {MIRROR_VARIABLE}"
    )


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(deb: DebFile, debs: Path) -> bool:
    path = debs / deb.file
    return path.is_file() and path.stat().st_size == deb.size and hash_of(path) == deb.sha256


def parse_plan(printed: str) -> list[DebFile]:
    """Of `apt-get install --print-uris`: one line a package, `'URI' file size SHA256:hash`."""
    found = []
    for line in printed.splitlines():
        fields = _PLANNED.fullmatch(line.strip())
        name = fields and _FILE.fullmatch(fields["file"])
        if not fields or not name:
            raise GuestError(f"apt named a package in a way that is not understood: {line}")
        found.append(
            DebFile(
                package=name["package"],
                version=unquote(name["version"]),
                file=fields["file"],
                size=int(fields["size"]),
                sha256=fields["sha256"],
            )
        )
    return sorted(found, key=lambda deb: deb.file)


class DebArchive:
    """What is wanted of one archive; `root` is apt's, `debs` where packages are put."""

    def __init__(self, want: Want, root: Path, debs: Path, *, mirror: str, keyring: Path) -> None:
        self.want, self.mirror, self.keyring = want, mirror, keyring
        self._root, self._debs = root.absolute(), debs.absolute()

    def plan(self) -> list[DebFile]:
        """From today's index, verified."""
        if not self.keyring.is_file():
            raise GuestError(
                f"no keyring {self.keyring}: apt-get install debian-archive-keyring, or --keyring"
            )
        self._configure()
        self._apt("update")
        preferred = ["--target-release", self.want.preferred] if self.want.preferred else []
        asked = ["--no-install-recommends", *preferred, *self.want.packages]
        planned = parse_plan(self._apt("install", "-qq", "--print-uris", *asked))
        return [deb for deb in planned if any(fnmatchcase(deb.package, kept) for kept in self.want.kept)]

    def fetch(self, planned: Sequence[DebFile]) -> None:
        """What is not there yet, or not whole."""
        self._debs.mkdir(parents=True, exist_ok=True)
        missing = [deb for deb in planned if not is_whole(deb, self._debs)]
        for deb in missing:
            path = self._debs / deb.file
            if path.is_file() and path.stat().st_size >= deb.size:
                path.unlink()  # damaged; a shorter one is what apt goes on with
        if missing:
            megabytes = sum(deb.size for deb in missing) / 1e6
            print(f"{self.want.name}: fetching {len(missing)} packages, {megabytes:.1f} MB", file=sys.stderr)
            self._apt("download", *(f"{deb.package}={deb.version}" for deb in missing))
        for deb in missing:
            if not is_whole(deb, self._debs):
                raise GuestError(f"{deb.file} is not what the signed index says it is")

    def _apt(self, verb: str, *arguments: str) -> str:
        where = self._debs if verb == "download" else self._root  # it downloads to where it is
        try:
            return _ask(["apt-get", verb, *arguments], config=self._root / "apt.conf", cwd=where)
        except GuestError as error:
            asked = f"{', '.join(self.want.suites)} of {self.mirror}"
            raise GuestError(f"{self.want.name}: asked {asked}, and was refused: {error}") from None

    def _configure(self) -> None:
        for directory in ("lists/partial", "archives/partial"):
            (self._root / directory).mkdir(parents=True, exist_ok=True)
        (self._root / "installed").write_text("")
        (self._root / "wanted.sources").write_text(
            f"Types: deb\nURIs: {self.mirror}\nSuites: {' '.join(self.want.suites)}\n"
            f"Components: main\nSigned-By: {self.keyring.absolute()}\n"
        )
        (self._root / "apt.conf").write_text(self._settings())

    def _settings(self) -> str:
        """The machine's first, for proxies and the like; of two values the later one counts."""
        parts, main = _ask(
            ["apt-config", "shell", "A", "Dir::Etc::parts/d", "B", "Dir::Etc::main/f"]
        ).splitlines()
        included = [Path(shlex.split(line.partition("=")[2])[0]) for line in (main, parts)]
        lines = [f'#include "{path}{"/" * path.is_dir()}";' for path in included if path.exists()]
        lines += ["#clear APT::Update;", "#clear APT::Default-Release;", "#clear DPkg;"]
        own = {
            "Dir::State": self._root,
            "Dir::State::lists": self._root / "lists",
            "Dir::State::status": self._root / "installed",
            "Dir::Cache": self._root,
            "Dir::Cache::archives": self._root / "archives",  # stays empty, so a plan names every package
            "Dir::Etc::sourcelist": self._root / "wanted.sources",
            **dict.fromkeys(("Dir::Etc::sourceparts", "Dir::Etc::main", "Dir::Etc::parts"), "/dev/null"),
            **dict.fromkeys(("Dir::Etc::preferences", "Dir::Etc::preferencesparts"), "/dev/null"),
            "APT::Architecture": ARCHITECTURE,
            "APT::Sandbox::User": "root",  # its other user cannot reach a person's cache
            "APT::Update::Error-Mode": "any",
            "APT::Get::AllowUnauthenticated": "false",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowWeakRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
            "Acquire::ForceHash": "sha256",
            "Acquire::Languages": "none",
        }
        lines += ["#clear APT::Architectures;"]
        return "\n".join([*lines, *(f'{name} "{value}";' for name, value in own.items())]) + "\n"
