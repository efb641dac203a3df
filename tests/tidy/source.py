"""The project's own source as the tidy tests see it: one `Module` per Python file, parsed once.

A checker takes a module and returns its complaints, so that each can be shown a bad snippet as well.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
DAEMONS = ("kvmd", "iommufdd", "device_sim", "qemu_shim")
PRODUCT = ("protocol", *DAEMONS, "vfio_user", "simulator")
GENERATED = {
    *(".git", ".venv", "wheels", "build", "dist", "__pycache__"),
    *(".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"),
}


@dataclass(frozen=True)
class Module:
    """One Python file; `path` is relative to the root of the project."""

    path: PurePosixPath
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def name(self) -> str:
        """The dotted name it is imported under."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, node: ast.AST | int, complaint: str) -> str:
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return f"{self.path}:{line}: {complaint}"


Checker = Callable[[Module], list[str]]


def snippet(path: str, text: str) -> Module:
    """A module that exists only in a test."""
    return Module(PurePosixPath(path), text)


def files() -> Iterator[Path]:
    """Every file that is not generated, whether or not git knows it yet."""
    pending = [ROOT]
    while pending:
        for entry in sorted(pending.pop().iterdir()):
            if entry.name in GENERATED or entry.name.endswith(".egg-info") or entry.is_symlink():
                continue
            if entry.is_dir():
                pending.append(entry)
            elif entry.is_file():
                yield entry


@cache
def modules() -> tuple[Module, ...]:
    """Every Python file of the project."""
    found = (path for path in files() if path.suffix == ".py")
    return tuple(
        Module(PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text(encoding="utf-8"))
        for path in sorted(found)
    )


def product() -> tuple[Module, ...]:
    """What is installed: neither tests nor bench."""
    return tuple(module for module in modules() if module.path.parts[0] in PRODUCT)


def hold(checker: Checker, over: tuple[Module, ...]) -> None:
    """Fail with every complaint, one to a line."""
    assert over, "no module found: the checker would pass on nothing"
    found = [complaint for module in over for complaint in checker(module)]
    assert not found, "\n".join(["", *found])


@dataclass(frozen=True, slots=True)
class Import:
    """One imported thing. `target` is the module; for `from a import b` either a or a.b may be it."""

    target: str
    item: str | None
    line: int

    @property
    def root(self) -> str:
        return self.target.partition(".")[0]


def imports(module: Module) -> Iterator[Import]:
    """Every import, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                keep = len(parts) - node.level + (module.path.name == "__init__.py")
                base = ".".join([*parts[:keep], *filter(None, [base])])
            for alias in node.names:
                yield Import(base, alias.name, node.lineno)
