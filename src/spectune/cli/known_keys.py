"""The methods' names and the keys of their configs, read from the methods' files: importing these would import torch,
and a mistyped name should not wait for that. `tests/cli/test_known_keys.py` holds them equal to `METHODS`.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOM = "spectune.methods"


def method_names() -> str:
    """The methods for a help text: a method is one file, named as the method is; what several share stands beside."""
    return ", ".join(names())


@cache
def names() -> tuple[str, ...]:
    room = importlib.util.find_spec(ROOM)
    places = room.submodule_search_locations if room is not None else None
    files = [module.name for module in pkgutil.iter_modules(places)]
    return tuple(file for file in files if any(file in _called(config) for config in _classes(_source(file))))


@cache
def fields(method: str) -> frozenset[str]:
    """The keys of a method's config, without `name`."""
    tree = _source(method)
    [config] = [node for node in _classes(tree) if method in _called(node)]
    return frozenset(_fields(config, tree)) - {"name"}


@cache
def _source(file: str) -> ast.Module:
    room = importlib.util.find_spec(ROOM)
    assert room is not None
    assert room.submodule_search_locations is not None
    return ast.parse(Path(room.submodule_search_locations[0], f"{file}.py").read_text(encoding="utf-8"))


def _classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in tree.body if isinstance(node, ast.ClassDef))


def _annotated(config: ast.ClassDef) -> Iterator[tuple[str, str, ast.expr | None]]:
    """The name, type and default of each annotated attribute."""
    for part in config.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id, ast.unparse(part.annotation), part.value


def _called(config: ast.ClassDef) -> list[str]:
    """The name that a method's config gives itself; nothing of another class."""
    found = (value for name, _, value in _annotated(config) if name == "name")
    return [str(value.value) for value in found if isinstance(value, ast.Constant)]


def _fields(config: ast.ClassDef, tree: ast.Module) -> set[str]:
    """Its own fields, and those of a method that it is made of (DoRA is a LoRA)."""
    found = {name for name, kind, _ in _annotated(config) if not kind.startswith("ClassVar")}
    files = {alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for base in config.bases:
        module = files.get(base.id) if isinstance(base, ast.Name) else None
        if module is not None and module.startswith(f"{ROOM}."):
            found |= fields(module.removeprefix(f"{ROOM}."))
    return found
