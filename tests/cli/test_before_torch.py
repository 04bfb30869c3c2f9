"""What is mistyped is said before torch is imported; and the hints lead to what was meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Spectune

from spectune.cli import known_keys
from spectune.cli.settings import RUN_KEYS
from spectune.cli.synonyms import SYNONYMS
from spectune.methods import BY_NAME
from spectune.training import TrainingConfig

#: runs commands in one process in which torch and what imports it cannot be imported
RUN = """
import json, sys
from typer.testing import CliRunner

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "datasets", "scipy", "matplotlib"):
            raise RuntimeError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
from spectune.cli.app import build_app

found = [CliRunner().invoke(build_app(), words) for words in json.loads(sys.argv[1])]
print(json.dumps([(result.exit_code, result.stderr, repr(result.exception)) for result in found]))
"""
#: a command, its exit code, and what it says
MISTYPED: list[tuple[list[str], int, str]] = [
    (["train", "--method", "lorra"], 2, "there is no method 'lorra'; did you mean 'lora'?"),
    (["compare", "--methods", "lora,bitfitt"], 2, "there is no method 'bitfitt'; did you mean 'bitfit'?"),
    (["plan", "--method", "lorra"], 2, "did you mean 'lora'?"),
    (["train", "--set", "learning_rat=1"], 2, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    (["plan", "--set", "lora.rr=1"], 2, "unknown key 'lora.rr'"),
    (["compare", "--set", "lora_rank=8"], 2, "did you mean 'r'?"),
    (["validate", "--set", "cutoff_len=8"], 2, "did you mean 'max_length'?"),
    (["train", "--set", "max_steps=few"], 2, "max_steps: "),
    (["train", "--lr", "1e-3"], 2, "spectune train has no flag --lr: it is a key, --set learning_rate=1e-3"),
    (["train", "--epochs=2"], 2, "it is a key, --set num_train_epochs=2"),
    (["compare", "--dataset", "x.jsonl"], 2, "spectune compare has no flag --dataset; did you mean --data?"),
    (["generate", "--max-tokens", "4"], 2, "did you mean --max-new-tokens?"),
    (["eval", "--lr", "1"], 2, "spectune eval --help lists those there are"),
    (["train", "--data", "none.jsonl"], 3, "none.jsonl: no such file"),
    (["train", "--valid", "none.jsonl"], 3, "none.jsonl: no such file"),
    (["compare", "--test", "none.jsonl"], 3, "none.jsonl: no such file"),
    (["compare", "--retain", "none.txt"], 3, "--retain none.txt: no such file"),
    (["plan", "--data", "none.jsonl"], 3, "none.jsonl: no such file"),
    (["serve", "--deltas", "none"], 3, "--deltas none is not a folder"),
    (["serve", "--model", "spectune-tiny", "--port", "0"], 1, "serving spectune-tiny at http://127.0.0.1:"),
    (["validate", "--data", "none.jsonl"], 3, "none.jsonl: no such file"),
    (["train", "--data", "bad.jsonl"], 3, "bad.jsonl:1"),
    (["train", "--config", "none.yaml"], 2, "there is no such file"),
    (["train", "--model", "./none"], 3, "the base './none' is a local path, and there is no such folder"),
    (["train", "--model", "bad.jsonl"], 3, "the base 'bad.jsonl' is a file"),
    (["plan", "--model", "some/deep/folder"], 3, "is a local path"),
    (["generate", "--model", "./none"], 3, "is a local path"),
    (["eval", "--model", "./none"], 3, "is a local path"),
    (["eval", "--run", "none"], 3, "none is not a folder"),
    (["eval"], 2, "there is no finished run"),
    (["generate", "--model", "spectune-tiny", "--data", "none.jsonl"], 3, "none.jsonl: no such file"),
    (["eval", "--model", "spectune-tiny", "--data", "none.jsonl"], 3, "none.jsonl: no such file"),
    (["merge", "--run", "none"], 3, "none is not a folder"),
    (["export", "--run", "none"], 3, "none is not a folder"),
    (["report", "none"], 3, "none is not a folder"),
    (["recommend", "--run", "none"], 3, "none is not a folder"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("mistyped")
    (folder / "bad.jsonl").write_text('{"completion": 3}\n{"prompt": "a", "completion": "b"}\n')
    words = json.dumps([command for command, _, _ in MISTYPED])
    command = [sys.executable, "-c", RUN, words]
    found = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert found.returncode == 0, found.stderr
    answers: list[Any] = json.loads(found.stdout)
    return answers


@pytest.mark.parametrize("number", range(len(MISTYPED)), ids=[" ".join(command) for command, _, _ in MISTYPED])
def test_what_is_mistyped_is_said_without_torch(answers: list[Any], number: int) -> None:
    _, code, message = MISTYPED[number]
    found_code, said, exception = answers[number]
    assert message in said, exception
    assert found_code == code


def test_the_methods_keys_are_known_as_their_configs_have_them() -> None:
    assert set(known_keys.names()) == set(BY_NAME)
    for name, method in BY_NAME.items():
        assert known_keys.fields(name) == set(method.model_fields) - {"name"}


def test_names_of_other_toolkits_lead_to_names_there_are() -> None:
    keys = set(TrainingConfig.model_fields) | RUN_KEYS | set().union(*map(known_keys.fields, known_keys.names()))
    flags = {"max_new_tokens", "do_sample", "temperature", "run", "as_json"}
    assert set(SYNONYMS.values()) <= keys | flags | set(known_keys.names())
    assert not set(SYNONYMS) & set(TrainingConfig.model_fields)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("torch_compile=maybe", "expected true, false or auto, given 'maybe'"),
        ("gradient_checkpointing=some", "expected true, false, auto, selective or offload, given 'some'"),
        ("optim=sgd", "expected adamw_torch_fused, adamw_8bit or adamw_in_backward, given 'sgd'"),
        ("load_best_at_end=perhaps", "expected true or false, given 'perhaps'"),
        ("lora.use_rslora=perhaps", "expected true or false, given 'perhaps'"),
    ],
)
def test_a_wrong_word_is_answered_with_those_that_are_taken(
    spectune: Spectune, rows: Path, setting: str, expected: str
) -> None:
    result = spectune("train", "--data", rows, "--set", setting)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert expected in line
