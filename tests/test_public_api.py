"""The public names: all there, lazily, and the same for type checkers and at run time."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import spectune

PROMISED = {
    "METHODS",
    "BitFit",
    "BottleneckAdapter",
    "Comparison",
    "ConfigError",
    "DataError",
    "Delta",
    "DivergedError",
    "DoesNotFitError",
    "FullFineTuning",
    "InterruptedRun",
    "LoRA",
    "Method",
    "OutOfMemoryError",
    "PrefixTuning",
    "PromptTuning",
    "RunResult",
    "Source",
    "SpectuneError",
    "TrainingConfig",
    "attach",
    "compare",
    "detach",
    "load",
    "load_delta",
    "merge",
    "method_from_name",
    "route",
    "train",
}


def test_promised_names_are_public() -> None:
    assert set(spectune.__all__) >= PROMISED


@pytest.mark.parametrize("name", sorted(spectune.__all__))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(spectune, name) is not None
    assert name in dir(spectune)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(spectune.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname: node.module.split(".")[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("spectune.")
        for alias in node.names
        if alias.asname is not None
    }
    assert imported == spectune._ROOM_OF


@pytest.mark.parametrize("room", ["data", "storage", "training"])
def test_a_room_that_imports_late_has_the_names_that_type_checkers_see(room: str) -> None:
    module = importlib.import_module(f"spectune.{room}")
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    [for_checkers] = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    nodes = [node for node in for_checkers.body if isinstance(node, ast.ImportFrom)]
    seen = {str(node.module): tuple(alias.name for alias in node.names) for node in nodes}
    assert seen == module._PUBLIC
    assert sorted(module.__all__) == sorted(name for names in seen.values() for name in names)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'none'"):
        module.none  # noqa: B018


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoRa'"):
        spectune.LoRa  # noqa: B018


def test_import_and_help_wait_for_nothing_heavy() -> None:
    code = (
        "import json, sys, spectune, spectune.cli.app as app; app.build_app();"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'scipy'};"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []
