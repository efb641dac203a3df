"""Packages by a signed index: what is fetched is what was signed, and everything else is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from guest.archive import DebArchive, DebFile, machine_mirror, parse_plan
from guest.failure import GuestError
from guest.wanted import Want
from tests.kit.debian import MadeUp, MadeUpArchive, SigningKey

LIBRARY = MadeUp("libmachine", "2.1-1", files={"usr/lib/libmachine": b"\x01" * 5000})
MACHINE = MadeUp(
    "machine", "1:11.0+ds-1~bpo1", depends="libmachine (>= 2)", files={"usr/bin/machine": b"run" * 9}
)
OTHER = MadeUp("other", "1")
WANT = Want("machines", ("stable",), ("machine",))


def archive_of(made_up: MadeUpArchive, key: SigningKey, tmp_path: Path, want: Want = WANT) -> DebArchive:
    return DebArchive(want, tmp_path / "apt", tmp_path / "debs", mirror=made_up.uri, keyring=key.keyring)


@pytest.fixture
def archive(made_up: MadeUpArchive, key: SigningKey, tmp_path: Path) -> DebArchive:
    made_up.publish("stable", [LIBRARY, MACHINE, OTHER])
    return archive_of(made_up, key, tmp_path)


def told(package: MadeUp) -> DebFile:
    data = package.data()
    return DebFile(package.name, package.version, package.file, len(data), hashlib.sha256(data).hexdigest())


def test_a_plan_has_what_is_wanted_and_what_that_needs(archive: DebArchive, tmp_path: Path) -> None:
    assert archive.plan() == [told(LIBRARY), told(MACHINE)]
    assert not (tmp_path / "debs").exists()


def test_of_a_plan_what_is_not_kept_is_left_out(
    archive: DebArchive, made_up: MadeUpArchive, key: SigningKey, tmp_path: Path
) -> None:
    want = Want("machines", ("stable",), ("machine",), kept=("mach*",))
    assert archive_of(made_up, key, tmp_path, want).plan() == [told(MACHINE)]


def test_the_preferred_suites_versions_win(made_up: MadeUpArchive, key: SigningKey, tmp_path: Path) -> None:
    newer = MadeUp("libmachine", "3")
    made_up.publish("stable", [LIBRARY, MACHINE])
    made_up.publish("newer", [newer])
    for preferred, found in (("stable", LIBRARY), ("newer", newer)):
        want = Want("machines", ("stable", "newer"), ("machine",), preferred=preferred)
        assert archive_of(made_up, key, tmp_path, want).plan() == [told(found), told(MACHINE)]


def test_what_was_fetched_is_whole_and_is_not_fetched_again(
    archive: DebArchive, made_up: MadeUpArchive, tmp_path: Path
) -> None:
    planned = archive.plan()
    archive.fetch(planned)
    for package in (LIBRARY, MACHINE):
        assert (tmp_path / "debs" / package.file).read_bytes() == package.data()
        made_up.path(package).unlink()
    archive.fetch(planned)


@pytest.mark.parametrize("damage", ["shorter", "longer", "changed", "another's start"])
def test_what_is_not_whole_is_fetched(archive: DebArchive, tmp_path: Path, damage: str) -> None:
    planned, right = archive.plan(), LIBRARY.data()
    archive.fetch(planned)
    wrong = {
        "shorter": right[:-100],
        "longer": right + b"x",
        "changed": bytes([right[0] ^ 1]) + right[1:],
        "another's start": b"x" * 50,
    }
    (tmp_path / "debs" / LIBRARY.file).write_bytes(wrong[damage])
    archive.fetch(planned)
    assert (tmp_path / "debs" / LIBRARY.file).read_bytes() == right


def test_a_package_that_is_not_the_signed_one_is_refused(
    archive: DebArchive, made_up: MadeUpArchive, tmp_path: Path
) -> None:
    data = bytearray(LIBRARY.data())
    data[-100] ^= 1
    made_up.path(LIBRARY).write_bytes(data)
    with pytest.raises(GuestError, match="machines: asked stable of copy:"):
        archive.fetch(archive.plan())
    assert not (tmp_path / "debs" / LIBRARY.file).exists()


def test_an_index_that_is_not_the_signed_one_is_refused(archive: DebArchive, made_up: MadeUpArchive) -> None:
    index = made_up.dist("stable") / "main/binary-amd64/Packages"
    index.write_text(index.read_text().replace("Version: 2.1-1", "Version: 2.1-2"))
    with pytest.raises(GuestError, match="machines: asked stable of copy:"):
        archive.plan()


def test_a_release_changed_after_it_was_signed_is_refused(
    archive: DebArchive, made_up: MadeUpArchive
) -> None:
    release = made_up.dist("stable") / "InRelease"
    release.write_text(release.read_text().replace("Suite: stable", "Suite: stably"))
    with pytest.raises(GuestError, match=r"BADSIG|invalid|not signed"):
        archive.plan()


def test_a_strangers_signature_is_refused(
    made_up: MadeUpArchive, key: SigningKey, strangers_key: SigningKey, tmp_path: Path
) -> None:
    made_up.publish("stable", [LIBRARY, MACHINE], signer=strangers_key)
    with pytest.raises(GuestError, match=r"NO_PUBKEY|not signed"):
        archive_of(made_up, key, tmp_path).plan()


def test_a_release_without_a_signature_is_refused(archive: DebArchive, made_up: MadeUpArchive) -> None:
    release = made_up.dist("stable") / "InRelease"
    lines = release.read_text().splitlines()
    plain = lines[lines.index("") + 1 : lines.index("-----BEGIN PGP SIGNATURE-----")]
    release.unlink()
    (made_up.dist("stable") / "Release").write_text("\n".join(plain) + "\n")
    with pytest.raises(GuestError, match="not signed"):
        archive.plan()


def test_without_a_keyring_nothing_is_asked(made_up: MadeUpArchive, key: SigningKey, tmp_path: Path) -> None:
    archive = DebArchive(
        WANT, tmp_path / "apt", tmp_path / "debs", mirror=made_up.uri, keyring=tmp_path / "none"
    )
    with pytest.raises(GuestError, match="apt-get install debian-archive-keyring"):
        archive.plan()


def test_a_package_that_is_not_there_is_named(
    made_up: MadeUpArchive, key: SigningKey, tmp_path: Path
) -> None:
    made_up.publish("stable", [OTHER])
    with pytest.raises(GuestError, match="Unable to locate package machine"):
        archive_of(made_up, key, tmp_path).plan()


def test_apts_own_state_is_not_the_machines(
    archive: DebArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.plan()
    environment = {**os.environ, "APT_CONFIG": str(tmp_path / "apt/apt.conf")}
    command = ["apt-config", "dump", "--format", "%f=%v%n"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    settings = dict(line.split("=", 1) for line in said.splitlines())
    inside = str(tmp_path / "apt")
    for name in (
        "Dir::State",
        "Dir::State::lists",
        "Dir::State::status",
        "Dir::Cache",
        "Dir::Cache::archives",
    ):
        assert settings[name].startswith(inside)
    assert settings["Dir::Etc::sourcelist"].startswith(inside)
    assert [name for name, value in settings.items() if "Invoke" in name and value] == []
    assert settings["Acquire::AllowInsecureRepositories"] == "false"
    assert settings["APT::Get::AllowUnauthenticated"] == "false"


def fake_apt(directory: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    monkeypatch.delenv("GUEST_MIRROR", raising=False)
    tool = directory / "apt-get"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


def test_the_mirror_is_the_one_that_apt_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(
        tmp_path,
        monkeypatch,
        "http://example.org/node\nhttp://example.org/debian-security/\nhttp://m.example.org/debian/",
    )
    assert machine_mirror() == "http://m.example.org/debian/"
    monkeypatch.setenv("GUEST_MIRROR", "http://mine.example.org/debian")
    assert machine_mirror() == "http://mine.example.org/debian"


def test_apt_without_an_archive_of_debian_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(tmp_path, monkeypatch, "http://example.org/ubuntu/")
    with pytest.raises(GuestError, match="--mirror or GUEST_MIRROR"):
        machine_mirror()


def test_a_machine_without_apt_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUEST_MIRROR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestError, match="no apt-get on this machine"):
        machine_mirror()


SHA = "SHA256:" + "0" * 64


@pytest.mark.parametrize(
    "line",
    [
        f"'http://m/x.deb' ../x_1_all.deb 10 {SHA}",
        f"'http://m/x.deb' a/x_1_all.deb 10 {SHA}",
        f"'http://m/x.deb' x_1_arm64.deb 10 {SHA}",
        "'http://m/x.deb' x_1_all.deb 10 MD5Sum:" + "0" * 32,
        "'http://m/x.deb' x_1_all.deb 10",
        "what is this",
    ],
)
def test_a_plan_that_is_not_understood_is_refused(line: str) -> None:
    with pytest.raises(GuestError, match="not understood"):
        parse_plan(line)
