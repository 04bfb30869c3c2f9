"""Code that comes with a base runs where the command line says so, and nowhere else: nothing asks for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tests.cli.conftest import Spectune

from spectune.deltas import attached
from spectune.errors import DataError
from spectune.storage import load, load_config

CODE = """
import os
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel

Path(os.environ["SPECTUNE_RAN"]).touch()

class OwnConfig(GPT2Config):
    model_type = "own_gpt2"

class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig
"""
TRUST = "--trust-remote-code"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There once the base's own code has run. Standard input says yes to whatever asks."""
    path = tmp_path / "ran"
    monkeypatch.setenv("SPECTUNE_RAN", str(path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked for"))
    return path


@pytest.fixture
def own(base: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(base, tmp_path / "own"))
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    places = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_gpt2", "auto_map": places, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "command",
    [("train",), ("plan", "--method", "lora"), ("compare", "--quick"), ("validate",), ("eval",), ("generate", "x"),
     ("train", "--dry-run")],
)  # fmt: skip
def test_without_the_flag_no_command_runs_it_or_asks(
    spectune: Spectune, own: Path, rows: Path, ran: Path, command: tuple[str, ...]
) -> None:
    data = () if command[0] == "generate" else ("--data", rows)
    result = spectune(*command, "--model", own, *data)
    assert result.exit_code == 3, result.stderr
    assert "needs code of its own" in result.stderr
    assert TRUST in result.stderr
    assert "[y/N]" not in result.stdout + result.stderr
    assert not ran.exists()


def test_with_the_flag_a_base_of_own_code_goes_through_every_command(
    spectune: Spectune, own: Path, rows: Path, ran: Path
) -> None:
    given = ("--model", own, "--data", rows, "--device", "cpu", TRUST)
    trained = spectune("train", *given, "--method", "lora", "--set", "max_steps=4", "--set", "save_steps=2",
                       "--output-dir", "run")  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    assert ran.exists()
    assert "trust" not in Path("run/config.yaml").read_text()
    for command in (
        ("generate", "number 3", "--run", "run"), ("chat", "--run", "run"), ("eval", "--run", "run"),
        ("merge", "--run", "run"),
    ):  # fmt: skip
        refused = spectune(*command)
        assert (refused.exit_code, TRUST in refused.stderr) == (3, True), refused.stderr
        found = spectune(*command, TRUST, "--device", "cpu")
        assert found.exit_code == 0, found.stderr
    assert spectune("plan", *given, "--method", "lora").exit_code == 0
    assert load("run/merged", trust_remote_code=True)[0].config.model_type == "own_gpt2"
    compared = spectune("compare", *given, "--methods", "lora", "--quick", "--seeds", "1", "--generate-rows", "1",
                        "--set", "max_steps=2", "--set", "learning_rate=1e-3", "--output-dir", "side")  # fmt: skip
    assert compared.exit_code == 0, compared.stderr


def test_a_folder_to_resume_in_does_not_let_code_run(spectune: Spectune, own: Path, rows: Path, ran: Path) -> None:
    folder = Path("run")
    folder.mkdir()
    said = {"model": str(own), "data": str(rows), "trust_remote_code": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(said))
    result = spectune("train", "--resume", "--output-dir", folder)
    assert (result.exit_code, ran.exists()) == (3, False), result.stderr
    named = spectune("train", "--config", folder / "config.yaml", "--set", "max_steps=1", "--output-dir", "new",
                     "--set", "trust_remote_code=maybe")  # fmt: skip
    assert (named.exit_code, ran.exists()) == (2, False), named.stderr


def test_code_of_a_known_type_is_left_alone(base: Path, own: Path, ran: Path) -> None:
    """Many bases of the hub bring code for versions of transformers that did not have their type yet."""
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    model, _ = load(own)
    assert type(model).__module__.startswith("transformers.models.gpt2")
    assert attached(model) == {}
    assert not ran.exists()


@pytest.mark.parametrize("places", [4, {"AutoConfig": 4}, ["AutoConfig"]])
def test_a_map_of_code_of_another_form_is_refused(own: Path, ran: Path, places: object) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"auto_map": places}))
    for trust in (False, True):
        with pytest.raises(DataError, match=r"config\.json.*auto_map"):
            load_config(own, trust_remote_code=trust)
    assert not ran.exists()
