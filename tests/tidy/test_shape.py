"""Shape of the source: sizes, module headers, banned calls, citations."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.tidy.source import ROOT, Checker, Module, hold, modules, product, snippet

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
HEADER_LINES_MIN = 3
TABLE_MEMORY = {
    *("protocol/pt/mem.py", "protocol/frame_tags.py"),
    *("protocol/hw/register_page.py", "protocol/hw/queue_window.py"),
}
CITATION = re.compile(r"\[([A-Za-z][\w.-]*)\s+([\w.\"'][^\[\]]*)\]")


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def is_table(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.Tuple)


def check_module_size(module: Module) -> list[str]:
    """Module-level tables are not counted."""
    tables = sum(lines_of(node) for node in module.tree.body if is_table(node))
    size = len(module.text.splitlines()) - tables
    return [module.at(1, f"{size} lines, at most {MODULE_LINES_MAX}")] if size > MODULE_LINES_MAX else []


def check_function_size(module: Module) -> list[str]:
    return [
        module.at(node, f"{node.name} has {lines_of(node)} lines, at most {FUNCTION_LINES_MAX}")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > FUNCTION_LINES_MAX
    ]


def header_lines(module: Module) -> int:
    header = ast.get_docstring(module.tree) or ""
    return sum(bool(line.strip()) for line in header.splitlines())


def check_header(module: Module) -> list[str]:
    """Cores and protocol say what they model, what holds and where it is written: that takes a few lines."""
    if module.path.name == "__init__.py" and not module.text.strip():
        return []
    explains = module.path.parts[0] == "protocol" or "core" in module.path.parts[:-1]
    least = HEADER_LINES_MIN if explains else 1
    has = header_lines(module)
    return [module.at(1, f"the module docstring has {has} lines, at least {least}")] if has < least else []


def check_table_memory(module: Module) -> list[str]:
    """Another process reads the tables: 64-bit stores in one file, and never the zero-filling pack_into."""
    found = []
    for node in ast.walk(module.tree):
        name = (
            node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
        )
        if name == "pack_into":
            found.append(module.at(node, "pack_into zero-fills first, and a walker can see that zero"))
        if is_cast_to_words(node) and str(module.path) not in TABLE_MEMORY:
            found.append(module.at(node, "64-bit views of shared memory belong in protocol/pt/mem.py"))
    return found


def is_cast_to_words(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cast"):
        return False
    given = [*node.args, *(keyword.value for keyword in node.keywords)]
    return any(isinstance(value, ast.Constant) and value.value in ("Q", "@Q") for value in given)


def prose(module: Module) -> Iterator[tuple[int, str]]:
    """Comments, those on consecutive lines joined, and docstrings, each with its line."""
    start, block = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != start + len(block):
                yield start, "\n".join(block)
                block = []
            start = start if block else token.start[0]
            block.append(token.string.lstrip("#"))
    if block:
        yield start, "\n".join(block)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def reference_tags() -> set[str]:
    """First column of the table in docs/references.md."""
    text = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    return set(rows) - {"tag", "---"}


def check_citations(module: Module) -> list[str]:
    """A bracketed citation starts with a tag from docs/references.md."""
    known = reference_tags()
    return [
        module.at(line, f"[{match[1]} {match[2]}]: no {match[1]} in docs/references.md")
        for line, text in prose(module)
        for match in CITATION.finditer(text)
        if match[1] not in known
    ]


@pytest.mark.parametrize(
    "checker",
    [check_function_size, check_table_memory, check_citations],
    ids=lambda checker: checker.__name__,
)
def test_product_code_keeps_the_rule(checker: Checker) -> None:
    hold(checker, product())


@pytest.mark.parametrize("checker", [check_module_size, check_header], ids=lambda checker: checker.__name__)
def test_every_file_keeps_the_rule(checker: Checker) -> None:
    hold(checker, modules())


def test_no_two_modules_share_a_header() -> None:
    headers = defaultdict(list)
    for module in modules():
        if header := ast.get_docstring(module.tree):
            headers[header].append(str(module.path))
    assert [paths for paths in headers.values() if len(paths) > 1] == []


def test_the_reference_table_is_read() -> None:
    assert {"RFC", "VT-d", "SDM", "PCIe", "DSA", "KVM"} <= reference_tags()


LONG_FUNCTION = "def long():\n" + "    pass\n" * FUNCTION_LINES_MAX
LONG_TABLE = "TABLE = {\n" + "    1: 2,\n" * MODULE_LINES_MAX + "}\n"
THREE_LINES = '"""One.\n\nTwo\nthree.\n"""\n'


@pytest.mark.parametrize(
    ("checker", "path", "text"),
    [
        (check_module_size, "kvmd/core/vm.py", "x = 1\n" * (MODULE_LINES_MAX + 1)),
        (check_module_size, "tests/unit/test_vm.py", "x = 1\n" * (MODULE_LINES_MAX + 1)),
        (check_function_size, "kvmd/core/vm.py", LONG_FUNCTION),
        (check_function_size, "kvmd/core/vm.py", "async " + LONG_FUNCTION),
        (check_header, "kvmd/service/vm.py", "x = 1\n"),
        (check_header, "kvmd/core/vm.py", '"""One line."""\n'),
        (check_header, "protocol/rpc/__init__.py", '"""One line."""\n'),
        (check_table_memory, "protocol/pt/mem.py", "struct.pack_into('<Q', table, 0, 1)"),
        (check_table_memory, "kvmd/memory.py", "from struct import pack_into"),
        (check_table_memory, "kvmd/core/vm.py", "words = memoryview(table).cast('Q')"),
        (check_table_memory, "kvmd/core/vm.py", "words = view.cast(format='Q')"),
        (check_citations, "kvmd/core/vm.py", "x = 1  # the unit ignores it [VTD 9.8]"),
        (check_citations, "kvmd/core/vm.py", '"""Says [Manual 3, chapter 4]."""'),
        (check_citations, "kvmd/core/vm.py", "# over two lines [Manual\n# 24/42]"),
    ],
)
def test_a_breach_is_seen(checker: Checker, path: str, text: str) -> None:
    assert len(checker(snippet(path, text))) == 1


@pytest.mark.parametrize(
    ("checker", "path", "text"),
    [
        (check_module_size, "kvmd/core/vm.py", LONG_TABLE),
        (check_function_size, "kvmd/core/vm.py", LONG_FUNCTION.removesuffix("    pass\n")),
        (check_header, "kvmd/core/vm.py", THREE_LINES),
        (check_header, "kvmd/core/__init__.py", ""),
        (check_table_memory, "protocol/pt/mem.py", "words = memoryview(table).cast('Q')"),
        (
            check_citations,
            "kvmd/core/vm.py",
            "# [RFC 24/42] and [VT-d 9.8], the\n# half-open [first, last) and [i + 1]",
        ),
    ],
)
def test_what_the_rule_allows_is_let_pass(checker: Checker, path: str, text: str) -> None:
    assert checker(snippet(path, text)) == []
