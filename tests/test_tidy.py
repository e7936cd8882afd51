"""The house style as tests: sizes, docstrings, swallowed exceptions, banned names, tests that assert nothing."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted((ROOT / "hypha").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
EVERYTHING = PRODUCT + TESTS + BENCHMARKS

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 50
BANNED_MODULE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
HISTORY = re.compile(r"\b(NEW:|FIXME|TODO|XXX|now uses|no longer|used to|fixed bug|improved version)", re.IGNORECASE)
# The documented places that answer for bugs in handlers and in jobs; see their module docstrings.
BLIND_EXCEPT_ALLOWED = {"hypha/network/dispatch.py", "hypha/worker/jobs.py"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_modules_are_short_and_open_with_a_docstring(path):
    source = path.read_text()
    assert source.count("\n") <= MODULE_LINES_MAX, f"{name_of(path)} is too long"
    assert path.stem not in BANNED_MODULE_NAMES, f"{name_of(path)}: name the noun it is about"
    if source.strip():
        assert ast.get_docstring(tree_of(path)), f"{name_of(path)} does not say what it is"


@pytest.mark.parametrize("path", PRODUCT + BENCHMARKS, ids=name_of)
def test_functions_fit_on_a_screen(path):
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert long == [], f"{name_of(path)}: {long}"


def swallows(handler: ast.ExceptHandler) -> bool:
    names = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else {"BaseException"}
    blind = names & {"Exception", "BaseException"}
    return bool(blind) and not any(isinstance(node, ast.Raise) for node in ast.walk(handler))


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_no_exception_is_swallowed_blindly(path):
    blind = [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler) and swallows(node)]
    assert blind == [] or name_of(path) in BLIND_EXCEPT_ALLOWED, f"{name_of(path)}: lines {blind}"


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_comments_tell_no_history(path):
    if path == Path(__file__):
        return
    told = [line for line in path.read_text().splitlines() if "#" in line and HISTORY.search(line.split("#", 1)[1])]
    assert told == [], f"{name_of(path)}: {told}"


def asserts(function: ast.AST) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(("raises", "warns")) or called.rpartition(".")[2].startswith(
                ("assert_", "check_", "run_state_machine")
            ):
                return True
    return False


@pytest.mark.parametrize(
    "path", [p for p in TESTS if p.name.startswith("test_") or p.name == "contract.py"], ids=name_of
)
def test_every_test_asserts(path):
    idle = [
        node.name
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not asserts(node)
    ]
    assert idle == [], f"{name_of(path)}: {idle}"


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_use_no_mocks_and_do_not_sleep(path):
    imports = {
        name
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert "unittest.mock" not in imports
    slept = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep"
    ]
    assert slept == [], f"{name_of(path)}: time.sleep on lines {slept}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_is_dead():
    text = "\n".join(path.read_text() for path in EVERYTHING) + (ROOT / "pyproject.toml").read_text()
    text += (ROOT / "Makefile").read_text()
    dead = [
        name
        for name in map(module_name, PRODUCT)
        if name != "hypha"
        and not re.search(rf"\b{re.escape(name)}\b", text)
        and not re.search(
            rf"from {re.escape(name.rpartition('.')[0])} import [^\n]*\b{name.rpartition('.')[2]}\b", text
        )
    ]
    assert dead == []


def config_structs() -> list[type]:
    import msgspec

    from hypha.config import NodeConfig
    from hypha.data_node import Config as Data
    from hypha.gateway import Config as Gateway
    from hypha.scheduler.config import Config as Scheduler
    from hypha.worker.config import Config as Worker

    seen: list[type] = []
    waiting: list[object] = [NodeConfig, Data, Gateway, Scheduler, Worker]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if kind not in seen:
                seen.append(kind)
                waiting += [field.type for field in msgspec.structs.fields(kind)]
        else:
            waiting += getattr(kind, "__args__", ())
    return seen


def test_every_configuration_key_is_read_somewhere():
    import msgspec

    read = {
        node.attr
        for path in PRODUCT
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = [
        f"{kind.__name__}.{field.name}"
        for kind in config_structs()
        for field in msgspec.structs.fields(kind)
        if field.name not in read
    ]
    assert unread == []
