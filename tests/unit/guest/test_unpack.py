"""What a package may put where: inside its directory, and nothing but files, directories and links."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from guest.failure import GuestError
from guest.unpack import unpack
from tests.kit.debian import MISSING, MadeUp, deb, entry

pytestmark = pytest.mark.skipif("dpkg-deb" in MISSING, reason="no dpkg-deb on this machine")

CONTROL = MadeUp("some", "1").control
Member = tuple[tarfile.TarInfo, bytes]


def directory(name: str) -> Member:
    return entry(name, type=tarfile.DIRTYPE, mode=0o755)


def symlink(name: str, target: str) -> Member:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hardlink(name: str, target: str) -> Member:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def unpacked(tmp_path: Path, *members: Member) -> Path:
    package = tmp_path / "some_1_all.deb"
    package.write_bytes(deb(CONTROL, members))
    into = tmp_path / "into"
    into.mkdir(exist_ok=True)
    unpack(package, into)
    return into


def test_files_directories_and_links_arrive(tmp_path: Path) -> None:
    into = unpacked(
        tmp_path,
        directory("./"),
        directory("./usr/"),
        entry("./usr/bin/run", b"#!", mode=0o4755),
        entry("./usr/share/text", b"text", mode=0o666),
        symlink("./usr/bin/go", "run"),
        symlink("./usr/up", "../usr/share"),
        hardlink("./usr/share/same", "./usr/share/text"),
    )
    assert (into / "usr/bin/go").read_bytes() == b"#!"
    assert (into / "usr/up/text").read_bytes() == b"text"
    assert (into / "usr/share/same").samefile(into / "usr/share/text")
    umask = os.umask(0)
    os.umask(umask)
    assert (into / "usr/bin/run").stat().st_mode & 0o7777 == 0o755 & ~umask
    assert (into / "usr/share/text").stat().st_mode & 0o7777 == 0o644 & ~umask
    assert (into / "usr/bin/run").stat().st_uid == os.getuid()


def test_an_absolute_link_is_to_the_directorys_own(tmp_path: Path) -> None:
    into = unpacked(tmp_path, entry("./etc/passwd", b"ours"), symlink("./usr/lib/link", "/etc/passwd"))
    assert (into / "usr/lib/link").read_bytes() == b"ours"


def test_a_later_package_may_write_through_a_link_inside(tmp_path: Path) -> None:
    unpacked(tmp_path, directory("./usr/lib/"), symlink("./lib", "usr/lib"))
    into = unpacked(tmp_path, entry("./lib/file", b"new"))
    assert (into / "usr/lib/file").read_bytes() == b"new"


def test_a_file_replaces_a_link_and_not_what_it_names(tmp_path: Path) -> None:
    into = unpacked(tmp_path, entry("./a", b"first"), symlink("./b", "a"), entry("./b", b"second"))
    assert (into / "a").read_bytes() == b"first"
    assert (into / "b").read_bytes() == b"second"


HOSTILE = {
    "a name that climbs": [entry("../outside", b"x")],
    "a name that climbs from within": [entry("./usr/../../outside", b"x")],
    "an absolute name": [entry("/tmp/outside", b"x")],
    "a link that climbs": [symlink("./link", "../outside")],
    "an absolute link that climbs": [symlink("./link", "/../outside")],
    "a link by way of a link": [
        directory("./deep/er/"),
        symlink("./short", "deep/er"),
        symlink("./deep/link", "../short/../../../outside"),
    ],
    "a hard link that climbs": [hardlink("./link", "../outside")],
    "an absolute hard link": [hardlink("./link", "/etc/passwd")],
    "a device": [entry("./null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "a pipe": [entry("./pipe", type=tarfile.FIFOTYPE)],
    "the directory itself": [symlink(".", "usr")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_package_is_refused_and_touches_nothing_outside(
    tmp_path: Path, members: list[Member]
) -> None:
    (tmp_path / "outside").write_bytes(b"as it was")
    with pytest.raises(GuestError, match=r"some_1_all\.deb cannot be unpacked"):
        unpacked(tmp_path, *members)
    assert (tmp_path / "outside").read_bytes() == b"as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "into", "some_1_all.deb"}


def test_nothing_is_written_through_a_link_that_leaves(tmp_path: Path) -> None:
    """As somebody else may have left one there."""
    (tmp_path / "into").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "into/link").symlink_to(tmp_path / "elsewhere")
    for members in ([entry("./link/file", b"x")], [entry("./link/a/b/file", b"x")], [directory("./link/")]):
        with pytest.raises(GuestError, match="through a link"):
            unpacked(tmp_path, *members)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "data", [b"", b"nothing of the kind", deb(CONTROL, [entry("./a", b"x" * 9999)])[:-40]]
)
def test_what_is_no_package_is_refused(tmp_path: Path, data: bytes) -> None:
    package = tmp_path / "some_1_all.deb"
    package.write_bytes(data)
    (tmp_path / "into").mkdir()
    with pytest.raises(GuestError, match=r"some_1_all\.deb cannot be unpacked"):
        unpack(package, tmp_path / "into")
