"""Which local values live across an await: liveness over the statements of one async function.

The graph has a node for each simple statement and each head of a compound one, in the order they run.  A node
reads names, binds names, and may sleep: then what it reads inside the awaited expression is read before the
sleep, and everything else of it after.  A name is carried across a sleep if a binding of it reaches the sleep
and a read of it is reachable from there before it is bound again; a loop's way back counts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Sleep = ast.Await | ast.AsyncWith | ast.AsyncFor
LEAVES = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(eq=False)
class Node:
    """One step of a function; `asleep`: what makes it sleep, `before`: names it reads before it does."""

    line: int
    reads: set[str] = field(default_factory=set)
    before: set[str] = field(default_factory=set)
    binds: set[str] = field(default_factory=set)
    asleep: Sleep | None = None
    following: list[Node] = field(default_factory=list)


def names(tree: ast.AST, kind: type[ast.expr_context]) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}


def awaits_in(tree: ast.AST) -> Iterator[ast.Await]:
    """Those of an expression, not of a function defined in it."""
    if isinstance(tree, ast.Await):
        yield tree
    if not isinstance(tree, LEAVES):
        for child in ast.iter_child_nodes(tree):
            yield from awaits_in(child)


class Graph:
    """The steps of `function`, from `entry`, which binds its parameters."""

    def __init__(self, function: ast.AsyncFunctionDef) -> None:
        self.nodes: list[Node] = []
        self._loops: list[tuple[Node, list[Node]]] = []  # head, and who breaks out
        self._catchers: list[list[Node]] = []  # for each try being read: all its steps may jump to a handler
        self.entry = self._node(function.lineno, [])
        self.entry.binds = {parameter.arg for parameter in parameters(function)}
        self._body(function.body, [self.entry])

    def sleeps(self) -> Iterator[tuple[Node, set[str]]]:
        """Each step that sleeps, and the names carried across it."""
        after = self._live_after()
        reaching = self._bound_before()
        for node in self.nodes:
            if node.asleep is not None:
                wanted = node.reads | (after[node] - node.binds)
                yield node, wanted & reaching[node]

    # -- building --------------------------------------------------------------------------------------

    def _node(self, line: int, reached_from: Iterable[Node]) -> Node:
        node = Node(line)
        self.nodes.append(node)
        for catcher in self._catchers:
            catcher.append(node)
        for earlier in reached_from:
            earlier.following.append(node)
        return node

    def _step(self, line: int, parts: Iterable[ast.AST | None], ends: list[Node]) -> Node:
        """A node that evaluates `parts`."""
        node = self._node(line, ends)
        for part in filter(None, parts):
            for sleep in awaits_in(part):
                node.asleep = node.asleep or sleep
                node.before |= names(sleep.value, ast.Load)
            node.reads |= read_outside(part)
            node.binds |= names(part, ast.Store)
            if isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
                node.reads.add(part.target.id)
        return node

    def _body(self, body: list[ast.stmt], ends: list[Node]) -> list[Node]:
        for statement in body:
            ends = self._statement(statement, ends)
        return ends

    def _statement(self, at: ast.stmt, ends: list[Node]) -> list[Node]:
        match at:
            case ast.If():
                test = self._step(at.lineno, [at.test], ends)
                return [*self._body(at.body, [test]), *self._body(at.orelse, [test])]
            case ast.While():
                return self._loop(self._step(at.lineno, [at.test], ends), at, endless=is_true(at.test))
            case ast.For() | ast.AsyncFor():
                taken = self._step(at.lineno, [at.iter], ends)
                head = self._step(at.lineno, [at.target], [taken])
                head.reads.add(f"<iterator {at.lineno}>")
                taken.binds.add(f"<iterator {at.lineno}>")
                if isinstance(at, ast.AsyncFor):
                    head.asleep = at
                return self._loop(head, at, endless=False)
            case ast.With() | ast.AsyncWith():
                head = self._step(
                    at.lineno,
                    [part for item in at.items for part in (item.context_expr, item.optional_vars)],
                    ends,
                )
                if isinstance(at, ast.AsyncWith):
                    head.before |= head.reads
                    head.reads = set()
                    head.asleep = at
                return self._body(at.body, [head])
            case ast.Try():
                return self._try(at, ends)
            case ast.Match():
                head = self._step(at.lineno, [at.subject], ends)
                out = [head]
                for case in at.cases:
                    arm = self._step(case.pattern.lineno, [case.guard], [head])
                    arm.binds |= {
                        found.name
                        for found in ast.walk(case.pattern)
                        if isinstance(found, ast.MatchAs | ast.MatchStar) and found.name
                    }
                    out += self._body(case.body, [arm])
                return out
            case ast.Break():
                self._loops[-1][1].extend(ends)
                return []
            case ast.Continue():
                for end in ends:
                    end.following.append(self._loops[-1][0])
                return []
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                node = self._node(at.lineno, ends)
                node.binds = {at.name}
                node.reads = names(at, ast.Load)
                return [node]
            case _:
                node = self._step(at.lineno, [at], ends)
                return [] if isinstance(at, ast.Return | ast.Raise) else [node]

    def _loop(self, head: Node, at: ast.While | ast.For | ast.AsyncFor, *, endless: bool) -> list[Node]:
        broken: list[Node] = []
        self._loops.append((head, broken))
        for end in self._body(at.body, [head]):
            end.following.append(head)
        self._loops.pop()
        return [*self._body(at.orelse, [] if endless else [head]), *broken]

    def _try(self, at: ast.Try, ends: list[Node]) -> list[Node]:
        steps: list[Node] = list(ends)
        self._catchers.append(steps)
        done = self._body(at.body, ends)
        self._catchers.pop()
        done = self._body(at.orelse, done)
        for handler in at.handlers:
            head = self._node(handler.lineno, steps)
            head.binds = {handler.name} if handler.name else set()
            done += self._body(handler.body, [head])
        if at.finalbody:
            left = self._body(at.finalbody, [*done, *steps])
            return left if done else []
        return done

    # -- solving ---------------------------------------------------------------------------------------

    def _live_after(self) -> dict[Node, set[str]]:
        after: dict[Node, set[str]] = {node: set() for node in self.nodes}
        changed = True
        while changed:
            changed = False
            for node in reversed(self.nodes):
                live = {
                    name
                    for later in node.following
                    for name in later.before | later.reads | (after[later] - later.binds)
                }
                changed |= live != after[node]
                after[node] = live
        return after

    def _bound_before(self) -> dict[Node, set[str]]:
        before: dict[Node, set[str]] = {node: set() for node in self.nodes}
        changed = True
        while changed:
            changed = False
            for node in self.nodes:
                for later in node.following:
                    bound = before[node] | node.binds
                    if not bound <= before[later]:
                        before[later] |= bound
                        changed = True
        return before


def parameters(function: ast.AsyncFunctionDef) -> list[ast.arg]:
    args = function.args
    more = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *more]


def read_outside(part: ast.AST) -> set[str]:
    """Names read in `part` outside of what it awaits."""
    if isinstance(part, ast.Await):
        return set()
    if isinstance(part, ast.Name):
        return {part.id} if isinstance(part.ctx, ast.Load) else set()
    return set[str]().union(*(read_outside(child) for child in ast.iter_child_nodes(part)))


def is_true(test: ast.expr) -> bool:
    return isinstance(test, ast.Constant) and bool(test.value)
