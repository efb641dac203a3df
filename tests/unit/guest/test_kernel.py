"""Modules in the order they load, out of what each says of itself."""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

import pytest

from guest.build import built, compiler
from guest.failure import GuestError
from guest.image import INIT, entries, initramfs
from guest.kernel import DebianKernel, depends_of, load_order, module_name

VERSION = "6.1.0-99-amd64"


def module(*depends: str) -> bytes:
    """As much of one as is looked at."""
    return (
        b"\x7fELF\0depends=nothing at all\0license=GPL\0depends="
        + ",".join(depends).encode()
        + b"\0retpoline=Y\0"
    )


MODULES = {
    "idxd": module("idxd_bus", "irqbypass"),
    "idxd_bus": module(),
    "irqbypass": module("core-part"),
    "core_part": module(),
    "round": module("about"),
    "about": module("round"),
    "lame": module("gone"),
}


def of_modules(name: str) -> bytes:
    if name not in MODULES:
        raise GuestError(f"no {name}")
    return MODULES[name]


def test_a_module_says_what_it_needs() -> None:
    assert depends_of(module()) == ()
    assert depends_of(module("a-b", "c")) == ("a_b", "c")
    with pytest.raises(GuestError, match="does not say what it depends on"):
        depends_of(b"\x7fELF")


@pytest.mark.parametrize(("file", "name"), [("a-b.ko", "a_b"), ("a_b.ko.xz", "a_b"), ("idxd.ko", "idxd")])
def test_a_name_is_the_kernels(file: str, name: str) -> None:
    assert module_name(file) == name


def test_each_comes_after_what_it_needs_and_once() -> None:
    assert load_order(["idxd"], of_modules) == ["idxd_bus", "core_part", "irqbypass", "idxd"]
    assert load_order(["irqbypass", "idxd"], of_modules) == ["core_part", "irqbypass", "idxd_bus", "idxd"]


@pytest.mark.parametrize(("name", "says"), [("round", "need each other: round, about"), ("lame", "no gone")])
def test_what_cannot_be_loaded_is_told(name: str, says: str) -> None:
    with pytest.raises(GuestError, match=says):
        load_order([name], of_modules)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for directory in (
        "boot",
        f"lib/modules/{VERSION}/kernel/drivers",
        f"usr/src/linux-headers-{VERSION}",
        "bin",
    ):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "usr/src/linux-headers-6.1.0-99-common").mkdir()
    (tmp_path / f"boot/vmlinuz-{VERSION}").write_bytes(b"kernel")
    (tmp_path / "bin/busybox").write_bytes(b"box")
    drivers = tmp_path / f"lib/modules/{VERSION}/kernel/drivers"
    (drivers / "idxd.ko").write_bytes(module("idxd-bus"))
    (drivers / "idxd-bus.ko.xz").write_bytes(lzma.compress(module()))
    (drivers / "odd.ko.zst").write_bytes(b"?")
    return tmp_path


def test_a_kernel_is_found_with_its_parts(root: Path) -> None:
    kernel = DebianKernel.found_in(root)
    assert kernel.version == VERSION
    assert kernel.image.read_bytes() == b"kernel"
    assert kernel.busybox.read_bytes() == b"box"
    assert kernel.headers.is_dir()
    assert kernel.common_headers.is_dir()


def test_a_modules_compression_is_undone(root: Path) -> None:
    kernel = DebianKernel.found_in(root)
    assert kernel.module("idxd_bus") == module()
    assert load_order(["idxd"], kernel.module) == ["idxd_bus", "idxd"]
    with pytest.raises(GuestError, match="has no module none"):
        kernel.module("none")
    with pytest.raises(GuestError, match="compressed in a way"):
        kernel.module("odd")


def test_one_kernel_is_wanted_and_not_two(root: Path) -> None:
    (root / "boot/vmlinuz-6.2").write_bytes(b"")
    with pytest.raises(GuestError, match="2 kernels"):
        DebianKernel.found_in(root)


OWN = {name: module() for name in ("movdir64b", "block_on_fault", "dma_check", "soft_dma")}


def test_the_image_has_the_driver_after_what_it_looks_for(root: Path) -> None:
    inside = entries(b"box", OWN, DebianKernel.found_in(root).module)
    assert inside["modules/order"].content == b"movdir64b\nidxd_bus\nidxd\n"
    carried = {name.removeprefix("modules/") for name in inside if name.endswith(".ko")}
    assert carried == {f"{name}.ko" for name in (*OWN, "idxd", "idxd_bus")}
    assert inside["init"].content.startswith(b"#!/bin/busybox sh\n")


def test_the_same_inputs_are_the_same_image(root: Path) -> None:
    kernel = DebianKernel.found_in(root)
    first = initramfs(b"box", OWN, kernel.module)
    assert first == initramfs(b"box", dict(reversed(OWN.items())), kernel.module)
    assert first != initramfs(b"other", OWN, kernel.module)


def test_what_the_guest_runs_first_is_a_shells() -> None:
    subprocess.run(["sh", "-n", INIT], check=True)


def tool(directory: Path, name: str) -> None:
    (directory / name).write_text("#!/bin/sh\n")
    (directory / name).chmod(0o755)


def test_the_kernels_compiler_is_taken_before_another(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, tools = DebianKernel.found_in(root), tmp_path_factory.mktemp("tools")
    variables = kernel.headers / ".kernelvariables"
    variables.write_text(
        "override ARCH = x86\nCC = $(if $(CACHED),$(CCACHE)) $(CROSS_COMPILE)gcc-12\nX = 1\n"
    )
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(GuestError, match=r"no gcc-12 and no gcc: .*apt-get install gcc"):
        compiler(kernel)
    tool(tools, "gcc")
    assert compiler(kernel) == "gcc"
    tool(tools, "gcc-12")
    assert compiler(kernel) == "gcc-12"
    with pytest.raises(GuestError, match="no make: "):
        built(kernel)


def test_what_the_compiler_says_is_shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = DebianKernel.found_in(root)
    (kernel.headers / ".kernelvariables").write_text("CC = gcc\n")
    (kernel.common_headers / "Makefile").write_text("modules:\n\t@echo 'line 3: no such thing' >&2; false\n")
    with pytest.raises(
        GuestError, match=rf"(?s)do not compile for {VERSION} with gcc.*line 3: no such thing"
    ):
        built(kernel)
