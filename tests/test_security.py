"""SECURITY.md names the test behind each promise: each of them is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text("utf-8"))
    assert len(named) > 25
    gone = [f"{file}::{name}" for file, name in named if name not in functions_in(ROOT / file)]
    assert not gone, gone


def functions_in(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_libraries_are_told_to_report_nothing() -> None:
    """When spectune is imported, before them; what the user has set stays."""
    code = "import spectune, os; print(*(os.environ[name] for name in ('HF_HUB_DISABLE_TELEMETRY', 'DO_NOT_TRACK')))"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**environment, "DO_NOT_TRACK": "0"}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]
