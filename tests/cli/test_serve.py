"""`spectune serve` as a user starts and stops it."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Spectune, Trained

Answers = dict[str, tuple[int, Any]]


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(port: int, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def served(
    spectune: Spectune, port: int, *words: str | Path, ask_for: Callable[[], Answers], end: int = signal.SIGTERM
) -> tuple[Any, Answers]:
    """Run the command until it has answered; then send it a signal."""
    answers: Answers = {}
    failed: list[BaseException] = []

    def client() -> None:
        try:
            while True:
                try:
                    if ask(port, "/health")[0] == 200:
                        break
                except OSError:
                    time.sleep(0.01)
            answers.update(ask_for())
        except BaseException as error:
            failed.append(error)
        finally:
            os.kill(os.getpid(), end)

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    result = spectune("serve", "--port", str(port), "--device", "cpu", *words)
    thread.join(60)
    assert not failed, failed
    return result, answers


@pytest.mark.parametrize(("end", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_with_no_flag_it_serves_the_newest_run_and_its_base_until_a_signal(
    end: int, code: int, spectune: Spectune, trained: Trained, port: int, base: Path
) -> None:
    run = trained("lora")
    asked = {"model": run.name, "prompt": "number 3", "max_tokens": 6, "temperature": 0}
    result, answers = served(
        spectune, port, end=end,
        ask_for=lambda: {"models": ask(port, "/v1/models"), "text": ask(port, "/v1/completions", asked)},
    )  # fmt: skip
    assert result.exit_code == code, result.stderr
    assert f"serving {base.name} and its deltas at http://127.0.0.1:{port}/v1" in result.stderr
    assert "warning" not in result.stderr
    assert [model["id"] for model in answers["models"][1]["data"]] == [base.name, run.name]
    generated = json.loads(spectune("generate", "number 3", "--max-new-tokens", "6", "--json").stdout)
    assert answers["text"][1]["choices"][0]["text"] == generated["outputs"][0]["completion"]


def test_a_folder_of_runs_and_deltas_is_served_on_the_base_that_they_name(
    spectune: Spectune, trained: Trained, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("lora", "bitfit"):
        trained(method)
    shutil.copytree(Path("runs/lora/best"), Path("runs/delta-alone"))
    monkeypatch.setenv("SPECTUNE_API_KEY", "secret\n")  # as a file has it
    names = ("delta-alone", "lora", "bitfit")
    result, answers = served(
        spectune, port, "--deltas", "runs", "--max-rows", "2",
        ask_for=lambda: {"nobody": ask(port, "/v1/models")} | {
            name: ask(port, "/v1/chat/completions", {
                "model": name, "messages": [{"role": "user", "content": "number 3"}], "max_tokens": 4, "temperature": 0,
            }, "secret") for name in names
        },
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert answers["nobody"][0] == 401
    assert "secret" not in result.stderr
    for name in ("lora", "bitfit"):
        words = ("generate", "number 3", "--run", f"runs/{name}", "--max-new-tokens", "4", "--json")
        generated = json.loads(spectune(*words).stdout)["outputs"][0]["completion"]
        assert answers[name][1]["choices"][0]["message"]["content"] == generated
    assert answers["delta-alone"][1]["choices"] == answers["lora"][1]["choices"]


def test_a_comparison_is_served_by_the_names_of_its_arms(spectune: Spectune, trained_once: Trained, port: int) -> None:
    """One name an arm, and one a seed where an arm has several; neither a fully tuned base nor a head is one."""
    places = {"lora": ["seed-0-1f2e"], "bitfit": ["seed-0-3d4c", "seed-1-5b6a"], "full": ["seed-0-7988"]}
    for method, folders in places.items():
        for folder in folders:
            shutil.copytree(trained_once(method), Path("compared", "runs", method, folder), symlinks=True)
    head = Path(shutil.copytree(trained_once("lora"), "compared/runs/lora-head/seed-0-9a9b", symlinks=True))
    config = head / "config.yaml"
    config.write_text(re.sub(r"(?m)^task_type: .*$", "task_type: SEQ_CLS", config.read_text()))
    Path("compared/runs/prefix/seed-0-8077").mkdir(parents=True)  # not ended
    Path("compared/comparison.json").write_text("{}")
    names = ("lora", "bitfit-seed-0", "bitfit-seed-1")
    request = {"prompt": "number 3", "max_tokens": 4, "temperature": 0}
    result, answers = served(
        spectune, port, "--deltas", "compared",
        ask_for=lambda: {"models": ask(port, "/v1/models")} | {
            name: ask(port, "/v1/completions", {"model": name, **request}) for name in names
        },
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert sorted(model["id"] for model in answers["models"][1]["data"])[1:] == sorted(names)
    assert "no delta" not in result.stderr
    assert "compared/runs/full/seed-0-7988 is a base of its own, and is not served: name it with --run" in result.stderr
    assert "compared/runs/lora-head/seed-0-9a9b has a head, which gives labels" in result.stderr
    for name, arm in zip(names, ("lora", "bitfit", "bitfit"), strict=True):
        words = ("generate", "number 3", "--run", trained_once(arm), "--max-new-tokens", "4", "--json")
        generated = json.loads(spectune(*words).stdout)["outputs"][0]["completion"]
        assert answers[name][1]["choices"][0]["text"] == generated


def test_a_base_that_cannot_be_loaded_ends_the_command_with_its_error_and_an_empty_folder_is_named(
    spectune: Spectune, base: Path, tmp_path: Path, port: int
) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    (tmp_path / "deltas" / "arm" / "run").mkdir(parents=True)
    place = "--deltas", tmp_path / "deltas", "--port", str(port), "--device", "cpu"
    result = spectune("serve", "--model", broken, *place)
    assert result.exit_code == 3, result.stderr
    assert "broken" in result.stderr
    assert "deltas holds no delta and no run yet" in result.stderr


def test_without_the_extra_it_says_what_to_install(spectune: Spectune, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    result = spectune("serve")
    assert result.exit_code == 2
    assert 'pip install "spectune[serve]"' in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--deltas", "nowhere"), 3, "--deltas nowhere is not a folder"),
        (("--api-key", " "), 2, "--api-key is empty"),
        (("--device-memory", "much"), 2, "--device-memory much"),
        (("--model", "./nowhere"), 3, "no such folder"),
    ],
)
def test_what_is_mistyped_is_said(words: tuple[str, ...], code: int, said: str, spectune: Spectune) -> None:
    result = spectune("serve", *words)
    assert result.exit_code == code, result.stderr
    assert said in result.stderr
