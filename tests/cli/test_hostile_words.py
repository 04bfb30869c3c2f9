"""What names, arguments and files hold is shown, and neither obeyed nor run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectune.files.plain_text import plain

Spectune = Callable[..., Any]
Trained = Callable[[str], Path]
EVIL = "x\x1b]52;c;eA==\x07\x1b]8;;http://x\x1b\\\x9b2J\r\b\u202e\u2028[red][/nope]\udc80"
#: creates a file, and would end the command with the exit code of something else
CODE = "import os, sys\nos.mkdir('it ran')\nsys.exit(5)\n"


@pytest.mark.parametrize(
    "command",
    [
        (EVIL,),
        ("train", f"--{EVIL}", "1"),
        ("train", "--method", EVIL),
        ("train", "--set", f"{EVIL}=1"),
        ("train", "--set", f"max_steps={EVIL}"),
        ("train", "--data", EVIL),
        ("train", "--config", EVIL),
        ("train", "--resume", "--output-dir", EVIL, "--model", EVIL),
        ("generate", "--rows", EVIL),
        ("generate", "--run", EVIL),
        ("compare", "--methods", EVIL),
        ("compare", "--metric", f"{EVIL}.py:f", "--dry-run"),
        ("compare", "--max-memory", EVIL),
        ("eval", "--model", EVIL),
        ("report", EVIL),
        ("export", "--format", EVIL),
        ("doctor", "--skip", EVIL),
        ("recommend", "--compute", EVIL),
    ],
    ids=lambda command: " ".join(part.replace(EVIL, "EVIL") for part in command),
)
def test_what_was_given_is_shown_and_not_obeyed(spectune: Spectune, command: tuple[str, ...]) -> None:
    for arguments in (command, [part.replace(EVIL, EVIL + "y" * 1_000_000) for part in command]):
        result = spectune(*arguments)
        assert result.exit_code in (1, 2, 3), result.stderr
        said = result.stdout + result.stderr
        assert plain(said) == said
        assert 0 < len(said) < 20_000
        assert "Traceback" not in said


def test_what_a_model_is_asked_and_writes_is_shown_plain_and_is_exact_in_json(
    spectune: Spectune, trained: Trained
) -> None:
    asked = EVIL.replace("\udc80", "") + "\ttab"
    common = ("generate", asked, "--run", trained("lora"), "--device", "cpu", "--max-new-tokens", "8")
    shown, exact = spectune(*common), spectune(*common, "--json")
    assert shown.exit_code == exact.exit_code == 0
    assert plain(shown.stdout) == shown.stdout
    assert shown.stdout.startswith(plain(asked))
    [output] = json.loads(exact.stdout)["outputs"]
    assert output["prompt"].startswith(asked)
    assert plain(exact.stdout) == exact.stdout
    assert plain(output["completion"].strip()) in shown.stdout


def test_code_that_only_a_folder_names_is_not_run(spectune: Spectune, trained: Trained) -> None:
    Path("evil.py").write_text(CODE)
    Path("out").mkdir()
    Path("out/config.yaml").write_text("metric: evil.py:f\nmethods: [lora]\n")
    run = trained("lora")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "metric": "loss,evil.py:f"}))
    for command in (("compare", "--resume", "--output-dir", "out"), ("eval", "--run", run)):
        refused = spectune(*command)
        assert refused.exit_code == 2
        assert "config.yaml names the metric evil.py:f, which is Python code" in refused.stderr
        assert "--metric" in refused.stderr
    assert spectune("report", "out").exit_code == 3
    assert not Path("it ran").exists()
    named = spectune("compare", "--resume", "--output-dir", "out", "--config", "out/config.yaml", "--dry-run")
    assert named.exit_code == 2
    assert "metric evil.py:f: evil.py cannot be imported: SystemExit: 5" in named.stderr
    assert Path("it ran").exists()


def test_what_is_secret_is_in_no_file_and_on_no_terminal(
    spectune: Spectune, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hf_SECRETsecretSECRET")
    common = ("--model", base, "--data", rows, "--set", "max_steps=1", "--set", "memory_check=off", "--device", "cpu")
    said = [spectune("train", *common, "--method", "bitfit", "--output-dir", "out"), spectune("env", "--json")]
    assert [result.exit_code for result in said] == [0, 0]
    assert not [result for result in said if "SECRET" in result.stdout + result.stderr]
    assert not [path for path in Path("out").rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
