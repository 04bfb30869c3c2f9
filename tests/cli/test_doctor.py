"""`spectune doctor`: one line a check, one JSON object, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from spectune.health import known_faults
from spectune.health.outcome import FAILED, OK, Outcome

Spectune = Callable[..., Any]
#: what takes long to look at; tests/compute/test_health.py looks at each
LONG = [flag for name in ("compile", "processes", "graphs", "int8-nf4", "fp8") for flag in ("--skip", name)]
IN_PROCESSES = [*LONG, *(f for name in ("attention", "output-folder", "cache-folder") for f in ("--skip", name))]


def test_a_real_run(spectune: Spectune) -> None:
    result = spectune("doctor", "--json", *LONG)
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    assert found["ok"] is True
    assert found["seconds"] > 0
    names = {check["name"] for check in found["checks"]}
    assert names == {"versions", "cores", "quiet", "memory", "attention", "output-folder", "cache-folder"}
    for check in found["checks"]:
        assert set(check) == {"name", "status", "says", "advice", "seconds"}
        assert check["status"] in ("ok", "not here")
        assert check["says"]


def test_what_failed_is_said_and_exits_with_1(spectune: Spectune, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Outcome:
        return Outcome("versions", FAILED, "torch 1.0 is older than 2.11", "pip install --upgrade torch")

    monkeypatch.setattr(known_faults, "versions", found)
    result = spectune("doctor", *IN_PROCESSES)
    assert result.exit_code == 1
    assert "FAILED    versions        torch 1.0 is older than 2.11. pip install --upgrade torch" in result.stdout
    assert "1 failed: versions" in result.stdout
    answer = spectune("doctor", "--json", *IN_PROCESSES)
    assert answer.exit_code == 1
    assert json.loads(answer.stdout)["ok"] is False


def test_a_check_that_raises_is_a_line(spectune: Spectune, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_: str) -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr("spectune.planning.device_memory.free_memory", raises)
    result = spectune("doctor", *IN_PROCESSES)
    assert result.exit_code == 1
    assert "FAILED    memory          ImportError: libcudart.so.12" in result.stdout


def test_a_check_by_a_wrong_name_is_a_usage_error(spectune: Spectune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_faults, "versions", lambda: Outcome("versions", OK, "fine"))
    result = spectune("doctor", "--skip", "compil")
    assert result.exit_code == 2
    assert "did you mean 'compile'" in result.stderr
