"""Judged rows against each row alone, unpadded, in float64, from the definition."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectune.data import encode, load_rows, prompt_ids
from spectune.deltas import attach, route
from spectune.errors import ConfigError, DataError
from spectune.evaluation import (
    JudgedRow,
    Task,
    corpus_metrics,
    judge,
    judged_loss,
    loss_by_source,
    read_rows,
    write_rows,
)
from spectune.evaluation.judge_rows import new_tokens
from spectune.evaluation.metrics import exact_match, rouge_l
from spectune.methods import LoRA, PromptTuning

WRITTEN: list[dict[str, Any]] = [
    {"prompt": "w5 w6 w7", "completion": " w8 w9", "references": ["w8 w9", "w1 w2 w3"]},
    {"prompt": "w1", "completion": " w2 w3 w4 w5 w6"},
    {"prompt": "w10 w11 w12 w13", "completion": " w14"},
]


@torch.no_grad()
def loss_of(model: PreTrainedModel, ids: list[int], prompt_length: int) -> float:
    training = model.training
    model.eval()
    log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    model.train(training)
    return -sum(float(log_p[t - 1, ids[t]]) for t in range(max(prompt_length, 1), len(ids)))


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    training = model.training
    model.eval()
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens:
        new = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if new == 0:
            break
        ids.append(new)
    model.train(training)
    return ids[len(prompt) :]


def test_written_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows([*WRITTEN, {"text": "w1 w2 w3"}])
    found = judge(model, tokenizer, Task.of(rows, max_new_tokens=6, batch_size=2, max_length=32))
    examples = encode(rows, tokenizer, max_length=32).examples
    assert [row.row for row in found] == [0, 1, 2, 3]
    assert [row.loss_sum for row in found] == pytest.approx(
        [loss_of(model, e.input_ids, e.prompt_length) for e in examples], rel=1e-5
    )
    assert [row.target_tokens for row in found] == [3, 6, 2, 3]
    # the ids that are continued are those that training put before the target
    prompts = [e.input_ids[: e.prompt_length] for e in examples[:3]]
    assert prompts == [prompt_ids(row, tokenizer) for row in rows[:3]] == [[5, 6, 7], [1], [10, 11, 12, 13]]
    texts = [tokenizer.decode(greedy(model, prompt, 6)).strip() for prompt in prompts]
    assert [row.prediction for row in found] == [*texts, None]
    references = [["w8 w9", "w1 w2 w3"], ["w2 w3 w4 w5 w6"], ["w14"]]
    assert [list(row.references) for row in found] == [*references, []]
    assert [row.prompt for row in found] == ["w5 w6 w7", "w1", "w10 w11 w12 w13", None]
    expected = {metric.__name__: sum(map(metric, texts, references)) / len(texts) for metric in (exact_match, rouge_l)}
    streams: Any = [list(stream) for stream in itertools.zip_longest(*references)]
    expected |= {
        "bleu": sacrebleu.corpus_bleu(texts, streams, force=True).score,
        "chrf": sacrebleu.corpus_chrf(texts, streams).score,
    }
    assert corpus_metrics(found) == expected
    assert found[3].metrics == found[3].statistics == {}
    assert judged_loss(found) == pytest.approx(sum(row.loss_sum for row in found) / 14)
    assert all(module.training for module in model.modules())


def test_it_is_the_current_route(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    task = Task.of(load_rows(WRITTEN), max_new_tokens=6, max_length=28)
    before = judge(model, tokenizer, task)
    delta = attach(model, PromptTuning(num_virtual_tokens=3), name="a")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.mul_(5)
    tuned = judge(model, tokenizer, task)
    assert judged_loss(tuned) != judged_loss(before)
    assert [row.prediction for row in tuned] == [
        tokenizer.decode(greedy(model, prompt_ids(row, tokenizer), 6)) for row in task.rows
    ]
    with route(model, None):
        assert judge(model, tokenizer, task) == before


def test_chosen_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    answers = [" w3", " w4 w9", " w21"]
    train = load_rows([{"prompt": f"w{i + 1}", "completion": answers[i % 3]} for i in range(9)])
    rows = load_rows([{"prompt": f"w{i + 11} w2", "completion": answers[i % 3]} for i in range(6)])
    found = judge(model, tokenizer, Task.of(rows, train_rows=train, max_length=32))
    targets = {" w3": [3, 0], " w4 w9": [4, 9, 0], " w21": [21, 0]}
    best = [min(answers, key=lambda answer: loss_of(model, [i + 11, 2, *targets[answer]], 2)) for i in range(6)]
    assert [row.prediction for row in found] == best
    assert len(set(best)) > 1
    hits = [float(best[i] == answers[i % 3]) for i in range(6)]
    assert [row.metrics for row in found] == [{"accuracy": hit} for hit in hits]
    measured = corpus_metrics(found)
    assert set(measured) == {"accuracy", "macro_f1", "matthews"}
    assert measured["accuracy"] == pytest.approx(sum(hits) / 6)
    assert [row.references for row in found] == [(answers[i % 3],) for i in range(6)]


def test_a_long_text_is_one_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    words = [1 + i % 39 for i in range(50)]
    rows = load_rows([{"text": " ".join(f"w{i}" for i in words)}, {"text": "w1 w2"}])
    found = judge(model, tokenizer, Task.of(rows, max_length=20))
    ids = [*words, 0]
    windows = [ids[start : start + 20] for start in range(0, 50, 19)]
    assert [row.target_tokens for row in found] == [50, 2]
    assert found[0].loss_sum == pytest.approx(sum(loss_of(model, window, 0) for window in windows), rel=1e-5)


def test_the_same_row_twice_is_two_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    row = load_rows(WRITTEN)[1]
    found = judge(model, tokenizer, Task.of([row, row], max_length=32, metric="loss"))
    assert [r.row for r in found] == [0, 1]
    assert found[0].loss_sum == found[1].loss_sum
    assert found[0].target_tokens == 6


def test_own_metrics_see_prediction_references_and_row(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text("def first(p, r, row):\n    return p.split()[0] == 'w5' or len(r) + len(row['prompt'].split())\n")
    found = judge(model, tokenizer, Task.of(load_rows(WRITTEN), metric=f"{path}:first,loss", max_length=32))
    for row in found:
        assert row.prediction
        first = 1.0 if row.prediction.split()[0] == "w5" else len(row.references) + len(str(row.prompt).split())
        assert row.metrics == {"first": first}
        assert row.statistics == {}


def test_new_tokens_follow_the_longest_reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def write(*_: Any, max_new_tokens: int, **__: Any) -> list[str]:
        asked.append(max_new_tokens)
        return ["w1"] * 3

    monkeypatch.setattr("spectune.inference.generate_texts", write)
    judge(model, tokenizer, Task.of(load_rows(WRITTEN), max_length=32))
    assert asked == [math.ceil(6 * 1.25) + 1]  # five words and EOS


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 3), (6, 9), (200, 251), (205, 256), (250, 256), (256, 257), (400, 401)]
)
def test_there_is_room_for_the_longest_answer_whatever_it_is(longest: int, expected: int) -> None:
    assert new_tokens(longest) == expected


def test_prompts_that_leave_no_room_are_cut_as_in_training_and_it_is_said(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(f"w{1 + i % 30}" for i in range(40))
    rows = load_rows([*WRITTEN, {"prompt": long, "completion": " w2"}])
    with caplog.at_level(logging.WARNING, logger="spectune"):
        found = judge(model, tokenizer, Task.of(rows, max_new_tokens=6, max_length=32))
    # two tokens are learned behind what was left of the prompt in training
    assert found[3].prediction == tokenizer.decode(greedy(model, [1 + i % 30 for i in range(40)][-30:], 2))
    assert "1 of 4 prompts to write from are cut: with an answer they exceed 32 tokens" in caplog.text


def test_a_delta_without_room_for_the_rows_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = load_rows([{"prompt": " ".join(["w1"] * 29), "completion": " w2 w3"}])
    attach(model, PromptTuning(num_virtual_tokens=4))
    with pytest.raises(ConfigError, match="has 32 tokens at max_length = 32, and under this delta the base takes 28"):
        judge(model, tokenizer, Task.of(rows, max_length=32, metric="loss"))


@pytest.mark.parametrize("part", ["spectune.evaluation.losses.row_loss_sums", "spectune.inference.generate_texts"])
def test_memory_that_runs_out_halves_the_batch_and_is_said(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    part: str,
) -> None:
    import spectune.inference

    task = Task.of(load_rows(WRITTEN), max_new_tokens=6, max_length=32, batch_size=4)
    whole = judge(model, tokenizer, task)
    real, tried = getattr(spectune.inference, part.rpartition(".")[2]), []

    def small_batches_only(*given: Any, **options: Any) -> Any:
        size = options.get("batch_size", given[-1])
        tried.append(size)
        if size > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB.")
        return real(*given, **options)

    monkeypatch.setattr(part, small_batches_only)
    with caplog.at_level(logging.WARNING, logger="spectune"):
        found = judge(model, tokenizer, task)
    assert tried == [4, 2, 1]
    assert "in batches of 4; again with 2" in caplog.text
    assert [row.loss_sum for row in found] == pytest.approx([row.loss_sum for row in whole], rel=1e-5)
    assert [row.prediction for row in found] == [row.prediction for row in whole]


def test_rows_on_disk_are_the_same_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    attach(model, LoRA(r=2))
    found = judge(model, tokenizer, Task.of(load_rows(WRITTEN), max_new_tokens=6, max_length=32))
    write_rows(tmp_path / "a" / "rows.jsonl", found)
    assert read_rows(tmp_path / "a" / "rows.jsonl") == found
    lines = (tmp_path / "a" / "rows.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {
        *("row", "origin", "loss_sum", "target_tokens", "metrics", "statistics", "prompt", "prediction", "references"),
        "source",
    }


def test_numbers_that_are_not_finite_are_null_on_disk_and_nan_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [JudgedRow(0, "a:1", math.inf, 2)])

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((tmp_path / "rows.jsonl").read_text(), parse_constant=refuse)
    [row] = read_rows(tmp_path / "rows.jsonl")
    assert math.isnan(row.loss_sum)
    assert math.isnan(judged_loss([row]))


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"row": 0}', '{"row": 0, "origin": "a", "loss_sum": 1, "target_tokens": 1, "more": 2}']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps(dataclasses.asdict(JudgedRow(0, "a:1", 1.0, 2)))
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2.* a judged row"):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")


def test_the_loss_weighs_tokens() -> None:
    rows = [JudgedRow(0, "a:1", 2.0, 1), JudgedRow(1, "a:2", 9.0, 9)]
    assert judged_loss(rows) == 1.1
    with pytest.raises(DataError, match="0 judged rows"):
        judged_loss([])


def test_the_loss_of_each_source() -> None:
    rows = [JudgedRow(0, "a:1", 2.0, 1, source="a"), JudgedRow(1, "b:1", 9.0, 3, source="b")]
    assert loss_by_source([*rows, JudgedRow(2, "a:2", 4.0, 2, source="a")]) == {"a": 2.0, "b": 3.0}
    assert loss_by_source(rows[:1]) == loss_by_source([JudgedRow(0, "a:1", 2.0, 1)]) == loss_by_source([]) == {}
    assert loss_by_source([*rows, JudgedRow(2, "c:1", 0.0, 0, source="c")]) == {"a": 2.0, "b": 3.0}


def test_rows_of_versions_that_kept_no_source_are_read(tmp_path: Path) -> None:
    row = dataclasses.asdict(JudgedRow(0, "a:1", 1.0, 2))
    del row["source"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert read_rows(tmp_path / "rows.jsonl") == [JudgedRow(0, "a:1", 1.0, 2)]
