"""What is kept between runs: whole or not at all, and made again when what it was made of changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guest.__main__ import main
from guest.failure import GuestError
from guest.store import GuestStore, default_cache, digest
from guest.wanted import Want
from tests.kit.debian import MadeUp, MadeUpArchive, SigningKey

LIBRARY = MadeUp("libmachine", "2", files={"usr/lib/libmachine": b"\x02" * 5000})
MACHINE = MadeUp("machine", "1", depends="libmachine", files={"usr/bin/machine": b"run"})
WANT = Want("machines", ("stable",), ("machine",))


@pytest.fixture
def store(made_up: MadeUpArchive, key: SigningKey, tmp_path: Path) -> GuestStore:
    made_up.publish("stable", [LIBRARY, MACHINE])
    return GuestStore(tmp_path / "cache", mirror=made_up.uri, keyring=key.keyring)


def contents(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_what_was_never_fetched_is_fetched_and_unpacked(store: GuestStore) -> None:
    with store.alone():
        assert store.known(WANT) is None
        place = store.unpacked(WANT)
    assert contents(place) == {"usr/lib/libmachine", "usr/bin/machine"}


def test_afterwards_no_archive_is_needed(store: GuestStore, made_up: MadeUpArchive) -> None:
    with store.alone():
        place = store.unpacked(WANT)
        made_up.root.rename(made_up.root.with_name("gone"))
        assert store.unpacked(WANT) == place


def test_a_damaged_package_is_fetched_again(store: GuestStore, tmp_path: Path) -> None:
    with store.alone():
        store.unpacked(WANT)
        (tmp_path / "cache/debs" / MACHINE.file).write_bytes(b"not this")
        assert store.known(WANT) is None
        store.unpacked(WANT)
        assert store.known(WANT) is not None


@pytest.mark.parametrize(
    "record", [b"", b"[]", b'{"mirror": "m", "debs": [{}]}', b'{"mirror": "m", "debs": []}', b"\xff"]
)
def test_a_damaged_record_is_none(store: GuestStore, tmp_path: Path, record: bytes) -> None:
    with store.alone():
        store.unpacked(WANT)
        (tmp_path / "cache/machines.json").write_bytes(record)
        assert store.known(WANT) is None


def test_other_packages_are_another_place_and_the_old_one_goes(
    store: GuestStore, made_up: MadeUpArchive
) -> None:
    newer = MadeUp("machine", "2", depends="libmachine", files={"usr/bin/newer": b""})
    with store.alone():
        before = store.unpacked(WANT)
        made_up.publish("stable", [LIBRARY, newer])
        assert store.unpacked(WANT) == before, "what was fetched stays until somebody asks"
        store.fetch(store.planned(WANT, made_up.uri))
        after = store.unpacked(WANT)
    assert contents(after) == {"usr/bin/newer", "usr/lib/libmachine"}
    assert not before.exists()
    assert {path.name for path in (after.parent / "debs").iterdir()} == {LIBRARY.file, newer.file}


def test_what_was_interrupted_leaves_no_half(
    store: GuestStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(deb: Path, into: Path) -> None:
        (into / "half").write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, store.alone():
        patch.setattr("guest.store.unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.unpacked(WANT)
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {"apt", "debs", "lock", "machines.json"}
    with store.alone():
        assert contents(store.unpacked(WANT)) == {"usr/lib/libmachine", "usr/bin/machine"}


def test_no_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = GuestStore(tmp_path / "file/cache", mirror="", keyring=tmp_path)
    with pytest.raises(GuestError, match="GUEST_CACHE"), store.alone():
        pass


def test_where_it_is_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUEST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert default_cache() == Path("/c/tdp-share/guest")
    monkeypatch.setenv("GUEST_CACHE", "/elsewhere")
    assert default_cache() == Path("/elsewhere")


def test_a_digest_knows_where_one_part_ends() -> None:
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])
    assert digest([b"ab", b"c"]) == digest([b"ab", b"c"])


def debians(made_up: MadeUpArchive) -> list[MadeUp]:
    """What `python -m guest` asks for, in the suites it asks."""
    emulator = [MadeUp("qemu-system-x86", "1:11"), MadeUp("unrelated", "1")]
    made_up.publish("trixie", [])
    made_up.publish("trixie-backports", emulator)
    headers = "linux-headers-6.1.0-9-amd64"
    kernel = [
        MadeUp("linux-image-amd64", "6.1", depends="linux-image-6.1.0-9-amd64"),
        MadeUp("linux-image-6.1.0-9-amd64", "6.1", depends="udev"),
        MadeUp("linux-headers-amd64", "6.1", depends=headers),
        MadeUp(
            headers,
            "6.1",
            depends="linux-headers-6.1.0-9-common, linux-kbuild-6.1, linux-compiler-gcc-12-x86",
        ),
        *(MadeUp(name, "6.1") for name in ("linux-headers-6.1.0-9-common", "linux-kbuild-6.1")),
        *(MadeUp(name, "1") for name in ("udev", "linux-compiler-gcc-12-x86", "busybox-static")),
    ]
    made_up.publish("bookworm", kernel)
    made_up.publish("bookworm-updates", [])
    return [emulator[0], *(kernel[n] for n in (1, 3, 4, 5, 8))]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_fetch_tells_versions_sizes_and_hashes(
    made_up: MadeUpArchive,
    key: SigningKey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dry: list[str],
) -> None:
    wanted = debians(made_up)
    where = ["--cache", str(tmp_path / "cache"), "--mirror", made_up.uri, "--keyring", str(key.keyring)]
    assert main(["fetch", "--json", *where, *dry]) == 0
    said = json.loads(capsys.readouterr().out)
    debs = [*said["emulator"]["debs"], *said["kernel"]["debs"]]
    assert {deb["package"] for deb in debs} == {package.name for package in wanted}
    assert {deb["size"] for deb in debs} == {len(package.data()) for package in wanted}
    there = {path.name for path in (tmp_path / "cache/debs").glob("*.deb")}
    assert there == (set() if dry else {package.file for package in wanted})


def test_who_reads_no_further_gets_no_traceback(
    made_up: MadeUpArchive, key: SigningKey, tmp_path: Path
) -> None:
    debians(made_up)
    where = ["--cache", str(tmp_path / "cache"), "--mirror", made_up.uri, "--keyring", str(key.keyring)]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "guest", "fetch", "--dry-run", *where]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, cwd=Path(__file__).parents[3], check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_refusal_is_a_sentence_and_a_status(
    made_up: MadeUpArchive, key: SigningKey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cache", str(tmp_path / "cache"), "--mirror", made_up.uri, "--keyring", str(key.keyring)]
    assert main(["fetch", *where]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"guest: emulator: asked trixie, trixie-backports of {made_up.uri}, and was refused: "
    )
    assert "does not have a Release file" in said or "Failed" in said
