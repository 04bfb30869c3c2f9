"""From rows with labels to what a run says of them, by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import Spectune

FAST = ("--set", "max_steps=2", "--set", "learning_rate=0.01", "--set", "memory_check=off", "--device", "cpu")
CLASSES = [
    {"text": f"day {i} was {'fine' if i % 2 else 'wet'}", "label": "good" if i % 2 else "bad"} for i in range(12)
]
NUMBERS = [{"text": "x" * (i + 1), "label": i / 4} for i in range(12)]
TAGS = [{"tokens": ["in", f"York{i}", "now"], "tags": ["O", "B-LOC", "O"]} for i in range(12)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "task_type", "names", "metrics"),
    [
        (CLASSES, "SEQ_CLS", ["bad", "good"], {"accuracy", "macro_f1", "matthews", "loss_nats_per_row"}),
        (NUMBERS, "SEQ_CLS", [], {"mse", "pearson", "loss_squared_error"}),
        (TAGS, "TOKEN_CLS", ["B-LOC", "O"], {"span_f1", "token_accuracy", "loss_nats_per_word"}),
    ],
)
def test_rows_with_labels_train_a_head_which_says_what_it_learned(
    rows: list[dict[str, Any]], task_type: str, names: list[str], metrics: set[str], spectune: Spectune, base: Path
) -> None:
    data = write(Path("rows.jsonl"), rows)
    trained = spectune("train", "--data", data, "--model", base, "--output-dir", "runs/a", *FAST, "--json")
    assert trained.exit_code == 0, trained.stderr
    assert f"task: {task_type}: a head of" in trained.stderr
    result = json.loads(Path("runs/a/result.json").read_text())
    assert (result["task_type"], result["valid_perplexity"]) == (task_type, None)
    config = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert (config["task_type"], config["row_labels"]) == (task_type, names)
    assert json.loads(Path("runs/a/best/adapter_config.json").read_text())["task_type"] == task_type

    measured = spectune("eval", "--json", "--device", "cpu")
    assert measured.exit_code == 0, measured.stderr
    answer = json.loads(measured.stdout)
    assert set(answer["tuned"]) == set(answer["base"]) == metrics
    said = json.loads(spectune("generate", "in York now", "--json", "--device", "cpu").stdout)["outputs"][0]
    if task_type == "TOKEN_CLS":
        assert set(json.loads(said["completion"])) <= set(names)
    else:
        assert said["completion"] in names if names else float(said["completion"]) is not None
    again = spectune("train", "--resume", "--output-dir", "runs/a", "--device", "cpu")
    assert "finished already" in again.stdout + again.stderr


def test_a_task_type_decides_against_the_rows_and_is_written_as_one_likes(spectune: Spectune, base: Path) -> None:
    data = write(Path("rows.jsonl"), CLASSES)
    plain = spectune("validate", "--data", data, "--model", base, "--task-type", "causal-lm", "--json")
    assert json.loads(plain.stdout)["rows"][0]["ends_with_eos"]
    answered = [{"prompt": row["text"], "completion": f" {row['label']}"} for row in CLASSES]
    asked = spectune("validate", "--data", write(Path("a.jsonl"), answered), "--model", base, "--task-type", "seq-cls",
                     "--json")  # fmt: skip
    assert json.loads(asked.stdout)["classes"] == ["bad", "good"]
    wrong = spectune("validate", "--data", data, "--task-type", "SEQ2SEQ")
    assert wrong.exit_code == 2
    assert "expected auto, CAUSAL_LM, SEQ_CLS or TOKEN_CLS" in wrong.stderr


def test_a_label_of_validation_rows_that_training_rows_have_not_ends_with_3(spectune: Spectune, base: Path) -> None:
    data = write(Path("rows.jsonl"), CLASSES)
    other = write(Path("valid.jsonl"), [CLASSES[0], {"text": "a", "label": "neither"}])
    for command in ("train", "validate"):
        failed = spectune(
            command, "--data", data, "--valid", other, "--model", base, *(FAST if command == "train" else ())
        )
        assert failed.exit_code == 3
        assert "valid.jsonl:2: the label 'neither' is none of the classes bad, good" in failed.stderr


def test_a_plan_counts_the_head(spectune: Spectune, base: Path) -> None:
    data = write(Path("rows.jsonl"), CLASSES)
    given = ("plan", "--data", data, "--model", base, "--method", "bitfit", "--device", "cpu", "--json")
    found = [json.loads(spectune(*given, "--task-type", kind).stdout) for kind in ("CAUSAL_LM", "auto")]
    counts = [answer["methods"][0]["trainable_parameters"] for answer in found]
    assert counts[1] - counts[0] == 2 * 16


def test_a_plan_of_rows_for_a_head_is_the_runs_own_prediction(spectune: Spectune, base: Path) -> None:
    rows = [{**row, "text": str(row["text"]) * (1 + number % 5)} for number, row in enumerate(CLASSES)]
    given = ("--data", write(Path("rows.jsonl"), rows), "--model", base, "--method", "lora", "--device", "cpu")
    planned = json.loads(spectune("plan", *given, "--json").stdout)["methods"][0]
    trained = json.loads(spectune("train", *given, "--output-dir", "run", "--json").stdout)
    assert planned["peak_allocated"] == trained["predicted_memory_bytes"]["peak_allocated"]
    assert "packed" not in spectune("plan", *given).stdout


def test_arms_have_settings_of_their_own_and_wrong_ones_are_named(spectune: Spectune, base: Path) -> None:
    data = write(Path("rows.jsonl"), CLASSES)
    given = ("compare", "--data", data, "--model", base, *FAST)
    wrong = spectune(*given, "--methods", "lora:rank=8,bitfit:r=2,ora:r=1")
    assert wrong.exit_code == 2
    for told in (
        "arm lora has the unknown key 'rank'",
        "arm bitfit has the unknown key 'r'",
        "there is no method 'ora'",
    ):
        assert told in wrong.stderr
    assert "named more than once" in spectune(*given, "--methods", "lora,lora").stderr
    dry = spectune(*given, "--methods", "lora:r=2,lora:r=4+task_type=causal-lm", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr
    runs = json.loads(dry.stdout)["runs"]
    assert [(run["settings"]["r"], run["task_type"]) for run in runs] == [(2, "SEQ_CLS"), (4, "CAUSAL_LM")]
