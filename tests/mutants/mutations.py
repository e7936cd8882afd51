"""Random small changes of a module's syntax tree: what a slip of the pen makes of a rule.

    text ──parse──▶ sites: every place where a kind of change applies ──draw by seed──▶ Mutation(line, kind, text)

Docstrings, annotations, messages to people and assertions are left alone: a change of them is no defect.
"""

import ast
import copy
import difflib
import random
from collections.abc import Callable, Iterator

from msgspec import Struct

SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add}
# Their arguments may stand in any order, or a swap is found by running the line at all.
SYMMETRIC = {"min", "max", "isinstance", "zip"}
Change = tuple[str, Callable[[], None]]


class Mutation(Struct, frozen=True, kw_only=True):
    """One changed module: `text` is all of it; `diff` shows the change alone."""

    file: str
    line: int
    kind: str
    text: str
    diff: str


def mutate(file: str, text: str, chance: random.Random) -> Mutation:
    """Return one mutation of a module, drawn from all that are possible."""
    original = ast.unparse(ast.parse(text))
    places = sorted(set(_sites(ast.parse(text))))
    line, kind, number = chance.choice(places)
    tree = ast.parse(text)
    _apply(tree, number, kind)
    changed = ast.unparse(ast.fix_missing_locations(tree))
    lines = difflib.unified_diff(original.splitlines(), changed.splitlines(), file, file, lineterm="", n=1)
    return Mutation(file=file, line=line, kind=kind, text=changed + "\n", diff="\n".join(list(lines)[2:]))


def _sites(tree: ast.Module) -> Iterator[tuple[int, str, int]]:
    for number, node in enumerate(_nodes(tree)):
        for kind, _ in _changes(node):
            yield node.lineno, kind, number


def _apply(tree: ast.Module, number: int, kind: str) -> None:
    node = list(_nodes(tree))[number]
    dict(_changes(node))[kind]()


def _nodes(tree: ast.Module) -> list[ast.stmt | ast.expr]:
    """Everything inside functions that decides something, in the order of the text."""
    found: list[ast.stmt | ast.expr] = []

    def visit(node: ast.AST, *, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Assert | ast.Raise | ast.JoinedStr | ast.arguments) or _is_text(child):
                continue
            if _is_diagnostic(child):
                continue
            within = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if inside and isinstance(child, ast.stmt | ast.expr):
                found.append(child)
            visit(child, inside=within)

    visit(tree, inside=False)
    return found


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_diagnostic(node: ast.AST) -> bool:
    """What only makes sentences for people, by name."""
    return isinstance(node, ast.FunctionDef) and node.name in {
        "__repr__",
        "_names",
        "_say",
        "_of",
        "_counts",
        "_mismatch",
    }


def _changes(node: ast.stmt | ast.expr) -> list[Change]:
    return [*_of_expression(node), *_of_statement(node)]


def _of_expression(node: ast.stmt | ast.expr) -> list[Change]:
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in SWAPPED:
            return [("comparison", lambda: setattr(node, "ops", [SWAPPED[type(operator)]()]))]
        case ast.BoolOp(op=operator):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            return [("and/or", lambda: setattr(node, "op", other)), ("dropped term", lambda: _drop_term(node))]
        case ast.BinOp(op=operator) if type(operator) in ARITHMETIC:
            return [("arithmetic", lambda: setattr(node, "op", ARITHMETIC[type(operator)]()))]
        case ast.Constant(value=bool() as value):
            return [("constant", lambda: setattr(node, "value", not value))]
        case ast.Constant(value=int() as value):
            return [("plus one", lambda: setattr(node, "value", value + 1))]
        case ast.Call(args=[_, _, *_]) if ast.unparse(node.func) not in SYMMETRIC:
            return [("swapped arguments", lambda: _swap(node))]
        case ast.UnaryOp(op=ast.Not()):
            return [("not dropped", lambda: _replace(node, copy.deepcopy(node.operand)))]
        case _:
            return []


def _of_statement(node: ast.stmt | ast.expr) -> list[Change]:
    match node:
        case ast.If(test=test) | ast.While(test=test) if not isinstance(test, ast.Constant):
            negated = ast.UnaryOp(op=ast.Not(), operand=test)
            return [("negated condition", lambda: setattr(node, "test", negated))]
        case ast.Expr() | ast.AugAssign() | ast.Delete():
            return [("removed statement", lambda: _replace(node, ast.Pass()))]
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return [("removed statement", lambda: _replace(node, ast.Pass()))]
        case _:
            return []


def _drop_term(node: ast.BoolOp) -> None:
    node.values = node.values[:-1]


def _swap(node: ast.Call) -> None:
    node.args[0], node.args[1] = node.args[1], node.args[0]


def _replace(node: ast.AST, other: ast.AST) -> None:
    """Turn a node into another, where it is: its parents need not be known."""
    node.__class__ = other.__class__  # type: ignore[assignment]
    node.__dict__.clear()
    node.__dict__.update(other.__dict__)
    ast.fix_missing_locations(node)
