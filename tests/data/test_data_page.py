"""docs/data.md says what the command prints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_the_data_is_what_its_command_makes() -> None:
    spec = importlib.util.spec_from_file_location("data_page", ROOT / "tools" / "data_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["data_page"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        made = module.page()
    finally:
        del sys.modules["data_page"]
    written = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert made == written, "docs/data.md is out of date: run `make docs`"
