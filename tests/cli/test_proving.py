"""`export` and `merge` run what they wrote, say how far it is from the run, and keep nothing that is not the run."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from benchmarks.exports.faults import nothing_merged, wrong_prefix
from tests.cli.test_merge import name_valid
from transformers import GPT2LMHeadModel

from spectune import storage as spectune_storage
from spectune.cli import export
from spectune.storage import export_proof

Spectune = Callable[..., Any]
Trained = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    ("method", "command", "program"),
    [
        ("lora", ["export"], "PEFT"),
        ("prompt", ["export", "--format", "prompt-embeds"], "transformers"),
        ("full", ["merge"], "transformers"),
    ],
)
def test_the_proof_is_printed_and_in_json(
    spectune: Spectune, trained: Trained, rows: Path, method: str, command: list[str], program: str
) -> None:
    run = trained(method)
    name_valid(run, rows)
    printed = spectune(*command, "--device", "cpu")
    assert printed.exit_code == 0, printed.stderr
    assert f"proved with {program} " in printed.stdout
    assert f"on 12 of 12 examples of the run's validation rows, {rows} (" in printed.stdout
    assert "largest logit difference" in printed.stdout
    own = json.loads((run / "result.json").read_text())["valid_loss"]
    assert f"the run's own loss, over all its validation rows: {own:.4f}" in printed.stdout
    answer = json.loads(spectune(*command, "--device", "cpu", "--json", "--output-dir", "again").stdout)
    proof = answer["proof"]
    assert proof["engine"].startswith(program)
    assert 0 <= proof["largest_logit_difference"] <= 1e-5 * proof["largest_logit"]
    assert proof["mean_logit_effect"] > 100 * proof["mean_logit_difference"]
    assert proof["loss_change"] == pytest.approx(0, abs=1e-5)
    assert proof["loss"] < proof["loss_of_base"]
    assert proof["valid_loss_of_run"] == own


def test_an_export_that_does_nothing_is_refused_and_nothing_stays(
    spectune: Spectune, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("lora")
    write = export._write

    def nameless(chosen: str, delta: Any, folder: Path, dtype: Any) -> None:
        write(chosen, delta, folder, dtype)
        wrong_prefix(folder, folder)

    monkeypatch.setattr(export, "_write", nameless)
    result = spectune("export")
    assert result.exit_code == 1
    assert "the export does nothing: with PEFT" in result.stderr
    assert "missing adapter keys" in result.stderr
    assert not [path for path in run.iterdir() if "export" in path.name]


def test_a_merge_that_does_nothing_is_refused_and_nothing_stays(
    spectune: Spectune, trained: Trained, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("lora")
    write = spectune_storage.write_model

    def bare(model: Any, tokenizer: Any, folder: Path) -> Path:
        write(model, tokenizer, folder)
        nothing_merged(folder, base)
        return folder

    monkeypatch.setattr(spectune_storage, "write_model", bare)
    result = spectune("merge")
    assert result.exit_code == 1
    assert "does nothing: with transformers" in result.stderr
    assert not [path for path in run.iterdir() if "merged" in path.name]


@pytest.mark.parametrize("command", [["export"], ["merge"], ["export", "--format", "gguf-lora"]])
def test_no_check_says_that_nothing_is_proved(spectune: Spectune, trained: Trained, command: list[str]) -> None:
    trained("lora")
    result = spectune(*command, "--no-check", "--json")
    assert result.exit_code == 0, result.stderr
    assert "not proved: with --no-check nothing has run what was written" in result.stderr
    assert json.loads(result.stdout)["proof"] is None


@pytest.mark.parametrize("command", [["export"], ["merge"]])
def test_there_is_one_base_in_memory_at_a_time(
    spectune: Spectune, trained: Trained, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    trained("lora")
    before = bases()
    held: list[int] = []
    running = export_proof.running

    def counting(*arguments: Any) -> Any:
        held.append(bases() - before)
        return running(*arguments)

    monkeypatch.setattr(export_proof, "running", counting)
    assert spectune(*command).exit_code == 0
    assert held == [0]


def bases() -> int:
    gc.collect()
    return sum(isinstance(found, GPT2LMHeadModel) for found in gc.get_objects())


def test_a_run_with_a_head(spectune: Spectune, base: Path) -> None:
    rows = [{"text": f"number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--set", "max_steps=2", "--set", "learning_rate=0.01", "--device", "cpu", "--output-dir", "run"]
    assert spectune("train", "--method", "lora", "--model", base, "--data", "rows.jsonl", *settings).exit_code == 0
    result = spectune("export", "--run", "run", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "proved with PEFT" in result.stdout
    assert "nats per row" in result.stdout
    load = "peft.AutoPeftModelForSequenceClassification.from_pretrained('run/export-peft', num_labels=2)"
    assert f"model = {load}" in result.stdout
    assert peft.AutoPeftModelForSequenceClassification.from_pretrained("run/export-peft", num_labels=2) is not None
    merged = spectune("merge", "--run", "run", "--device", "cpu")
    assert "transformers.AutoModelForSequenceClassification.from_pretrained('run/merged')" in merged.stdout


def test_gguf_lora(spectune: Spectune, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("lora")
    result = spectune("export", "--format", "gguf-lora")
    assert result.exit_code == 0, result.stderr
    folder = run / "export-gguf-lora"
    assert [path.name for path in folder.iterdir()] == ["adapter.gguf"]
    assert "read back with gguf's GGUFReader: 8 weights" in result.stdout
    assert "llama.cpp itself has not run it" in result.stdout
    assert f"--lora {folder / 'adapter.gguf'}" in result.stdout
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = spectune("export", "--format", "gguf-lora", "--output-dir", "other")
    assert result.exit_code == 2
    assert "pip install gguf" in result.stderr
    assert not Path("other").exists()
