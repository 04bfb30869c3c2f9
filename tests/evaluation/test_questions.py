"""What models are asked is made once, and losses that have just been taken are not taken again."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support import make_model, make_rows, make_tokenizer

from spectune.data import load_rows
from spectune.deltas import attach
from spectune.evaluation import Questions, Task, judge, judge_rows, row_losses
from spectune.evaluation.judge_rows import rows_at_once
from spectune.methods import LoRA


def test_models_are_judged_alike_whether_or_not_their_questions_were_made_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    task = Task.of(load_rows(make_rows(4)), generate_rows=2, max_length=40)
    attach(model, LoRA(r=2), "a")
    expected = judge(model, tokenizer, task)
    questions = Questions(task, tokenizer, None)
    assert judge(model, tokenizer, task, questions=questions) == expected

    losses = row_losses(model, questions.encoded.examples, 0, task.batch_size)
    taken: list[Any] = []

    def counted(*args: Any) -> Any:
        taken.append(args)
        return row_losses(*args)

    monkeypatch.setattr(judge_rows, "row_losses", counted)
    monkeypatch.setattr("spectune.evaluation.questions.ask", lambda *_: pytest.fail("asked again"))
    assert judge(model, tokenizer, task, questions=questions, losses=losses) == expected
    assert not taken
    # of other rows: those are not what is judged
    others = row_losses(model, questions.encoded.examples[:3], 0, task.batch_size)
    assert judge(model, tokenizer, task, questions=questions, losses=others) == expected
    assert len(taken) == 1


def test_a_gpu_writes_as_many_rows_together_as_their_cache_has_room_for() -> None:
    assert rows_at_once("cpu", 150, 16) == 16
    assert rows_at_once("cuda", 150, 16) == 218
    assert rows_at_once("cuda", 4096, 16) == 16
