"""Training on several sources: what their weights come to, the loss of each, and going on with the same mixture."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spectune.data import Source, encode, load_rows
from spectune.deltas import attached
from spectune.errors import ConfigError, InterruptedRun
from spectune.evaluation import row_losses
from spectune.inference import row_loss_sums
from spectune.methods import LoRA
from spectune.training import RunResult, TrainingConfig, train
from spectune.training import loop as loop_module
from tests.support import make_model, make_rows, make_tokenizer

QUIET = Console(quiet=True)
VALID = [Source(make_rows(5), name="even"), Source(make_rows(12)[7:], 3, "odd")]


def sources(web: float = 0.5, books: float = 2, name: str = "books") -> list[Source]:
    return [Source(make_rows(10), web, "web"), Source(make_rows(7), books, name)]


def settings(**changes: Any) -> TrainingConfig:
    given = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "memory_check": "off"}
    return TrainingConfig(**{**given, **changes})


def trained(
    config: TrainingConfig, rows: Any = None, valid: Any = None, console: Console = QUIET
) -> tuple[RunResult, Any]:
    model = make_model()
    rows, valid = rows or sources(), valid or VALID
    return train(model, make_tokenizer(), LoRA(r=2), rows, valid, config, console=console), model


def test_the_result_says_what_an_epoch_has_and_the_report_every_source(tmp_path: Path) -> None:
    result, _ = trained(settings(output_dir=tmp_path / "run"))
    assert {name: dict(found) for name, found in result.train_sources.items()} == {
        "web": {"rows": 10, "weight": 0.5, "examples": 5},
        "books": {"rows": 7, "weight": 2, "examples": 14},
    }
    assert result.steps == 2 * math.ceil(19 / 4)
    assert RunResult.load(tmp_path / "run" / "result.json") == result
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["train"]["sources"]["books"]["epoch_examples"] == 14
    assert set(report["valid"]["sources"]["odd"]) == {"rows", "examples", "tokens", "target_tokens"}


def test_losses_by_source_are_those_of_the_kept_weights_worked_out_from_the_rows(tmp_path: Path) -> None:
    # what is learned has nothing to do with these answers: the first weights are the best ones
    strange = [Source([{**row, "completion": "#@%~"} for row in part.data], part.weight, part.name) for part in VALID]
    config = settings(learning_rate=0.1, eval_steps=1, output_dir=tmp_path / "run")
    result, model = trained(config, valid=strange)
    assert result.best_step != result.steps
    tokenizer, found = make_tokenizer(), {}
    for source in strange:
        examples = encode(load_rows(source.data), tokenizer, max_length=64).examples
        sums, counts = row_loss_sums(model, examples, 0, 16)
        found[source.label] = math.fsum(sums) / sum(counts)
    assert result.valid_loss_by_source == pytest.approx(found, rel=1e-5)
    assert attached(model)  # the kept weights are those that were asked just now
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = next(line for line in lines if line["step"] == result.best_step and "valid_loss" in line)
    assert best["valid_loss[odd]"] == result.valid_loss_by_source["odd"]

    last, _ = trained(config.model_copy(update={"output_dir": None, "load_best_at_end": False}), valid=strange)
    assert last.valid_loss == result.last_valid_loss
    assert last.valid_loss_by_source != result.valid_loss_by_source


def test_losses_by_source_make_up_the_loss_of_all() -> None:
    rows = load_rows(VALID)
    examples = encode(rows, make_tokenizer(), max_length=64).examples
    losses = row_losses(make_model(), examples, 0)
    found = losses.by_source(examples)
    tokens = {name: sum(e.target_tokens for e in examples if e.row.source == name) for name in found}
    assert sum(found[name] * tokens[name] for name in found) / sum(tokens.values()) == pytest.approx(
        losses.mean_per_token
    )


def test_one_source_has_no_losses_of_its_own(tmp_path: Path) -> None:
    result, _ = trained(settings(max_steps=1), make_rows(), make_rows(6))
    assert result.valid_loss_by_source == result.train_sources == {}
    older = result.model_dump(mode="json")
    for name in ("valid_loss_by_source", "train_sources", "judged_loss_by_source"):
        del older[name]
    (tmp_path / "result.json").write_text(json.dumps(older))
    assert RunResult.load(tmp_path / "result.json") == result


def test_the_mixture_is_told() -> None:
    out = Console(file=io.StringIO(), width=200)
    trained(settings(max_steps=1), console=out)
    told = out.file.getvalue()  # type: ignore[attr-defined]
    assert "10 rows of web (x 0.5), 7 of books (x 2): 19 examples an epoch" in told


def test_a_run_goes_on_with_the_same_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(output_dir=tmp_path / "run", save_steps=1)
    whole, _ = trained(settings())
    begin = loop_module.Loop.begin

    def stopping(self: Any, window: Any) -> None:
        if self.run.progress.step == 7:
            raise InterruptedRun("stopped")
        begin(self, window)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "begin", stopping)
        with pytest.raises(InterruptedRun):
            trained(config)
    again = config.model_copy(update={"resume": True})
    with pytest.raises(ConfigError, match="weight of data books: 2 in the checkpoint, 3 now") as caught:
        trained(again, sources(books=3))
    assert "weight of data web" not in str(caught.value)
    result, _ = trained(again)
    assert result.valid_loss == whole.valid_loss
    assert result.valid_loss_by_source == whole.valid_loss_by_source
    with pytest.raises(ConfigError, match=r"weight of data web: 0\.5 in the finished run, 1 now"):
        trained(again, sources(web=1))


def test_a_source_may_have_another_name_where_its_rows_are_the_same(tmp_path: Path) -> None:
    config = settings(output_dir=tmp_path / "run", max_steps=1)
    first, _ = trained(config)
    again, _ = trained(config.model_copy(update={"resume": True}), sources(name="volumes"))
    assert again == first
