"""Which values cannot go stale: numbers that were given, and objects that are never another.

Plain is what is made of numbers, bytes and names of things alone: a NewType, an enumeration, a frozen record
of such.  A host frame's number is not: it is what the host gives away.  Fixed is an attribute that nobody
stores to but the `__init__` of its object: what it names is the same object after a sleep as before, and is
asked afresh.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

from tests.tidy.source import Module

NUMBERS = {"int", "bool", "float", "str", "bytes", "None", "Literal", "tuple", "range"}
GIVEN_AWAY = {"Pfn", "Hpa"}
ENUMS = {"Enum", "IntEnum", "Flag", "IntFlag", "StrEnum"}
INITS = {"__init__", "__post_init__", "__new__"}


def words(annotation: ast.expr) -> set[str]:
    """The type names an annotation is made of."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    named = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(annotation) if isinstance(node, ast.Attribute)}
    empty = any(isinstance(node, ast.Constant) and node.value is None for node in ast.walk(annotation))
    return named | ({"None"} if empty else set())


def is_frozen(cls: ast.ClassDef) -> bool:
    return any(
        isinstance(made, ast.Call) and any(keyword.arg == "frozen" for keyword in made.keywords)
        for made in cls.decorator_list
    ) or any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in cls.bases)


class Values:
    """What the source of `over` says of its types and attributes."""

    def __init__(self, over: Iterable[Module]) -> None:
        trees = [module.tree for module in over]
        self.plain = NUMBERS | {name for tree in trees for name in new_types(tree)}
        self.plain -= GIVEN_AWAY
        nodes = [node for tree in trees for node in ast.walk(tree)]
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        while True:  # one name may be of several classes: then all of them
            others = {cls.name for cls in classes if not self._is_record(cls)}
            more = {cls.name for cls in classes} - others - self.plain
            if not more:
                break
            self.plain |= more
        self.changing = {name for tree in trees for name in changing(tree)}
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        others = {node.name for node in functions if not self.is_plain_type(node.returns)}
        self._count = {node.name for node in functions} - others

    def _is_record(self, cls: ast.ClassDef) -> bool:
        if any(isinstance(base, ast.Name) and base.id in ENUMS for base in cls.bases):
            return True
        fields = [node for node in cls.body if isinstance(node, ast.AnnAssign)]
        return is_frozen(cls) and all(words(node.annotation) <= self.plain for node in fields)

    def is_plain_type(self, annotation: ast.expr | None) -> bool:
        return annotation is not None and words(annotation) <= self.plain

    def is_settled(self, value: ast.expr, settled: set[str]) -> bool:
        """Is `value` made of what cannot go stale, if the names in `settled` cannot?"""
        match value:
            case ast.Constant():
                return True
            case ast.Name():
                return value.id in settled or value.id == "self" or value.id.isupper()
            case ast.Attribute():
                fixed = value.attr not in self.changing
                return fixed and self.is_settled(value.value, settled)
            case ast.Call(func=ast.Name()):
                args = [*value.args, *(keyword.value for keyword in value.keywords)]
                return bool(args) and all(
                    self.is_settled(arg, settled) and not reaches_object(arg) for arg in args
                )
            case ast.Lambda() | ast.Await() | ast.Call() | ast.Subscript() | ast.NamedExpr() | ast.Starred():
                return False
            case ast.List() | ast.Dict() | ast.Set() | ast.ListComp() | ast.SetComp() | ast.DictComp():
                return False
            case _:
                parts = [part for part in ast.iter_child_nodes(value) if isinstance(part, ast.expr)]
                return all(self.is_settled(part, settled) for part in parts)

    def _is_count(self, value: ast.expr) -> bool:
        """`done += await copy()`: how far this flow has come, as a function that returns a number says."""
        call = value.value if isinstance(value, ast.Await) else value
        if not isinstance(call, ast.Call):
            return False
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        return called in self._count

    def settled_names(self, function: ast.AsyncFunctionDef, given: Iterable[ast.arg]) -> set[str]:
        """Names of `function` whose every binding is settled."""
        bindings: dict[str, list[ast.expr | None]] = {}
        for arg in given:
            fine = self.is_plain_type(arg.annotation) or arg.arg in ("self", "cls")
            bindings.setdefault(arg.arg, []).append(ast.Constant(0) if fine else None)
        for node in ast.walk(function):
            for target, value in bound_by(node):
                if isinstance(node, ast.AugAssign) and self._is_count(node.value):
                    value = ast.Constant(0)
                for name in ast.walk(target):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        bindings.setdefault(name.id, []).append(value)
        settled: set[str] = set(bindings)
        while True:  # the greatest set that is consistent: a loop may bind a name from itself
            kept = {
                name
                for name in settled
                if all(value is not None and self.is_settled(value, settled) for value in bindings[name])
            }
            if kept == settled:
                return settled
            settled = kept


def reaches_object(value: ast.expr) -> bool:
    """A function given an object may look into it; one given numbers only computes."""
    return any(isinstance(node, ast.Name) and node.id == "self" for node in ast.walk(value))


def bound_by(node: ast.AST) -> list[tuple[ast.expr, ast.expr | None]]:
    match node:
        case ast.Assign():
            return [(target, node.value) for target in node.targets]
        case ast.AnnAssign() | ast.NamedExpr() | ast.AugAssign():
            return [(node.target, node.value)]
        case ast.For() | ast.AsyncFor() | ast.comprehension():
            return [(node.target, node.iter)]
        case ast.With() | ast.AsyncWith():
            return [(item.optional_vars, None) for item in node.items if item.optional_vars is not None]
        case _:
            return []


def new_types(tree: ast.Module) -> Iterable[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            func = node.value.func
            if isinstance(func, ast.Name) and func.id == "NewType":
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and words(node.annotation) == {"TypeAlias"}
        ):
            yield node.target.id


def changing(tree: ast.Module) -> Iterable[str]:
    """Attributes stored to outside an `__init__`, and those that are computed."""
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, starting = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            starting = node.name in INITS
            if any(isinstance(made, ast.Name) and made.id == "property" for made in node.decorator_list):
                yield node.name
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not (starting and own):
                yield node.attr
        pending += [(child, starting) for child in ast.iter_child_nodes(node)]
