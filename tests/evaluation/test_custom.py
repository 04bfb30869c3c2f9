from __future__ import annotations

from pathlib import Path

import pytest

from spectune.data import load_rows
from spectune.errors import ConfigError
from spectune.evaluation import load_metric
from spectune.evaluation.custom import row_dict

CODE = """
def shortness(prediction, references, row):
    return 1 / (1 + len(prediction)) + len(references) + len(row["topic"])
def edits(prediction, references, row):
    return 3
edits.higher_is_better = False
def broken(prediction, references, row):
    return row["nothing"]
def endless(prediction, references, row):
    return float("inf")
def leaving(prediction, references, row):
    raise SystemExit(5)
def ending(prediction, references, row):
    raise GeneratorExit
class Stop(KeyboardInterrupt):
    exit_code = 0
def stopping(prediction, references, row):
    raise Stop
def interrupted(prediction, references, row):
    raise KeyboardInterrupt
NUMBER = 3
"""
ROW = load_rows([{"prompt": "a", "completion": "b", "references": ["b", "c"], "topic": "xyz"}])[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_metrics_for_a_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "place", ["own_metrics_for_a_test.py", "own_metrics_for_a_test", "{}/own_metrics_for_a_test.py"]
)
def test_a_function_of_a_module_or_a_file(folder: Path, place: str) -> None:
    source = f"{place.format(folder)}:shortness"
    found = load_metric(source)
    assert (found.name, found.source, found.higher_is_better) == ("shortness", source, True)
    assert found("x", ("b", "c"), ROW) == 5.5
    lower = load_metric(f"{place.format(folder)}:edits")
    assert not lower.higher_is_better
    assert lower("x", ("b",), ROW) == 3.0


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("own_metrics_for_a_test:shortnes", "did you mean 'shortness'"),
        ("own_metrics_for_a_test.py:NUMBER", "has no function 'NUMBER'"),
        ("no_such_module_here:f", "no_such_module_here cannot be imported: No module"),
        ("nothing.py:f", "no such file"),
        ("own_metrics_for_a_test:", "expected package.module:function"),
    ],
)
def test_what_is_no_metric(folder: Path, source: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_metric(source)


def test_a_failure_names_row_and_function(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"test\.py:broken on row .*1 failed: KeyError: 'nothing'"):
        load_metric("own_metrics_for_a_test.py:broken")("x", ("b",), ROW)
    with pytest.raises(ConfigError, match=r"test\.py:endless on row .*1 is inf; expected a finite number"):
        load_metric("own_metrics_for_a_test.py:endless")("x", ("b",), ROW)


@pytest.mark.parametrize("name", ["leaving", "ending", "stopping"])
def test_code_that_would_end_the_program_is_a_metric_that_fails(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"test\.py:{name} on row .*1 failed: ") as caught:
        load_metric(f"own_metrics_for_a_test.py:{name}")("x", ("b",), ROW)
    assert caught.value.exit_code == 2
    (folder / "ends_at_import.py").write_text("import sys\nsys.exit(5)")
    with pytest.raises(ConfigError, match=r"ends_at_import.py:f: ends_at_import.py cannot be imported: SystemExit: 5"):
        load_metric("ends_at_import.py:f")


def test_an_interrupt_within_a_metric_is_the_users(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_metric("own_metrics_for_a_test.py:interrupted")("x", ("b",), ROW)


def test_a_row_is_what_the_data_held() -> None:
    given = {
        "messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "even"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "level": 3,
    }
    [row] = load_rows([given])
    assert row_dict(row) == {**given, "origin": "row 1"}
