"""The messages of every error and warning in nexus/, read from its sources: fixed words, and `…` for the rest."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REST = "…"
WARNS = {"warn", "say_once"}


@dataclass(frozen=True)
class Message:
    """What one place in the sources says: a line, and the function that it is in."""

    words: str
    file: str
    function: str
    line: int


@cache
def trees() -> dict[str, ast.Module]:
    paths = sorted((ROOT / "nexus").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in paths}


@cache
def functions() -> dict[str, list[ast.FunctionDef]]:
    """Functions and methods by their names, anywhere in nexus/."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(node)
    return found


def messages() -> list[Message]:
    found: dict[Message, None] = {}
    for file, tree in trees().items():
        for node, scopes in _said(tree, [tree]):
            function = next((scope.name for scope in scopes[:0:-1] if isinstance(scope, ast.FunctionDef)), "")
            for words in _texts(node, scopes):
                found[Message(words, file, function, node.lineno)] = None
    return list(found)


def _said(node: ast.AST, scopes: list[ast.AST]) -> Iterator[tuple[ast.expr, list[ast.AST]]]:
    """What is raised, made an error, or handed to `warnings.warn`, with the module and the functions around it."""
    for child in ast.iter_child_nodes(node):
        raised = child.exc if isinstance(child, ast.Raise) else None
        call = raised or child
        if isinstance(call, ast.Call) and call.args and (raised or _is_message(call)):
            made = _called(call, scopes)  # by a function of nexus, which may add its words to the argument
            if made:
                yield call, scopes
            if not made or not isinstance(call.args[0], ast.Constant | ast.Name):
                yield call.args[0], scopes
        yield from _said(child, [*scopes, child] if isinstance(child, ast.FunctionDef) else scopes)


def _called(call: ast.Call, scopes: list[ast.AST]) -> list[ast.FunctionDef]:
    """The functions of nexus that a call may be of; none where a class of errors is called."""
    if isinstance(call.func, ast.Name) and call.func.id not in WARNS:
        every = [node for node in functions().get(call.func.id, []) if not _is_method(node)]
        near = [node for node in every if any(node is each for scope in scopes[:1] for each in ast.walk(scope))]
        return near or every
    if isinstance(call.func, ast.Attribute) and call.func.attr not in {*dir(str), *dir(dict)}:
        return functions().get(call.func.attr, [])
    return []


def _is_method(function: ast.FunctionDef) -> bool:
    return any(argument.arg == "self" for argument in function.args.args)


def _is_message(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in WARNS or name.endswith(("Error", "NotImportable", "ImportMismatch"))


def _texts(node: ast.expr, scopes: list[ast.AST], names: frozenset[str] = frozenset()) -> list[str]:
    """All that an expression may say, a name in it being what it was set to in the scopes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return _joined([_texts(part, scopes, names) for part in node.values])
    if isinstance(node, ast.FormattedValue):
        return _texts(node.value, scopes, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([_texts(node.left, scopes, names), _texts(node.right, scopes, names)])
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, scopes, names), *_texts(node.orelse, scopes, names)]
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in _texts(value, scopes, names)]
    if isinstance(node, ast.Name):
        values = [value for scope in scopes for value in _set(node.id, scope)] if node.id not in names else []
        return _unique(text for value in values for text in _texts(value, scopes, names | {node.id}))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return [re.sub(r"\{.*?\}", REST, text) for text in _texts(node.func.value, list(trees().values()))]
    if isinstance(node, ast.Call):
        return _unique(text for function in _called(node, scopes) for text in _sentences(function))
    return [REST]


def _set(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    """What a name is set to, by an assignment or as the variable of a loop."""
    for node in ast.iter_child_nodes(scope) if isinstance(scope, ast.Module) else ast.walk(scope):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.For) else []
        if any(isinstance(part, ast.Name) and part.id == name for each in targets for part in ast.walk(each)):
            yield node.value if isinstance(node, ast.Assign) else node.iter  # type: ignore[attr-defined]


def _sentences(function: ast.FunctionDef) -> Iterator[str]:
    """The texts of several words in a function that makes messages; of what it does with them, nothing is known."""
    inside = {id(part) for node in ast.walk(function) if isinstance(node, ast.JoinedStr) for part in node.values}
    docstring = function.body[0].value if isinstance(function.body[0], ast.Expr) else None
    for node in ast.walk(function):
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in inside and node is not docstring:
            for text in _texts(node, []):
                if len(text.replace(REST, "").split()) > 3:
                    yield text


def _unique(texts: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(texts)) or [REST]


def _joined(parts: list[list[str]]) -> list[str]:
    return [re.sub(f"{REST}+", REST, "".join(each)) for each in product(*parts)]
