"""The textbook's guide: every rule can apply, names real methods and its source, and the command can be run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from spectune.cli.app import build_app
from spectune.comparing.advising.guide import GIB, Answers, guide
from spectune.methods import BY_NAME, METHODS
from tests.support import make_rows

CASES: list[dict[str, Any]] = [
    {"rows": 100},
    {"rows": 3000},
    {"rows": 50_000},
    {"tasks": 20},
    {"compute": "low"},
    {"compute": "medium"},
    {"compute": "high"},
    {"must_merge": True},
    {"must_merge": True, "tasks": 5},
    {"keep_base": True},
    {"fast_iteration": True},
    {"max_quality": True},
]


def applying(**answers: Any) -> set[str]:
    return {rule["name"] for rule in guide(Answers(**answers))["rules"]}


def test_every_rule_applies_somewhere_and_none_without_an_answer() -> None:
    nothing = guide()
    assert nothing["rules"] == []
    assert {rule["name"] for rule in nothing["others"]} == set().union(*(applying(**case) for case in CASES))


def test_rules_have_thresholds_sources_and_real_methods() -> None:
    for rule in guide()["others"]:
        assert "(rule of thumb" in rule["condition"] or "(a fact)" in rule["condition"]
        assert rule["source"]
        assert rule["why"]
        assert set(rule["toward"]) | set(rule["away"]) <= set(BY_NAME)
        assert not set(rule["toward"]) & set(rule["away"])
        assert rule["decides"] <= ("(a fact)" in rule["condition"])


def test_all_overlapping_rules_are_listed() -> None:
    found = guide(Answers(rows=100, tasks=20, memory_bytes=16 * GIB))
    names = {rule["name"] for rule in found["rules"]}
    assert {"few rows, train few weights", "few rows, no virtual tokens", "many tasks, small files"} <= names
    assert "little memory, frozen base" in names
    prefix = next(method for method in found["methods"] if method["name"] == "prefix")
    assert prefix["for"]
    assert prefix["against"]  # the two rules on few rows contradict each other, and both are told
    assert len(found["rules"]) + len(found["others"]) == len(guide()["others"])


def test_facts_exclude_by_what_methods_are() -> None:
    merged = guide(Answers(must_merge=True))
    assert set(merged["excluded"]) == {name for name, method in BY_NAME.items() if not method.can_merge}
    kept = guide(Answers(keep_base=True))
    assert set(kept["excluded"]) == {name for name, method in BY_NAME.items() if method.trains_base}
    assert not set(merged["excluded"]) & set(merged["shortlist"])
    assert len(METHODS) == len(merged["methods"])


def test_thresholds() -> None:
    assert "few rows, train few weights" in applying(rows=999)
    assert "few rows, train few weights" not in applying(rows=1000)
    assert "many rows carry all weights" in applying(rows=10_000)
    assert "little memory, frozen base" in applying(memory_bytes=24 * GIB)
    assert "medium memory" in applying(memory_bytes=24 * GIB + 1)
    assert "much memory, all weights" in applying(memory_bytes=80 * GIB + 1)
    assert "many tasks, small files" not in applying(tasks=9)


@pytest.mark.parametrize("case", [{}, *CASES])
def test_the_command_is_one_that_compare_takes(
    case: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = guide(Answers(**case))
    words = found["command"].split()
    assert words[:2] == ["spectune", "compare"]
    names = words[words.index("--methods") + 1].split(",")
    assert set(found["shortlist"]) <= set(names) <= set(BY_NAME)
    assert ("--quick" in words) == case.get("fast_iteration", False)
    if case != {"fast_iteration": True}:  # of all flags that a command can have
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8)))
    result = CliRunner().invoke(
        build_app(), [*words[1:], "--dry-run", "--set", "max_steps=1", "--set", "memory_check=off"]
    )
    assert result.exit_code == 0, result.stderr


def test_limits_follow_the_answers() -> None:
    assert guide(Answers(tasks=3, memory_bytes=16 * GIB))["then"] == "spectune recommend --tenants 3 --max-memory 16GiB"
    assert guide()["then"] == "spectune recommend"


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"compute": "some"}, {"row": 3}])
def test_wrong_answers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Answers(**wrong)
