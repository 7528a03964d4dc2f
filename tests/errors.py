#!/usr/bin/env python
"""Count the errors that hold the value found, and say what to do: `python tests/errors.py [FOLDER ...] [--list]`.

A message is what a user can meet: `raise X(...)`, `sys.exit(...)` or `parser.error(...)` with words in it. Not counted
are re-raises, texts that only pass another error on (`f"error: {error}"`), NotImplementedError and AssertionError. A
message that is built in a local variable or by a function of the same file is followed there. Reasons that a build
records for one sample are raised first, so they are counted too.

    value   something other than a constant is interpolated; what a pydantic validator raises gets it from
            pipeline.config, which adds `(found ...)`
    hint    a clause starts with an imperative (`; use bf16`, `, or delete it`), or says what was expected
"""

from __future__ import annotations

import argparse
import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("pipeline", "training")  # what is counted when no folder is named
GATED, GOAL = (
    ("pipeline", "training"),
    0.95,
)  # tests/test_errors.py: this share of their messages holds the value
HINT_GOAL = 0.9  # over the whole project; nothing enforces it

NOT_FOR_USERS = {"NotImplementedError", "AssertionError"}
VERBS = """add allow ask begin build check choose close compare copy correct cut delete divide download drop end fetch
    fill free give go install keep leave let log look lower make mend move name open pass pin pip point put raise read
    rebuild remove rename repair repeat replace rerun reserve resize restore run save say see set shorten shut split
    start stop store take train try turn unset update upgrade upload use wait write"""
IMPERATIVE = re.compile(
    r"(?:^|[;:.,(\n]\s*|\s-\s|\b(?:or|and|then|to|please|either|first|instead|again|just)\s+)"
    r"(?:" + "|".join(VERBS.split()) + r")\b(?!\s+(?:is|are|was|has|of)\b)",
    re.IGNORECASE,
)
EXPECTED = re.compile(
    r"\b(?:expected|must be|ha(?:s|ve) to be|needs? to be|at (?:least|most)|did you mean|(?:is|are) needed|goes? with|"
    r"go together)\b",
    re.IGNORECASE,
)
HOLE = "\0"  # stands in a message's text for what is interpolated


@dataclass(frozen=True)
class Message:
    """One error of the source. `text` has `{}` for what is interpolated."""

    path: str
    line: int
    text: str
    value: bool
    hint: bool


def messages(source: str, path: str) -> Iterator[Message]:
    """Every message of one source file, in order."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    constants = {
        ast.unparse(node.targets[0]): node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for scope, node, argument in sorted(_sites(tree, None), key=lambda site: site[1].lineno):
        text, value = _Reader(functions, constants, scope).read(argument)
        if not re.search(r"[A-Za-z]{2}", re.sub(r"^\s*error\b", "", text)):
            continue  # it has no words but another error's
        validator = scope is not None and any("validator" in ast.unparse(d) for d in scope.decorator_list)
        hint = bool(IMPERATIVE.search(text) or EXPECTED.search(text))
        yield Message(path, node.lineno, " ".join(text.replace(HOLE, "{}").split()), value or validator, hint)


Scope = ast.FunctionDef | ast.AsyncFunctionDef | None


def _sites(node: ast.AST, scope: Scope) -> Iterator[tuple[Scope, ast.expr | ast.stmt, list[ast.expr]]]:
    """(function around it, statement, arguments) of whatever ends in a message for the user."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        scope = node
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        if ast.unparse(node.exc.func) not in NOT_FOR_USERS:
            yield scope, node, node.exc.args
    elif isinstance(node, ast.Call) and re.fullmatch(r"sys\.exit|(\w*\.)*\w*parser\.error", ast.unparse(node.func)):
        yield scope, node, node.args
    for child in ast.iter_child_nodes(node):
        yield from _sites(child, scope)


class _Reader:
    """Puts a message's text together from its expression, as far as that can be seen in the source."""

    def __init__(
        self, functions: dict[str, ast.FunctionDef], constants: dict[str, str], scope: Scope, seen: Iterable[str] = ()
    ) -> None:
        self.functions, self.constants = functions, constants
        self.bound: dict[str, list[ast.expr]] = defaultdict(list)  # local variable -> what is assigned to it
        self.seen = set(seen)  # names that are being followed: a message may grow from itself
        for node in ast.walk(scope) if scope is not None else ():
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        self.bound[target.id].append(node.value)

    def read(self, nodes: Iterable[ast.expr]) -> tuple[str, bool]:
        """(text, whether it holds a value) of several expressions, one after the other."""
        found = [self._one(node) for node in nodes]
        return " ".join(text for text, _ in found), any(value for _, value in found)

    def _one(self, node: ast.expr) -> tuple[str, bool]:
        match node:
            case ast.Constant(value=str(text)):
                return text, False
            case ast.Constant():
                return "", False
            case ast.JoinedStr(values=parts):
                found = [self._one(part) for part in parts]
                return "".join(text for text, _ in found), any(value for _, value in found)
            case ast.FormattedValue(value=inner) | ast.Starred(value=inner):
                return self._one(inner)
            case ast.BinOp(left=left, right=right) if isinstance(node.op, ast.Add | ast.Mod):
                (first, one), (second, other) = self._one(left), self._one(right)
                return first + second, one or other
            case ast.IfExp(body=body, orelse=other):
                return self.read([body, other])
            case ast.BoolOp(values=values) | ast.List(elts=values) | ast.Tuple(elts=values):
                return self.read(values)
            case ast.GeneratorExp(elt=elt) | ast.ListComp(elt=elt):
                return self._one(elt)
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=arguments):
                return self.read(arguments)
            case ast.Name(id=name) if name in self.constants and name not in self.bound:
                return self.constants[name], False
            case ast.Name(id=name) if name in self.bound and name not in self.seen:
                self.seen.add(name)
                text, value = self.read(self.bound[name])
                self.seen.discard(name)
                return text + HOLE, value or _varies(node)
            case ast.Call(func=ast.Name(id=name)) if name in self.functions and name not in self.seen:
                self.seen.add(name)
                returned = [n.value for n in ast.walk(self.functions[name]) if isinstance(n, ast.Return) and n.value]
                text, _ = _Reader(self.functions, self.constants, self.functions[name], self.seen).read(returned)
                self.seen.discard(name)
                return text + HOLE, True
        return HOLE, _varies(node)


def _varies(node: ast.expr) -> bool:
    """Whether an expression holds more than constants of the program and builtins."""
    names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return any(not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name) and not hasattr(builtins, name) for name in names)


def of_folder(folder: Path) -> list[Message]:
    """Every message of the Python files below a folder."""
    files = sorted(folder.rglob("*.py"))
    names = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in files]
    return [m for path, name in zip(files, names, strict=True) for m in messages(path.read_text("utf-8"), str(name))]


def share(found: list[Message], what: str) -> float:
    """Of `found`, the share whose `what` (`value` or `hint`) is there; 1 of none."""
    return sum(getattr(message, what) for message in found) / len(found) if found else 1.0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=FOLDERS, help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="the messages that lack a value or a hint")
    arguments = parser.parse_args()
    found = [message for folder in arguments.folders for message in of_folder((ROOT / folder).resolve())]
    rows: dict[str, list[Message]] = defaultdict(list)
    for message in found:
        rows[str(Path(message.path).parent)].append(message)
    print(f"{'folder':<24}{'messages':>10}{'value':>8}{'hint':>8}   (goals: {GOAL:.0%} and {HINT_GOAL:.0%})")
    for folder, some in [*sorted(rows.items()), ("all", found)]:
        print(f"{folder:<24}{len(some):>10}{share(some, 'value'):>8.0%}{share(some, 'hint'):>8.0%}")
    for message in found if arguments.list else ():
        lacks = [what for what in ("value", "hint") if not getattr(message, what)]
        if lacks:
            print(f"{message.path}:{message.line}: no {', no '.join(lacks)}: {message.text[:160]}")


if __name__ == "__main__":
    main()
