"""The initramfs's format, against a reader written from its description and a record spelled out."""

from __future__ import annotations

import pytest

from guest.newc import CpioEntry, character_device, directory, executable, newc, plain_file

FIELDS = (
    *("ino", "mode", "uid", "gid", "nlink", "mtime", "filesize"),
    *("devmajor", "devminor", "rdevmajor", "rdevminor", "namesize", "check"),
)


def read(data: bytes) -> dict[str, tuple[dict[str, int], bytes]]:
    """By name: the header's fields and the content, up to the trailer."""
    found = dict[str, tuple[dict[str, int], bytes]]()
    at = 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        words = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(len(FIELDS))]
        header = dict(zip(FIELDS, words, strict=True))
        name_at = at + 110
        name = data[name_at : name_at + header["namesize"]]
        assert name.endswith(b"\0")
        content_at = -(-(name_at + len(name)) // 4) * 4
        content = data[content_at : content_at + header["filesize"]]
        at = -(-(content_at + len(content)) // 4) * 4
        if name == b"TRAILER!!!\0":
            assert at == len(data)
            return found
        found[name[:-1].decode()] = header, content


ENTRIES = {
    "init": executable(b"#!/bin/sh\n"),
    "dev": directory(),
    "dev/console": character_device(5, 1),
    "a/b/c": plain_file(b"12345"),
    "empty": plain_file(b""),
}


def test_every_entry_and_every_directory_on_the_way_is_there() -> None:
    found = read(newc(ENTRIES))
    assert list(found) == ["a", "a/b", "a/b/c", "dev", "dev/console", "empty", "init"]
    modes = {name: header["mode"] for name, (header, _) in found.items()}
    assert modes["a"] == modes["a/b"] == modes["dev"] == 0o040755
    assert modes["init"] == 0o100755
    assert modes["a/b/c"] == 0o100644
    assert modes["dev/console"] == 0o020600
    assert found["a/b/c"][1] == b"12345"
    assert (found["dev/console"][0]["rdevmajor"], found["dev/console"][0]["rdevminor"]) == (5, 1)


def test_nothing_of_the_machine_is_in_it() -> None:
    headers = [header for header, _ in read(newc(ENTRIES)).values()]
    assert {(header["uid"], header["gid"], header["mtime"], header["check"]) for header in headers} == {
        (0, 0, 0, 0)
    }
    assert [header["ino"] for header in headers] == list(range(1, len(headers) + 1))


def test_the_same_entries_are_the_same_bytes_in_whatever_order() -> None:
    assert newc(ENTRIES) == newc(dict(reversed(ENTRIES.items())))


def test_a_record_to_the_byte() -> None:
    zero, one = b"00000000", b"00000001"
    header = (
        b"070701" + one + b"000081a4" + zero + zero + one + zero + b"00000003" + 4 * zero + b"00000002" + zero
    )
    assert newc({"x": plain_file(b"abc")}).startswith(header + b"x\0" + b"abc\0" + b"070701")


@pytest.mark.parametrize("name", ["/x", "../x", "a/../x", "a//x", "./x", "x/", "TRAILER!!!"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name for an initramfs"):
        newc({name: plain_file(b"")})


def test_below_a_file_nothing_is_put() -> None:
    with pytest.raises(ValueError, match="is no directory"):
        newc({"a": CpioEntry(0o100644), "a/b": plain_file(b"")})
